"""Oracle 5: what a step of rate training keeps, computes and leaves behind, against BPTT."""

import gc
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    assert_same_tensors,
    attached,
    bytes_saved,
    images,
    labels,
    lif_node,
    mean_output,
    net_with,
    outputs,
    tiny_net,
    train_step,
)
from util.rate.saved import saved_for_backward


def block_net() -> nn.Module:
    """With a residual block and the published network's shape in small."""
    from model.resnet import BasicBlock

    torch.manual_seed(0)
    body = (BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), layer.AdaptiveAvgPool2d(1), layer.Flatten(), layer.Linear(6, 5))
    return nn.Sequential(layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), lif_node(), *body).double()


NETWORKS = {
    "tiny": tiny_net,
    "residual": block_net,
    "hard reset, not detached": lambda: tiny_net(lambda: lif_node(v_reset=0.0, detach_reset=False)),
    "atan": lambda: tiny_net(lambda: neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)),
    "without closed form": lambda: tiny_net(lambda: neuron.QIFNode(detach_reset=True)),
    "whose step keeps its own output": lambda: tiny_net(lambda: neuron.EIFNode(detach_reset=True)),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_for_backward_does_not_depend_on_t(mode, make):
    one, eight = (bytes_saved(make(), images(time_step), "rate", mode) for time_step in (1, 8))
    assert one == eight > 0


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_for_backward_is_at_most_bptt_s_of_one_step(mode, make):
    assert bytes_saved(make(), images(8), "rate", mode) <= bytes_saved(make(), images(1), "bptt", mode)


@pytest.mark.parametrize("mode", MODES)
def test_rates_are_kept_as_a_byte_each(mode):
    """Where a linear map gets them straight from neurons. All else of `tiny_net`, with 3 images of 6x6, is float64."""
    image, first, second, statistics = 3 * 2 * 36, 3 * 4 * 36, 3 * 6 * 9, 2 * (4 + 6)
    inputs_of_norms = eligibilities = first + second
    flattened = second * (1 if mode == "m" else 8)  # rates that the linear layer gets
    expected = first + flattened + 8 * (image + inputs_of_norms + eligibilities + statistics)
    assert bytes_saved(tiny_net(), images(5), "rate", mode) == expected


