"""Oracle 3: the eligibility e is autograd's derivative of the firing rate by a constant added to the input.

The reference is the SpikingJelly neuron itself, run over T steps with a graph.
"""

import copy
import math
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from tests.rate.method_helpers import lif_node
from util.rate.dynamics import (
    _STEP_SURROGATES,
    Differentiated,
    NotElementwiseError,
    dynamics_of,
    learnable_parameters,
    memory_names,
)
from util.rate.eligibility import LinearCharge, NeuronRecord, NeuronState, run_steps, surrogate_slope

pytestmark = pytest.mark.quick

NEURONS = {
    "if": neuron.IFNode,
    "lif-decay-input": partial(neuron.LIFNode, tau=1.7, decay_input=True),
    "lif": partial(neuron.LIFNode, tau=1.25, decay_input=False),
}
OPTIONS = {"Sigmoid": (4.0,), "SoftSign": (3.0,), "PiecewiseQuadratic": (0.7,), "S2NN": (2.0, 0.5)}
SURROGATES = {cls.__name__: partial(cls, *OPTIONS.get(cls.__name__, ())) for cls in sorted(_STEP_SURROGATES, key=str)}
if not hasattr(neuron, "SimpleBaseNode"):
    del SURROGATES["NonzeroSignLogAbs"]  # whose backward raises in SpikingJelly 0.0.0.0.14
RESETS = {"soft": None, "hard-0": 0.0, "hard--0.3": -0.3}
RULES = {"closed-form": dynamics_of, "differentiated": Differentiated}


def currents(steps: int) -> Tensor:
    """[T, 40] input currents that make most neurons fire at some steps and none at all."""
    generator = torch.Generator().manual_seed(steps)
    return 0.5 + 0.9 * torch.randn((steps, 40), generator=generator, dtype=torch.float64)


