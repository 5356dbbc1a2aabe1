"""A neuron's membrane potential, read by its surroundings: its value, and the gradient of the recursion."""

import copy
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from tests.rate.method_helpers import (
    MODES,
    SETTING,
    assert_same_gradients,
    attached,
    gradients,
    images,
    lif_node,
    tiny_net,
)
from util.rate import UnsupportedModuleError, detach, rate_model_setting
from util.rate.problem import NotServedError

NEURONS = {
    "soft": lif_node,
    "soft, not detached": partial(lif_node, detach_reset=False),
    "hard": partial(lif_node, v_reset=-0.2),
    "hard, not detached": partial(lif_node, v_reset=-0.2, detach_reset=False),
    "decayed input": partial(lif_node, decay_input=True, tau=2.0),
    "never fires": partial(lif_node, v_threshold=float("inf"), v_reset=0.0),
    "learns its time constant": partial(neuron.ParametricLIFNode, v_threshold=0.4, detach_reset=True),
    "without closed form": partial(neuron.KLIFNode, v_threshold=0.4, detach_reset=True),
}


class ReadOut(nn.Module):
    """``read`` says what the network puts out of its neurons, behind the spikes of the last."""

    def __init__(self, make_neuron=lif_node, read=lambda net, s: s, hidden: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(layer.Linear(5, 6), lif_node()) if hidden else nn.Identity()
        self.fc, self.fire = layer.Linear(6 if hidden else 5, 4), make_neuron()
        self.head, self.read = nn.Linear(4, 3), read
        self.double()

    def forward(self, x: Tensor):
        return self.read(self, self.fire(self.fc(self.first(x))))


def inputs(time_step: int, stationary: bool = False) -> Tensor:
    """[T, 3, 5] currents that make about half of the neurons fire."""
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(1 if stationary else time_step, 3, 5, generator=generator, dtype=torch.float64)
    return x.expand(time_step, 3, 5)


def trained(net: nn.Module, method: str, x: Tensor, mode: str, loss, **options) -> tuple[float, dict]:
    """The loss, a function of the network and of its outputs at every step, and its gradients."""
    net = attached(net, method, len(x), mode) if not options else rate_model_setting(net, len(x), mode, **options)
    value = loss(net, (net(step) for step in ([x] if mode == "m" else x)))
    value.backward()
    return value.item(), gradients(net)


def potentials(net: nn.Module, outs) -> Tensor:
    """A loss of the potential read after each call, with a weight of its own for each step and value."""
    total = 0.0
    for t, _ in enumerate(outs):
        total = total + (net.fire.v.square() * torch.linspace(1, 2 + t, 4, dtype=torch.float64)).sum()
    return total


def potentials_put_out(net: nn.Module, outs) -> Tensor:
    """The same of a network that puts out its potential."""
    return sum((out.square() * torch.linspace(1, 2 + t, 4, dtype=torch.float64)).sum() for t, out in enumerate(outs))


def features(net: nn.Module, outs) -> Tensor:
    return sum(outs).sin().sum()


READINGS = {
    "after the forward": (lambda net, s: s, potentials),
    "as output": (lambda net, s: net.fire.v, potentials_put_out),
    "as one of the outputs": (lambda net, s: (s, net.fire.v), lambda net, outs: features(net, (v for _, v in outs))),
    "as a feature": (lambda net, s: net.head(net.fire.v), features),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("reading", READINGS)
def test_at_one_step_the_potential_has_bptt_s_gradient(reading, kind, mode):
    read, loss = READINGS[reading]
    net = ReadOut(NEURONS[kind], read, hidden=True)
    bptt, rate = (trained(net, method, inputs(1), mode, loss) for method in ("bptt", "rate"))
    assert rate[0] == pytest.approx(bptt[0], rel=1e-12)
    assert_same_gradients(rate[1], bptt[1], 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("reading", ["after the forward", "as output"])
def test_behind_one_layer_with_a_constant_input_the_gradient_is_bptt_s_at_every_step(reading, kind, mode):
    read, loss = READINGS[reading]
    net, x = ReadOut(NEURONS[kind], read), inputs(5, stationary=True)
    bptt, rate = (trained(net, method, x, mode, loss) for method in ("bptt", "rate"))
    assert rate[0] == pytest.approx(bptt[0], rel=1e-12)
    assert_same_gradients(rate[1], bptt[1], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_what_forward_makes_of_the_potential_has_the_gradient_of_the_mean_over_steps_or_of_the_last(mode):
    """Single-step: every step's output is one of the T that are averaged. Multi-step: forward sees the last alone."""
    net, x = ReadOut(read=lambda net, s: net.head(net.fire.v)), inputs(5, stationary=True)
    found = [trained(net, method, x, mode, features) for method in ("bptt", "rate")]
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    assert_same_gradients(found[1][1], found[0][1], 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode):
    net, x = ReadOut(partial(lif_node, v_reset=0.0)), inputs(3)
    plain, compiled = (trained(copy.deepcopy(net), "rate", x, mode, potentials, compiled=c) for c in (False, True))
    assert_same_gradients(compiled[1], plain[1], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_of_outputs_and_of_potentials_has_the_sum_of_their_gradients(mode):
    def of_outputs(net, outs):
        return sum(s.sum() for s in outs)

    def of_both(net, outs):
        outs = list(outs)
        return of_outputs(net, outs) + net.fire.v.square().sum()

    net, x = ReadOut(hidden=True), inputs(3)
    potential = trained(net, "rate", x, mode, lambda net, outs: [list(outs), net.fire.v.square().sum()][1])[1]
    output, both = (trained(net, "rate", x, mode, loss)[1] for loss in (of_outputs, of_both))
    used = [name for name, grad in both.items() if grad is not None]
    assert_same_gradients({n: both[n] for n in used}, {n: output[n] + potential[n] for n in used}, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_reading_it_changes_nothing_in_the_windows_that_follow(mode):
    found = []
    for method in ("bptt", "rate"):
        net, seen = attached(ReadOut(), method, 2, mode), []
        for continue_with in (functional.reset_net, functional.detach_net, functional.detach_net):
            continue_with(net)
            outs = [net(inputs(2))] if mode == "m" else [net(step) for step in inputs(2)]
            (sum(out.sum() for out in outs) + net.fire.v.sum()).backward()
            seen.append(net.fire.v.detach().clone())
        functional.reset_net(net)
        found.append([*seen, torch.tensor(net.fire.v)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_without_gradients_and_after_detaching_it_is_a_plain_tensor(mode):
    net = attached(ReadOut(), "rate", 1, mode)
    net(inputs(1) if mode == "m" else inputs(1)[0])
    assert net.fire.v.requires_grad
    with torch.no_grad():
        assert not net.fire.v.requires_grad
    assert not detach(net).fire.v.requires_grad
    assert type(vars(net.fire)["_memories"]) is dict


class Feeds(ReadOut):
    """Feeds the potential of the step before back into the neuron."""

    def forward(self, x: Tensor):
        return self.fire(self.fc(x) + 0.5 * self.fire.v)


LEAST = inputs(2)[:, 0, 0].min()


class ReadsAtSomeSteps(ReadOut):
    def forward(self, x: Tensor):
        s = self.fire(self.fc(x))
        return s + self.fire.v if x[0, 0] > LEAST else s


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Feeds, r"'fire' .*depends on what earlier steps left \(fire\.v, read before the neuron has run\)"),
        (ReadsAtSomeSteps, r"at step 2 .*fire\.v"),
    ],
)
def test_in_step_mode_s_a_reading_without_a_right_gradient_is_refused(kind, reason):
    net = attached(kind(), "rate", 2, "s")
    with pytest.raises(NotServedError, match=reason):
        [net(step) for step in inputs(2)]


def test_a_potential_is_not_there_before_the_last_step():
    net = attached(ReadOut(), "rate", 2, "s")
    net(inputs(2)[0])
    with pytest.raises(RuntimeError, match="backward after 1 of 2 steps"):
        net.fire.v.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_potentials_of_all_steps_are_refused_with_the_remedy_also_when_asked_for_later(mode):
    net = attached(tiny_net(partial(lif_node, store_v_seq=True)), "bptt", 2, mode)
    with pytest.raises(UnsupportedModuleError, match=r"'fire1'.*store_v_seq=False"):
        rate_model_setting(net, 2, mode)
    net = attached(tiny_net(), "rate", 2, mode)
    net.fire2.store_v_seq = True
    with pytest.raises(UnsupportedModuleError, match=r"'fire2'.*store_v_seq=False"):
        net(images(2) if mode == "m" else images(2)[0])


class Begins(ReadOut):
    """Its neuron begins at a parameter, which forward sets, or a user."""

    def __init__(self, in_forward: bool):
        super().__init__()
        self.start, self.in_forward = nn.Parameter(torch.full((4,), 0.3, dtype=torch.float64)), in_forward

    def begin(self) -> None:
        self.fire.v = self.start.expand(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.in_forward:
            self.begin()
        return super().forward(x)


@pytest.mark.parametrize(("in_forward", "mode"), [(True, "m"), (False, "m"), (False, "s")])
def test_a_potential_that_begins_at_what_is_trained_has_bptt_s_gradient(in_forward, mode):
    def loss(net, outs):
        if not in_forward:
            net.begin()
        return features(net, outs)

    bptt = trained(Begins(in_forward), "bptt", inputs(3), mode, loss)
    rate = trained(Begins(in_forward), "rate", inputs(3), mode, loss, windows=3)
    assert_same_gradients(rate[1], bptt[1], 1e-9)


def test_in_step_mode_m_forward_may_read_the_potential_before_the_neuron_has_run():
    bptt, rate = (trained(Feeds(), method, inputs(1), "m", features) for method in ("bptt", "rate"))
    assert_same_gradients(rate[1], bptt[1], 1e-9)


def halved(net):
    net.fire.v = 0.5 * net.fire.v.detach()


def evaluated(net):
    with torch.no_grad():
        net(inputs(1)[0])


BETWEEN_STEPS = {
    "a number": lambda net: setattr(net.fire, "v", 0.25),
    "a tensor": halved,
    "detach_net": functional.detach_net,
    "a forward without gradients": evaluated,
}


@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("what", BETWEEN_STEPS)
def test_what_is_set_between_two_steps_of_a_window_counts_as_a_constant(what, kind):
    """Behind one layer with a constant input, where the gradient is BPTT's at every step."""

    def loss(net, outs):
        total = next(outs) + next(outs)
        BETWEEN_STEPS[what](net)
        return (total + sum(outs)).sin().sum() + net.fire.v.square().sum()

    net, x = ReadOut(NEURONS[kind]), inputs(5, stationary=True)
    bptt, rate = (trained(net, method, x, "s", loss) for method in ("bptt", "rate"))
    assert rate[0] == pytest.approx(bptt[0], rel=1e-12)
    assert_same_gradients(rate[1], bptt[1], 1e-9)


def test_what_is_set_between_two_steps_and_needs_a_gradient_is_refused():
    net = attached(ReadOut(), "rate", 2, "s")
    net(inputs(2)[0])
    net.fire.v = 0.5 * net.fire.v
    with pytest.raises(UnsupportedModuleError, match=r"'fire' .*its v is set .* to what needs a gradient"):
        net(inputs(2)[1])


def test_a_potential_that_forward_sets_is_afterwards_that_of_the_spike_pass():
    found = []
    for method in ("bptt", "rate"):
        net = ReadOut(read=lambda net, s: net.head(net.fire.v))
        net.fc.register_forward_pre_hook(lambda module, args, net=net: setattr(net.fire, "v", 0.0))
        SETTING[method](net, 1, "m")(inputs(1)).square().sum().backward()
        found.append((gradients(net), net.fire.v.detach()))
    assert_same_gradients(found[1][0], found[0][0], 1e-9)
    torch.testing.assert_close(found[1][1], found[0][1])
