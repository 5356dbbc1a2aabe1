"""Tensors that a forward keeps in attributes of its modules, for a loss or to look at: as good as outputs."""

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from tests.rate.method_helpers import MODES, SETTING, assert_same_gradients, gradients, images, tiny_net
from util.rate.problem import NotServedError
from util.util import rate_model_setting


class Keeps(nn.Module):
    """Keeps what ``keep(self, spikes)`` makes of the first neurons' spikes; ``before`` may change their input."""

    def __init__(self, keep=None, before=None):
        super().__init__()
        self.body, self.keep, self.before, self.inner = tiny_net(), keep, before, nn.Module()
        self.weights, self.kept, self.all = nn.Parameter(torch.ones(3, dtype=torch.float64)), {}, []
        self.step, self.last, self.total = 0, 0.0, torch.zeros((), dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body[:2](x)
        y = self.body[2](self.before(self, y) if self.before else y)
        if self.keep:
            self.keep(self, y)
        self.step, self.last = self.step + 1, y
        return self.body[3:](y), y


def attention(y):
    tokens = y.flatten(0, -4).flatten(2)  # [T * B, 4, 36]
    return (tokens @ tokens.transpose(1, 2) / 8).softmax(-1)


def adds(net, y):
    net.total += y.mean()


# How it is kept, what the loss reads, and the same of the spikes as an output.
KINDS = {
    "attribute": (lambda net, y: setattr(net, "y", y), lambda net: net.y.sum(), lambda y: y.sum()),
    "list": (lambda net, y: net.all.append(y), lambda net: net.all[-1].sum(), lambda y: y.sum()),
    "list of rows": (lambda net, y: setattr(net, "y", list(y)), lambda net: net.y[0].sum(), lambda y: y[0].sum()),
    "dict": (lambda net, y: net.kept.update(pair=(y * 2, None), mean=y.mean()),
             lambda net: net.kept["pair"][0].sum() + net.kept["mean"], lambda y: (y * 2).sum() + y.mean()),
    "attribute of a part": (lambda net, y: setattr(net.inner, "penalty", 3 * (y.mean() - 0.1)),
                            lambda net: net.inner.penalty, lambda y: 3 * (y.mean() - 0.1)),
    "attention, time folded into the batch": (lambda net, y: setattr(net, "map", attention(y)),
                                              lambda net: net.map.square().sum(), None),
}  # fmt: skip


def trained(net: nn.Module, method: str, x: Tensor, mode: str, loss, **options) -> tuple[float, dict]:
    """``loss(net, spikes)`` of each call, beside one of the outputs; two batches, the second from fresh gradients."""
    SETTING[method](net, len(x), mode, **options)
    for _ in range(2):
        functional.reset_net(net)
        net.zero_grad()
        net.step, net.last, net.total, total = 0, 0.0, torch.zeros_like(net.total), 0
        net.all.clear()
        for step in [x] if mode == "m" else x:
            out, y = net(step)
            total = total + out.square().sum() + loss(net, y)
        total.backward()
    return total.item(), gradients(net)


def assert_trains_as_bptt(net, x, mode, loss):
    (value, bptt), (same, rate) = (
        trained(Keeps(*net), method, x, mode, loss, **options)
        for method, options in (("bptt", {}), ("rate", {"windows": len(x)}))
    )
    assert same == pytest.approx(value, rel=1e-12)
    assert_same_gradients(rate, bptt, 1e-9)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_window_for_each_step_its_gradient_is_bptt_s(kind, mode, steps):
    keep, read, _ = KINDS[kind]
    assert_trains_as_bptt((keep,), images(steps), mode, lambda net, y: read(net))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind][2]])
def test_it_has_the_value_and_gradient_of_an_output(kind, mode):
    keep, read, of_output = KINDS[kind]
    value, expected = trained(Keeps(), "rate", images(3), mode, lambda net, y: of_output(y))
    same, rate = trained(Keeps(keep), "rate", images(3), mode, lambda net, y: read(net))
    assert same == pytest.approx(value, rel=1e-12)
    assert_same_gradients(rate, expected, 1e-10)


SUMS = {"in place": adds, "anew": lambda net, y: setattr(net, "total", net.total + y.mean())}


def last(steps):
    return lambda net, y: net.total if net.step == steps else 0


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", SUMS)
def test_with_a_window_for_each_step_a_sum_over_calls_has_bptt_s_gradient(kind, mode, steps):
    assert_trains_as_bptt((SUMS[kind],), images(steps), mode, last(steps if mode == "s" else 1))


@pytest.mark.parametrize("kind", SUMS)
def test_a_sum_over_calls_is_refused_in_single_step_mode(kind):
    with pytest.raises(NotServedError, match=r"at step 3 .*use step mode 'm'"):
        trained(Keeps(SUMS[kind]), "rate", images(3), "s", last(3))


MEMORIES = {
    "spikes of the step before": lambda net, y: y + 0.5 * net.last,
    "without their gradient": lambda net, y: y + net.weights[0] * torch.as_tensor(net.last).detach(),
    "weights of each step": lambda net, y: y * net.weights[net.step],
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_beside_the_neurons_is_refused_in_single_step_mode(kind):
    net = rate_model_setting(Keeps(None, MEMORIES[kind]), 3, "s")
    message = "'body.fire1'.* depends on what earlier steps left|at step 2 the network's forward"
    with pytest.raises(NotServedError, match=rf"({message}).*step mode 'm'"):
        [net(step) for step in images(3)]


def test_a_cache_and_a_statistic_are_no_memory():
    def caches(net, y):
        net.cache = torch.ones_like(y) if getattr(net, "cache", None) is None else net.cache
        net.mean = 0.9 * getattr(net, "mean", 0.0) + y.detach().mean()

    found = [trained(Keeps(keep), "rate", images(3), "s", lambda net, y: 0) for keep in (None, caches)]
    assert found[1][0] == found[0][0]
    assert_same_gradients(found[1][1], found[0][1], 1e-12)
