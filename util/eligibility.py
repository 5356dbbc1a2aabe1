"""One time step of a neuron layer together with the derivative of its firing rate: the eligibility.

`LinearCharge` is the closed form of SpikingJelly's IF and LIF neurons; `Differentiated` serves any other elementwise
neuron by differentiating each of its steps. Both map (state, input) to (state, spikes) and change nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from spikingjelly.activation_based import base, neuron, surrogate
from torch import Tensor


@dataclass(frozen=True)
class NeuronState:
    """What a neuron layer carries from one step to the next within a window of T steps.

    c is a constant added to the input at every step of the window. Every tensor has the shape of one step's input; a
    number stands for a tensor that is the same everywhere.

    Attributes:
        memory: the neuron's state variables after the step; the membrane potential v comes first.
        memory_slope: d memory / d c.
        spike_sum: sum of the spikes s[t] so far.
        slope_sum: sum of d s[t] / d c so far.
    """

    memory: tuple[Tensor, ...]
    memory_slope: tuple[Tensor | float, ...]
    spike_sum: Tensor | float = 0.0
    slope_sum: Tensor | float = 0.0

    @classmethod
    def start(cls, memory: tuple[Tensor, ...]) -> "NeuronState":
        """The state before the first step of a window: what happened earlier does not depend on c."""
        return cls(memory, (0.0,) * len(memory))


@dataclass(frozen=True)
class LinearCharge:
    """Integrate-and-fire neurons whose charge is linear:

        h[t]   = charge(v[t-1], x[t]) = decay * v[t-1] + gain * x[t] + a constant
        rho[t] = dh[t]/dc = gain + decay * dv[t-1]/dc                     (rho[1] = gain)
        ds[t]/dc = sg(h[t]) * rho[t],   dv[t]/dc = dv[t]/dh[t] * rho[t]

    The eligibility e = mean over t of ds[t]/dc; tests/test_eligibility.py holds it against autograd for each reset.
    """

    decay: float
    gain: float
    charge: Callable[[Tensor, Tensor], Tensor]
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate_function: Callable[[Tensor], Tensor] = field(repr=False)

    def step(self, state: NeuronState, x: Tensor) -> tuple[NeuronState, Tensor]:
        """``x``: one step's input current. Returns the state after the step and the spikes, both of x's shape."""
        (v,), (v_slope,) = state.memory, state.memory_slope
        h = self.charge(v, x)
        distance = h - self.v_threshold
        fires = distance >= 0
        s = fires.to(h.dtype)
        sg = surrogate_slope(self.surrogate_function, distance)
        rho = self.gain + self.decay * v_slope
        v = h - self.v_threshold * s if self.v_reset is None else h.masked_fill(fires, self.v_reset)
        after = NeuronState((v,), (self._reset_slope(h, s, sg) * rho,), state.spike_sum + s, state.slope_sum + sg * rho)
        return after, s

    def _reset_slope(self, h: Tensor, s: Tensor, sg: Tensor) -> Tensor | float:
        """dv[t]/dh[t]; ``sg`` = ds[t]/dh[t] enters where the reset is not detached."""
        if self.v_reset is None:
            return 1.0 if self.detach_reset else 1 - self.v_threshold * sg
        return 1 - s if self.detach_reset else (1 - s) + (self.v_reset - h) * sg


@dataclass(frozen=True)
class Differentiated:
    """Any neuron whose step acts on each element alone: autograd gives the derivatives of one step at a time.

    For such a neuron the gradient of the sum of an output is its elementwise derivative, so one step's graph of one
    layer is all that ever exists.
    """

    module: base.MemoryModule

    def step(self, state: NeuronState, x: Tensor) -> tuple[NeuronState, Tensor]:
        """As `LinearCharge.step`; leaves the module's own state variables as the step made them."""
        with torch.enable_grad():
            sources = [t.detach().requires_grad_() for t in (x, *state.memory)]
            for name, value in zip(memory_names(self.module), sources[1:], strict=True):
                setattr(self.module, name, value)
            s = self.module.single_step_forward(sources[0])
            results = [s, *(getattr(self.module, name) for name in memory_names(self.module))]
            slopes = [self._slope(result, sources, (1.0, *state.memory_slope)) for result in results]
        memory = tuple(r.detach() for r in results[1:])
        s = s.detach()
        return NeuronState(memory, tuple(slopes[1:]), state.spike_sum + s, state.slope_sum + slopes[0]), s

    @staticmethod
    def _slope(result: Tensor, sources: list[Tensor], source_slopes: tuple[Tensor | float, ...]) -> Tensor:
        """d result / d c by the chain rule over the step's input and state variables."""
        total = torch.zeros_like(result)
        if result.requires_grad:
            partials = torch.autograd.grad(result.sum(), sources, retain_graph=True, allow_unused=True)
            for partial, slope in zip(partials, source_slopes, strict=True):
                if partial is not None:
                    total = total + partial * slope
        return total


def surrogate_slope(function: Callable[[Tensor], Tensor], distance: Tensor) -> Tensor:
    """The surrogate derivative ds/dh, elementwise, at ``distance`` = h - v_threshold."""
    if type(function) is surrogate.Sigmoid:
        p = torch.sigmoid(function.alpha * distance)
        return function.alpha * (p - p * p)
    with torch.enable_grad():
        distance = distance.detach().requires_grad_()
        return torch.autograd.grad(function(distance).sum(), distance)[0]


def memory_names(module: base.MemoryModule) -> list[str]:
    """The names of a neuron's state variables, the membrane potential v first."""
    return sorted((name for name, _ in module.named_memories()), key=lambda name: name != "v")


# By (decay_input, v_reset == 0). To the bit SpikingJelly's own expressions: a current that meets the threshold exactly
# must fire in training where it fires in evaluation.
_LIF_CHARGES = {
    (True, True): lambda v, x, tau, v_reset: v + (x - v) / tau,
    (True, False): lambda v, x, tau, v_reset: v + (x - (v - v_reset)) / tau,
    (False, True): (lambda v, x, tau, v_reset: v * (1 - 1 / tau) + x)
    if hasattr(neuron.LIFNode, "neuronal_charge_no_decay_input_reset0")  # SpikingJelly 0.0.0.0.14
    else (lambda v, x, tau, v_reset: v - v / tau + x),
    (False, False): lambda v, x, tau, v_reset: v - (v - v_reset) / tau + x,
}


def dynamics_of(module: base.MemoryModule) -> LinearCharge | Differentiated:
    """The step rule of a SpikingJelly neuron. Only the exact classes have a closed form: a subclass may change it."""
    rule = (module.v_threshold, module.v_reset, module.detach_reset, module.surrogate_function)
    if not getattr(module.surrogate_function, "spiking", True):
        return Differentiated(module)  # puts out the surrogate itself, not spikes
    if type(module) is neuron.IFNode:
        return LinearCharge(1.0, 1.0, torch.add, *rule)
    if type(module) is neuron.LIFNode:
        tau, v_reset = module.tau, module.v_reset or 0.0
        charge = _LIF_CHARGES[module.decay_input, v_reset == 0]
        return LinearCharge(
            1 - 1 / tau, 1 / tau if module.decay_input else 1.0, lambda v, x: charge(v, x, tau, v_reset), *rule
        )
    return Differentiated(module)
