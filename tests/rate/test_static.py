"""A static image: what stands in front of the first neurons is computed once, and no number changes."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    assert_same_tensors,
    gradients,
    images,
    labels,
    tiny_net,
    train_step,
)
from util.train.method import Rate
from util.util import rate_model_setting

pytestmark = pytest.mark.quick


class Images(TorchDispatchMode):
    """How many images of how many channels convolutions and BatchNorms work on in their forward."""

    def __init__(self):
        super().__init__()
        self.count: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = {"aten::convolution": "convolution", "aten::native_batch_norm": "norm"}.get(func._schema.name)
        if kind:
            self.count[kind, args[0].shape[1]] += args[0].shape[0]
        return func(*args, **(kwargs or {}))


def static(t: int) -> Tensor:
    return images(1).expand(t, *images(1).shape[1:])


def step(net: nn.Module, t: int, mode: str, static_input: bool):
    """A training step on one image shown T times, in mode 's' the same tensor in each call."""
    rate_model_setting(net, t, mode, static_input=static_input)
    x = static(t)
    return train_step(net, x if mode == "m" else [x[0]] * t, labels(), mode)


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_output_gradients_and_statistics_are_those_of_computing_every_step(mode, t):
    found = []
    for static_input in (False, True):
        net = tiny_net()
        net.bn2.momentum = None
        for _ in range(2):
            result = step(net, t, mode, static_input)
        found.append(result)
    torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found[1].grads, found[0].grads, 1e-10)
    assert_same_tensors(found[1].buffers, found[0].buffers)
    assert_same_tensors(found[1].potentials, found[0].potentials)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_convolution_and_norm_work_on_one_step(mode):
    net = tiny_net()
    with Images() as seen:
        step(net, 5, mode, True)
    rate_pass = 3  # of the BatchNorms: one step's images more
    assert seen.count == {
        ("convolution", 2): 3, ("norm", 4): 3 + rate_pass, ("convolution", 4): 5 * 3, ("norm", 6): 5 * 3 + rate_pass
    }  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_frames_that_differ_are_all_computed(mode):
    found = []
    for static_input in (False, True):
        net = rate_model_setting(tiny_net(), 3, mode, static_input=static_input)
        found.append(train_step(net, images(3), labels(), mode))
    assert_same_gradients(found[1].grads, found[0].grads, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_the_training_loop_says_that_images_are_static(mode):
    net, method = tiny_net(), Rate(5, mode)
    method.attach(net)
    net.train()
    with Images() as seen:
        method.forward(net, images(1)[0])
    assert seen.count["convolution", 2] == 3


@pytest.mark.parametrize("mode", MODES)
def test_work_in_place_on_what_was_made_of_it_is_an_error(mode):
    net = tiny_net()
    net.bn1.register_forward_hook(lambda module, args, out: out.mul_(2))
    with pytest.raises(RuntimeError, match=r"in place|single memory location"):
        step(net, 3, mode, True)


@pytest.mark.parametrize("mode", MODES)
def test_work_in_place_on_the_image_is_an_error(mode):
    net = tiny_net()
    net.conv1.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    with pytest.raises(RuntimeError, match=r"in place|single memory location"):
        step(net, 3, mode, True)


def test_frames_that_come_in_one_buffer_are_those_that_come_in_three():
    found, buffer = [], images(1)[0]
    for frames in (images(3), (buffer.copy_(frame) for frame in images(3))):
        net = rate_model_setting(tiny_net(), 3, "s", static_input=True)
        torch.stack([net(frame) for frame in frames]).sin().sum().backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-12)


def test_what_was_made_of_one_image_is_not_taken_for_another_s():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_net()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.body[2:](self.body[1](self.body[0](a)) * b.mean())

    a, b = images(2)
    found = []
    for static_input in (False, True):
        net = rate_model_setting(Sum(), 2, "s", static_input=static_input)
        found.append((net(a, b) + net(b, a)).detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