@pytest.mark.parametrize("mode", MODES)
def test_rates_that_are_changed_in_place_are_kept_as_they_are(mode):
    class Scales(nn.Module):
        def __init__(self, in_place: bool):
            super().__init__()
            self.body, self.in_place = tiny_net(), in_place

        def forward(self, x: Tensor) -> Tensor:
            spikes = self.body[:3](x)
            return self.body[3:](spikes.mul_(0.5) if self.in_place else spikes * 0.5)

    found = [train_step(attached(Scales(place), "rate", 3, mode), images(3), labels(), mode) for place in (True, False)]
    assert_same_gradients(found[0].grads, found[1].grads, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_bptt_keeps_every_step(mode):
    """The count itself: BPTT's must grow with T, or the tests above show nothing."""
    one, eight = (bytes_saved(tiny_net(), images(time_step), "bptt", mode) for time_step in (1, 8))
    assert eight > 6 * one


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_kept_after_the_backward(mode):
    net, x = attached(tiny_net(), "rate", 3, mode), images(3)
    with saved_for_backward(net) as count:
        out = mean_output(net, x, mode)
        F.cross_entropy(out, labels()).backward()
        del out
        assert count() == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_backward_is_freed_with_its_outputs(mode):
    net, x = attached(tiny_net(), "rate", 3, mode), images(3)
    with saved_for_backward(net) as count:
        out = outputs(net, x, mode)
        assert count() > 0
        functional.reset_net(net)
        del out
        assert count() == 0


@pytest.mark.parametrize("mode", MODES)
def test_outputs_free_their_graph_without_the_cycle_collector(mode):
    """A graph that waits for the collector would hold the memory of several batches."""
    net, x = attached(tiny_net(), "rate", 3, mode), images(3)
    with saved_for_backward(net) as count:
        gc.disable()
        try:
            out = outputs(net, x, mode)
            functional.reset_net(net)
            del out
            assert count() == 0
        finally:
            gc.enable()


class Calls(TorchDispatchMode):
    """Counts convolutions, matrix products and BatchNorms that are computed, whoever asks for them."""

    KINDS = {  # noqa: RUF012
        "aten::convolution": "convolution",
        "aten::convolution_backward": "convolution backward",
        "aten::addmm": "linear",
        "aten::mm": "product",
        "aten::bmm": "product",
    }

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = self.KINDS.get(func._schema.name)
        if kind:
            self.count[kind] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("time_step", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_rates_cost_no_convolution_and_no_linear_layer(mode, time_step):
    """Two convolutions and a linear layer: one call each a forward ('m') or a step ('s'), as without gradients."""
    net, x = attached(tiny_net(), "rate", time_step, mode), images(time_step)
    with Calls() as calls:
        out = mean_output(net, x, mode)
    forwards = 1 if mode == "m" else time_step
    assert calls.count == {"convolution": 2 * forwards, "linear": forwards}
    with Calls() as calls:
        F.cross_entropy(out, labels()).backward()
    assert calls.count["convolution"] == 0
    assert calls.count["convolution backward"] == 2


@pytest.mark.parametrize("padding", ["same", "valid", (1, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_nor_do_they_however_the_padding_is_given(mode, padding):
    net = net_with(layer.Conv2d(4, 4, 3, padding=padding), before="conv2")
    with Calls() as calls:
        outputs(attached(net[:5], "rate", 3, mode), images(3), mode)
    assert calls.count == {"convolution": 3 * (1 if mode == "m" else 3)}  # three of them


@pytest.mark.parametrize("mode", MODES)
def test_bptt_computes_as_many_convolutions(mode):
    with Calls() as calls:
        outputs(attached(tiny_net(), "bptt", 4, mode), images(4), mode)
    assert calls.count["convolution"] == 2 * (1 if mode == "m" else 4)


@pytest.mark.parametrize("time_step", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_after_a_step_are_bptt_s(mode, time_step):
    net, x = tiny_net(), images(time_step)
    net.bn2.momentum = None  # a cumulative average: the number of batches counts
    bptt, rate = attached(net, "bptt", time_step, mode), attached(net, "rate", time_step, mode)
    for batch in (x, 2 * x):
        expected = train_step(bptt, batch, labels(), mode).buffers
        found = train_step(rate, batch, labels(), mode).buffers
        assert len(found) == 6
        assert_same_tensors(found, expected)
    assert found["bn1.num_batches_tracked"] == 2 * (1 if mode == "m" else time_step)


@pytest.mark.parametrize("time_step", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_the_potentials_after_a_forward_are_bptt_s(mode, time_step):
    x = images(time_step)
    for options in ({}, {"v_reset": 0.0}, {"v_reset": -0.3, "decay_input": True}):
        net = tiny_net(lambda options=options: lif_node(**options))
        expected = train_step(attached(net, "bptt", time_step, mode), x, labels(), mode).potentials
        found = train_step(attached(net, "rate", time_step, mode), x, labels(), mode).potentials
        assert len(found) == 2
        assert not any(v.requires_grad for v in found.values())
        assert_same_tensors(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_potential_that_is_detached_in_place_of_reset_is_carried_on(mode):
    """Two windows with `functional.detach_net` between them go on from v, as SpikingJelly's neurons do."""
    net, x = tiny_net(), images(6)
    with torch.no_grad():
        bptt = attached(net, "bptt", 3, mode)
        expected = [outputs(bptt, part, mode) for part in (x[:3], x[3:])]
    rate = attached(net, "rate", 3, mode)
    found = [outputs(rate, x[:3], mode).detach()]
    functional.detach_net(rate)
    found.append(outputs(rate, x[3:], mode).detach())
    assert (found[1] - outputs(attached(net, "rate", 3, mode), x[3:], mode)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