def initial_potential() -> Tensor:
    return 0.6 * torch.randn(40, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


def by_autograd(node, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes [T, 40], potential after the last step, and d (mean over t of s[t]) / dc with c added to every x[t]."""
    node = copy.deepcopy(node)
    node.v = v.clone()
    c = torch.zeros_like(x[0], requires_grad=True)
    spikes = torch.stack([node(step + c) for step in x])
    (e,) = torch.autograd.grad(spikes.mean(0).sum(), c)
    return spikes.detach(), node.v.detach(), e


def by_rule(rule, x: Tensor, *memory: Tensor, parameters: int = 0) -> tuple[Tensor, NeuronRecord]:
    """Spikes [T, 40] and the record of all steps."""
    record, spikes = run_steps(rule, NeuronRecord(NeuronState.start(memory, parameters)), x)
    return spikes, record


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("v_reset", RESETS.values(), ids=RESETS)
def test_a_step_changes_nothing_that_it_is_given(v_reset, rule):
    step = RULES[rule](neuron.ParametricLIFNode(1.7, v_reset=v_reset).double()).step
    state, *_ = step(NeuronState.start((initial_potential(),), 1), currents(2)[0])  # from which on slopes are tensors
    before, x = copy.deepcopy(state), currents(2)[1]
    step(state, x)
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    assert torch.equal(x, currents(2)[1])


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "not-detached"])
@pytest.mark.parametrize("v_reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_eligibility_is_the_rate_s_derivative_by_a_constant_input(kind, v_reset, detach_reset):
    """By the closed form, and by a step differentiated anew."""
    for name, make_surrogate in SURROGATES.items():
        node = NEURONS[kind](
            v_threshold=0.8, v_reset=v_reset, detach_reset=detach_reset, surrogate_function=make_surrogate()
        )
        for steps in (1, 2, 7) if name == "Sigmoid" else (5,):
            x, v = currents(steps), initial_potential()
            spikes, v_after, e = by_autograd(node, x, v)
            assert 0 < spikes.mean() < 1, name
            for make_rule in (dynamics_of, Differentiated):
                found_spikes, record = by_rule(make_rule(copy.deepcopy(node)), x, v)
                close(found_spikes, spikes)
                close(record.state.memory[0], v_after)
                close(record.sums.spikes / steps, spikes.mean(0))
                close(record.sums.slopes[0] / steps, e)


def test_detaching_the_reset_changes_the_eligibility():
    """Else the two halves of the test above could be one and the same."""
    for v_reset in RESETS.values():
        e = [
            by_autograd(lif_node(v_reset=v_reset, detach_reset=detach), currents(4), initial_potential())[2]
            for detach in (True, False)
        ]
        assert (e[0] - e[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", NEURONS)
def test_if_and_lif_have_the_closed_form(kind):
    assert isinstance(dynamics_of(NEURONS[kind]()), LinearCharge)


@pytest.mark.parametrize("name", SURROGATES)
def test_a_step_surrogate_is_a_step(name):
    distance = torch.tensor([-3.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 3.0], dtype=torch.float64)
    assert torch.equal(SURROGATES[name]()(distance), (distance >= 0).double())


class CountsSpikes(torch.autograd.Function):
    """A user's surrogate: up to three spikes in a step."""

    @staticmethod
    def forward(ctx, distance: Tensor) -> Tensor:
        ctx.save_for_backward(distance)
        return (distance + 1).floor().clamp(0, 3)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (distance,) = ctx.saved_tensors
        return grad * (distance.abs() < 2)


def test_a_surrogate_that_is_no_step_keeps_its_values_and_derivative():
    node = neuron.IFNode(surrogate_function=CountsSpikes.apply, v_reset=None)
    spikes, v, e = by_autograd(node, 2 * currents(5), initial_potential())
    found, record = by_rule(dynamics_of(copy.deepcopy(node)), 2 * currents(5), initial_potential())
    assert spikes.max() > 1
    close(found, spikes)
    close(record.state.memory[0], v)
    close(record.sums.slopes[0] / 5, e)


@pytest.mark.parametrize(
    ("overrides", "form"),
    [({}, LinearCharge), ({"forward": lambda self, x: self.multi_step_forward(x) * 2}, LinearCharge)]
    + [
        ({name: lambda *args: None}, Differentiated)
        for name in ("single_step_forward", "neuronal_charge", "neuronal_fire", "neuronal_reset")
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else x.__name__,
)
def test_a_subclass_has_the_closed_form_unless_it_may_change_the_step(overrides, form):
    assert isinstance(dynamics_of(type("Mine", (neuron.LIFNode,), overrides)()), form)


WITHOUT_CLOSED_FORM = {
    "QIFNode": {"detach_reset": False},
    "EIFNode": {"detach_reset": False},
    "IzhikevichNode": {"detach_reset": False},
    "SimpleLIFNode": {"tau": 1.7, "decay_input": False},
    "CUBALIFNode": {},
}


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
def test_eligibility_of_a_neuron_without_closed_form(name):
    """Non-linear charges, and neurons with a second state variable."""
    if not hasattr(neuron, name):
        pytest.skip(f"this SpikingJelly has no {name}")
    node = getattr(neuron, name)(surrogate_function=surrogate.ATan(), **WITHOUT_CLOSED_FORM[name])
    reference = copy.deepcopy(node)
    x = 1.5 * currents(5).abs()
    c = torch.zeros_like(x[0], requires_grad=True)
    spikes = torch.stack([reference(step + c) for step in x])
    (e,) = torch.autograd.grad(spikes.mean(0).sum(), c)

    memory = [torch.full_like(x[0], getattr(node, memory_name)) for memory_name in memory_names(node)]
    found_spikes, record = by_rule(dynamics_of(node), x, *memory)
    assert 0 < spikes.mean() < 1
    close(found_spikes, spikes.detach())
    close(record.sums.slopes[0] / len(x), e)
    for memory_name, value in zip(memory_names(node), record.state.memory, strict=True):
        close(value, getattr(reference, memory_name).detach())


class LearnsItsThreshold(neuron.LIFNode):
    """A user's neuron: a threshold for each of 40 units, and one scale for all of them."""

    def __init__(self, **options):
        super().__init__(tau=1.7, surrogate_function=surrogate.ATan(), **options)
        self.threshold = nn.Parameter(torch.linspace(0.6, 1.2, 40, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))

    def single_step_forward(self, x):
        h = self.v + (self.scale * x - self.v) / self.tau
        s = self.surrogate_function(h - self.threshold)
        self.v = h - self.threshold * s
        return s


WITH_PARAMETERS = {
    **{
        f"parametric-{'decay' if decay else 'no-decay'}-{reset}-{'detached' if detach else 'not-detached'}": partial(
            neuron.ParametricLIFNode, 1.7, decay, 0.8, RESETS[reset], detach_reset=detach
        )
        for decay in (True, False)
        for reset in RESETS
        for detach in (True, False)
    },
    "klif": partial(neuron.KLIFNode, tau=1.7, v_threshold=0.8),
    "klif-scaled-reset": partial(neuron.KLIFNode, True, 1.7, v_threshold=0.8, detach_reset=True),
    "own": LearnsItsThreshold,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_the_rate_s_derivative_by_a_neuron_s_own_parameters(name, rule):
    """Of weighted sums over the units, so that each unit's own derivative counts; c's stays right beside them."""
    for steps in (1, 2, 5, 10):
        node = WITH_PARAMETERS[name]().double()
        x, v = currents(steps), initial_potential()
        reference = copy.deepcopy(node)
        reference.v = v.clone()
        c = torch.zeros_like(x[0], requires_grad=True)
        spikes = torch.stack([reference.single_step_forward(step + c) for step in x])
        weights = torch.linspace(-1, 2, 40, dtype=torch.float64)
        expected = torch.autograd.grad((spikes.mean(0) * weights).sum(), [c, *reference.parameters()])

        found, record = by_rule(RULES[rule](node), x, v, parameters=len(expected) - 1)
        close(found, spikes.detach())
        for slope_sum, derivative in zip(record.sums.slopes, expected, strict=True):
            assert derivative.norm() > 1e-3
            close((slope_sum / steps * weights).sum_to_size(derivative.shape), derivative)
        assert [type(p) for p in node.parameters()] == [nn.Parameter] * (len(expected) - 1)


def test_parametric_lif_has_the_closed_form_and_frozen_parameters_cost_nothing():
    node = neuron.ParametricLIFNode()
    assert dynamics_of(node).by_parameter is not None
    node.w.requires_grad_(False)
    assert isinstance(dynamics_of(node), LinearCharge)
    assert dynamics_of(node).by_parameter is None
    assert learnable_parameters(node) == []


class Lateral(neuron.IFNode):
    """Each unit is inhibited by what all units together have fired."""

    def single_step_forward(self, x):
        h = self.v + x
        s = self.surrogate_function(h - 1)
        self.v = h * (1 - s) - 0.1 * s.sum()
        return s


class ScalesByItsMeanParameter(neuron.IFNode):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.linspace(0.5, 1.5, 40, dtype=torch.float64))

    def single_step_forward(self, x):
        return super().single_step_forward(x * self.gains.mean())


class ShapeDoesNotBroadcast(neuron.IFNode):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.ones(7, dtype=torch.float64))


@pytest.mark.parametrize("kind", [Lateral, ScalesByItsMeanParameter, ShapeDoesNotBroadcast])
def test_a_neuron_that_does_not_act_on_each_element_alone_is_noticed(kind):
    rule, x = Differentiated(kind(), check=True), currents(3)
    with pytest.raises(NotElementwiseError):
        by_rule(rule, x, torch.zeros_like(x[0]), parameters=len(learnable_parameters(rule.module)))


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogate_slope_is_what_backward_multiplies_with(name):
    function = SURROGATES[name]()
    distance = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(function(distance).sum(), distance)
    close(surrogate_slope(function, distance.detach()), expected)


def sg(distance: float, alpha: float = 4.0) -> float:
    """The method's surrogate derivative a * p * (1 - p), p = sigmoid(a * (h - v_th))."""
    p = 1 / (1 + math.exp(-alpha * distance))
    return alpha * p * (1 - p)


# Inputs 0.6, 1.1, 0.4 to the method's LIF: decay 0.2, v_th = 1, v[0] = 0.
# h[1] = 0.6 stays below the threshold, h[2] = 0.2 * 0.6 + 1.1 = 1.22 fires, h[3] = 0.2 * v[2] + 0.4:
# soft reset v[2] = 0.22, hard reset to 0 v[2] = 0.
BELOW, FIRED = sg(-0.4), sg(0.22)
HAND_COMPUTED = {
    # rho = 1, 1 + 0.2, 1 + 0.2 * 1.2
    "soft-detached": (None, True, 0.444, (1, 1.2, 1.24)),
    # rho[t] = 1 + rho[t-1] * 0.2 * (1 - sg(h[t-1]))
    "soft-not-detached": (
        None,
        False,
        0.444,
        (1, 1 + 0.2 * (1 - BELOW), 1 + (1 + 0.2 * (1 - BELOW)) * 0.2 * (1 - FIRED)),
    ),
    # rho[2] = 1 + 0.2 * (1 - 0), rho[3] = 1 + 1.2 * 0.2 * (1 - 1)
    "hard-detached": (0.0, True, 0.4, (1, 1.2, 1)),
    # rho[2] = 1 + 0.2 * ((1 - 0) - 0.6 sg(0.6)), rho[3] = 1 + rho[2] * 0.2 * ((1 - 1) - 1.22 sg(1.22))
    "hard-not-detached": (
        0.0,
        False,
        0.4,
        (1, 1 + 0.2 * (1 - 0.6 * BELOW), 1 + (1 + 0.2 * (1 - 0.6 * BELOW)) * 0.2 * -1.22 * FIRED),
    ),
}


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_three_steps_worked_out_by_hand(name):
    v_reset, detach_reset, h3, rho = HAND_COMPUTED[name]
    node = lif_node(v_reset=v_reset, detach_reset=detach_reset)
    x = torch.tensor([[0.6], [1.1], [0.4]], dtype=torch.float64)
    spikes, record = by_rule(dynamics_of(node), x, torch.zeros(1, dtype=torch.float64))
    assert spikes.flatten().tolist() == [0, 1, 0]
    assert record.state.memory[0].item() == pytest.approx(h3, rel=1e-12)
    slopes = (BELOW, FIRED, sg(h3 - 1))
    e = sum(slope * r for slope, r in zip(slopes, rho, strict=True)) / 3
    assert (record.sums.slopes[0] / 3).item() == pytest.approx(e, rel=1e-12)


def test_numbers_of_the_first_hand_computed_trace():
    """sg(0.6) = 0.559055, sg(1.22) = 0.828898, sg(0.444) = 0.352348; e = (0.559055 + 0.994678 + 0.436912) / 3."""
    x = torch.tensor([[0.6], [1.1], [0.4]], dtype=torch.float64)
    _, record = by_rule(dynamics_of(lif_node()), x, torch.zeros(1, dtype=torch.float64))
    assert (record.sums.slopes[0] / 3).item() == pytest.approx(0.663548, abs=1e-6)


def test_a_threshold_other_than_1_scales_the_soft_reset_that_is_not_detached():
    """v_th = 0.5, decay 0.2, x = 0.7, 0.3: h = 0.7 (fires, v = 0.2), 0.34; rho[2] = 1 + 0.2 * (1 - 0.5 sg(0.7))."""
    node = lif_node(v_threshold=0.5, detach_reset=False)
    x = torch.tensor([[0.7], [0.3]], dtype=torch.float64)
    spikes, record = by_rule(dynamics_of(node), x, torch.zeros(1, dtype=torch.float64))
    assert spikes.flatten().tolist() == [1, 0]
    e = (sg(0.2) + sg(-0.16) * (1 + 0.2 * (1 - 0.5 * sg(0.2)))) / 2
    assert (record.sums.slopes[0] / 2).item() == pytest.approx(e, rel=1e-12)


def test_hard_reset_to_another_potential_by_hand():
    """IF, v_th = 1, v_reset = -0.3, not detached, v[0] = -0.3, x = 1.5, 0.9.

    h[1] = 1.2 fires, v[1] = -0.3, h[2] = 0.6; dh[2]/dh[1] = (1 - 1) + (-0.3 - 1.2) * sg(1.2).
    """
    node = neuron.IFNode(v_reset=-0.3, surrogate_function=surrogate.Sigmoid(4.0), detach_reset=False)
    x = torch.tensor([[1.5], [0.9]], dtype=torch.float64)
    spikes, record = by_rule(dynamics_of(node), x, torch.full((1,), -0.3, dtype=torch.float64))
    assert spikes.flatten().tolist() == [1, 0]
    e = (sg(0.2) + sg(-0.4) * (1 - 1.5 * sg(0.2))) / 2
    assert (record.sums.slopes[0] / 2).item() == pytest.approx(e, rel=1e-12)


def test_decayed_input_has_the_gain_of_one_over_tau_by_hand():
    """LIF, tau = 2, input decayed, soft reset: h[1] = 1.6 / 2 = 0.8, h[2] = 0.4 + 0.9 = 1.3; rho = 0.5, 0.5 + 0.25."""
    node = lif_node(tau=2.0, decay_input=True)
    x = torch.tensor([[1.6], [1.8]], dtype=torch.float64)
    spikes, record = by_rule(dynamics_of(node), x, torch.zeros(1, dtype=torch.float64))
    assert spikes.flatten().tolist() == [0, 1]
    e = (sg(-0.2) * 0.5 + sg(0.3) * 0.75) / 2
    assert (record.sums.slopes[0] / 2).item() == pytest.approx(e, rel=1e-12)


@pytest.mark.parametrize("spiking", [True, False], ids=["spiking", "not-spiking"])
def test_a_surrogate_s_own_output_is_the_neuron_s_output(spiking):
    """SpikingJelly's set_spiking_mode(False) makes a neuron put out the primitive function instead of spikes."""
    node = lif_node(surrogate_function=surrogate.Sigmoid(4.0, spiking=spiking))
    x, v = currents(3), initial_potential()
    expected, _, e = by_autograd(node, x, v)
    found, record = by_rule(dynamics_of(node), x, v)
    close(found, expected)
    close(record.sums.slopes[0] / 3, e)
