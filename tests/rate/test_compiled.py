"""Neurons and BatchNorm by torch.compile: the same numbers, whatever the layout in memory; a way without a compiler."""

import logging

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

import util.rate.compiled
from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    assert_same_tensors,
    images,
    labels,
    lif_node,
    tiny_net,
    train_step,
)
from util.rate.eligibility import run_steps
from util.util import rate_model_setting

NEURONS = {
    "the paper's LIF": lif_node,
    "hard reset, not detached": lambda: neuron.LIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan()),
    "parametric": lambda: neuron.ParametricLIFNode(v_threshold=0.5),
    "without closed form": lambda: neuron.QIFNode(v_threshold=0.5),
}


def forget_compiler() -> None:
    util.rate.compiled.compiler_works.cache_clear()
    util.rate.compiled._compiled.cache_clear()
    torch._dynamo.reset()  # a function that a process compiled eight times over runs step by step in torch 2.3


@pytest.mark.cover(1)
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("mode", MODES)
def test_gives_the_eager_step_s_output_gradients_and_state(mode, kind):
    assert util.rate.compiled.compiler_works("cpu")
    net, x = tiny_net(NEURONS[kind]), images(4)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    found = []
    for compiled in (False, True):
        net.load_state_dict(buffers, strict=False)
        found.append(train_step(rate_model_setting(net, 4, mode, compiled=compiled), x, labels(), mode))
    torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found[1].grads, found[0].grads, 1e-10)
    assert_same_tensors(found[1].potentials, found[0].potentials)
    assert_same_tensors(found[1].buffers, found[0].buffers)


@pytest.mark.parametrize("name", ["v_threshold", "tau"])
@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_for_each_channel_is_that_of_the_eager_step(mode, name):
    found = []
    for compiled in (False, True):
        net = tiny_net(lambda: lif_node(v_reset=0.0))
        setattr(net.fire1, name, torch.linspace(1.1, 2, 4, dtype=torch.float64).view(4, 1, 1))
        rate_model_setting(net, 4, mode, compiled=compiled)
        found.append(train_step(net, images(4), labels(), mode))
    torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-10, atol=1e-12)
    assert_same_gradients(found[1].grads, found[0].grads, 1e-10)


def test_a_forward_that_is_watched_is_compiled_too(caplog):
    class Drops(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_net()

        def forward(self, x):
            return self.body(torch.nn.functional.dropout(x, 0.3))

    forget_compiler()
    net = rate_model_setting(Drops(), 4, "m", compiled=True)
    with caplog.at_level(logging.WARNING):
        net(images(4))
    assert "torch.compile does not work here" not in caplog.text
    assert util.rate.compiled.compiler_works("cpu")


@pytest.mark.parametrize("mode", MODES)
def test_images_with_channels_last_and_batches_of_any_size(mode, monkeypatch):
    eager = []
    monkeypatch.setattr(util.rate.compiled, "run_steps", lambda *args: eager.append(args) or run_steps(*args))
    net = tiny_net().to(memory_format=torch.channels_last)
    for b in (2, 3, 5):
        x = images(4, b).flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, b))
        found = [
            train_step(rate_model_setting(net, 4, mode, compiled=compiled), x, labels(b), mode)
            for compiled in (False, True)
        ]
        assert_same_gradients(found[1].grads, found[0].grads, 1e-10)
    assert not eager


@pytest.mark.parametrize("mode", MODES)
def test_code_is_made_for_a_kind_of_neuron_not_for_each_layer_or_step(mode):
    """What the first batch compiles serves every later one, of other networks too."""
    forget_compiler()
    for batch in (2, 3, 4):
        net = rate_model_setting(tiny_net(), 12, mode, compiled=True)  # two layers of different size
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            train_step(net, images(12, batch), labels(batch), mode)


def test_each_type_of_device_is_tried_out_by_itself(monkeypatch):
    """A GPU without Triton beside a C++ compiler, and Triton without one; here 'meta' stands for the GPU."""

    def compiler_for(device_type):
        def compile(function, **options):
            def run(dynamics, record, currents):
                if currents.device.type != device_type:
                    raise RuntimeError(f"no compiler for {currents.device.type}")
                return function(dynamics, record, currents)

            return run

        return compile

    for works, other in (("cpu", "meta"), ("meta", "cpu")):
        forget_compiler()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", compiler_for(works))
            found = [util.rate.compiled.compiler_works(kind) for kind in (works, other)]
        forget_compiler()
        assert found == [True, False]


def test_without_a_compiler_the_steps_run_one_by_one_and_a_warning_says_so(monkeypatch, caplog):
    def no_compiler(function, **options):
        def fail(*args):
            raise RuntimeError("no C++ compiler")

        return fail

    forget_compiler()
    monkeypatch.setattr(torch, "compile", no_compiler)
    try:
        with caplog.at_level(logging.WARNING):
            net = rate_model_setting(tiny_net(), 4, "m", compiled=True)
            found = train_step(net, images(4), labels(), "m")
    finally:
        forget_compiler()
    assert "torch.compile does not work here" in caplog.text
    expected = train_step(rate_model_setting(tiny_net(), 4, "m"), images(4), labels(), "m")
    assert_same_gradients(found.grads, expected.grads, 1e-12)
