"""Tensors that a forward keeps in attributes of its modules, for a loss or to look at: as good as outputs."""

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from tests.rate.method_helpers import MODES, SETTING, assert_same_gradients, gradients, images, tiny_net
from util.rate import UnsupportedModuleError


class Part(nn.Module):
    penalty = None


class Keeps(nn.Module):
    """Keeps what ``keep(self, spikes, forward's other output)`` makes of the first neurons' spikes."""

    def __init__(self, keep=None):
        super().__init__()
        self.body, self.keep, self.inner = tiny_net(), keep, Part()
        self.kept, self.cleared = {}, []

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body[:3](x)
        if self.keep:
            self.keep(self, y)
        return self.body[3:](y), y


def in_list(net, y):
    net.all = []
    net.all.append(y)


def attention(net, y):
    tokens = y.flatten(0, -4).flatten(2)  # [T * B, 4, 36]
    net.map = (tokens @ tokens.transpose(1, 2) / 8).softmax(-1)


# How it is kept, what the loss reads, and the same of the spikes as an output.
KINDS = {
    "attribute": (lambda net, y: setattr(net, "y", y), lambda net: net.y.sum(), lambda y: y.sum()),
    "list": (in_list, lambda net: net.all[0].sum(), lambda y: y.sum()),
    "dict": (
        lambda net, y: net.kept.update(pair=(y * 2, None), mean=y.mean()),
        lambda net: net.kept["pair"][0].sum() + net.kept["mean"],
        lambda y: (y * 2).sum() + y.mean(),
    ),
    "list that the user clears": (
        lambda net, y: net.cleared.append(y),
        lambda net: net.cleared[-1].sum(),
        lambda y: y.sum(),
    ),
    "attribute of a part": (
        lambda net, y: setattr(net.inner, "penalty", 3 * (y.mean() - 0.1)),
        lambda net: net.inner.penalty,
        lambda y: 3 * (y.mean() - 0.1),
    ),
}


def trained(net: nn.Module, method: str, x: Tensor, mode: str, loss) -> tuple[float, dict]:
    """``loss(net, spikes)`` of each call, beside one of the outputs; two batches, the second from fresh gradients."""
    SETTING[method](net, len(x), mode)
    for _ in range(2):
        functional.reset_net(net)
        net.zero_grad()
        total = 0
        net.cleared.clear()
        for step in [x] if mode == "m" else x:
            out, y = net(step)
            total = total + out.square().sum() + loss(net, y)
        total.backward()
    return total.item(), gradients(net)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_one_step_its_gradient_is_bptt_s(kind, mode):
    keep, read, _ = KINDS[kind]
    (value, bptt), (same, rate) = (
        trained(Keeps(keep), method, images(1), mode, lambda net, y: read(net)) for method in ("bptt", "rate")
    )
    assert same == pytest.approx(value, rel=1e-12)
    assert_same_gradients(rate, bptt, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_value_and_gradient_of_an_output(kind, mode):
    keep, read, of_output = KINDS[kind]
    value, expected = trained(Keeps(), "rate", images(3), mode, lambda net, y: of_output(y))
    same, rate = trained(Keeps(keep), "rate", images(3), mode, lambda net, y: read(net))
    assert same == pytest.approx(value, rel=1e-12)
    assert_same_gradients(rate, expected, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_time_may_be_folded_into_the_batch(mode):
    net, calls = SETTING["rate"](Keeps(attention), 3, mode), []
    for step in [images(3)] if mode == "m" else images(3):
        net(step)
        calls.append(net.map)
    with torch.no_grad():
        functional.reset_net(net)
        for step, given in zip([images(3)] if mode == "m" else images(3), calls, strict=True):
            net(step)
            torch.testing.assert_close(given, net.map)
    sum(given.square().sum() for given in calls).backward()
    assert net.body.conv1.weight.grad.any()
    assert net.body.conv2.weight.grad is None or not net.body.conv2.weight.grad.any()


def test_what_is_not_the_same_for_one_step_raises_in_backward_and_only_there():
    net = SETTING["rate"](Keeps(lambda net, y: setattr(net, "steps", list(y))), 3, "m")
    net(images(3))[0].sum().backward()
    functional.reset_net(net)
    net(images(3))
    with pytest.raises(RuntimeError, match=r"no gradient of steps: .* return it, or train with BPTT"):
        net.steps[0].sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_from_forward_to_forward_is_the_spike_pass_s(mode):
    def caches(net, y):
        if getattr(net, "ones", None) is None or net.ones.shape != y.shape:
            net.ones = torch.ones(y.shape)

    net = Keeps(caches)
    for _ in range(2):
        trained(net, "rate", images(3), mode, lambda net, y: 0)
    assert not net.ones.requires_grad
    assert net.ones.shape == ((3, 3, 4, 6, 6) if mode == "m" else (3, 4, 6, 6))


class Remembers(nn.Module):
    """``forward(self, current)`` makes the first neurons' input of a current; it may read what an earlier step left."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.forward_of = tiny_net(), forward
        self.weights, self.step, self.last, self.total = nn.Parameter(torch.ones(3)), 0, 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.body.fire1(self.forward_of(self, self.body[:2](x)))
        self.step, self.last, self.total = self.step + 1, y, self.total + y.mean()
        return self.body[3:](y)


MEMORIES = {
    "spikes of the step before": (lambda net, y: y + 0.5 * net.last, "'body.fire1'"),
    "without their gradient": (lambda net, y: y + net.weights[0] * torch.as_tensor(net.last).detach(), "'body.fire1'"),
    "weights of each step": (lambda net, y: y * net.weights[net.step], "'body.fire1'"),
    "a sum with a gradient": (lambda net, y: y, "what its forward leaves in total"),
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_beside_the_neurons_is_refused_in_single_step_mode(kind):
    forward, named = MEMORIES[kind]
    net = SETTING["rate"](Remembers(forward).double(), 3, "s")
    first, second, last = images(3)
    net(first)
    net(second)
    with pytest.raises(UnsupportedModuleError, match=f"{named}.* depends on what earlier steps left"):
        net(last)


def test_a_cache_and_a_statistic_are_no_memory():
    def caches(net, y):
        net.cache = torch.ones_like(y) if getattr(net, "cache", None) is None else net.cache
        net.mean = 0.9 * getattr(net, "mean", 0.0) + y.detach().mean()

    found = [trained(Keeps(keep), "rate", images(3), "s", lambda net, y: 0) for keep in (None, caches)]
    assert found[1][0] == found[0][0]
    assert_same_gradients(found[1][1], found[0][1], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_work_in_place_on_what_an_attribute_holds_is_refused(mode):
    def adds(net, y):
        net.total += y.mean()

    net = SETTING["rate"](Keeps(adds), 2, mode)
    net.total = torch.zeros(())
    with pytest.raises(UnsupportedModuleError, match=r"in place on what its attribute 'total' holds.* new tensor"):
        net(images(2) if mode == "m" else images(2)[0])
