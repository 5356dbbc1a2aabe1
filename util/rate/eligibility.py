"""One time step of a neuron layer together with the derivative of its firing rate: the eligibility.

`LinearCharge` is the closed form of SpikingJelly's IF and LIF neurons; `Differentiated` serves any other elementwise
neuron by differentiating each of its steps. Both map (state, input) to (state, spikes, the spikes' slopes).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from spikingjelly.activation_based import base, neuron, surrogate
from torch import Tensor, nn

from .layout import is_dense
from .sums import in_sum_type, sum_type


class NeuronState(NamedTuple):
    """What one step of a neuron layer leaves to the next one of the window. No step changes it in place.

    Slopes are derivatives with respect to each of the sources: c, a constant added to the input at every step of the
    window, and then the neuron's learnable parameters, if any. Every tensor has the shape of one step's input; a number
    stands for a tensor that is the same everywhere.

    Attributes:
        memory: the neuron's state variables after the step; the membrane potential v comes first.
        memory_slopes: for each source, d memory / d source.
    """

    memory: tuple[Tensor | float, ...]
    memory_slopes: tuple[tuple[Tensor | float, ...], ...]

    @classmethod
    def start(cls, memory: tuple[Tensor | float, ...], parameters: int = 0) -> "NeuronState":
        """Before the first step of a window: what happened earlier depends on no source."""
        return cls(memory, ((0.0,) * len(memory),) * (1 + parameters))


# d s[t] / d source as a product of two, which needs no memory of its own.
Slope = tuple[Tensor, Tensor | float]


class RateSums(NamedTuple):
    """The sums over a window's steps whose means are the firing rate and its slopes; all of one step's shape.

    In float32 at least.

    Attributes:
        spikes: of the spikes s[t].
        slopes: for each source, of d s[t] / d source.
    """

    spikes: Tensor
    slopes: tuple[Tensor, ...]

    @classmethod
    def of_step(cls, s: Tensor, slopes: tuple[Slope, ...]) -> "RateSums":
        return cls(s.to(sum_type(s.dtype), copy=True), tuple(in_sum_type(a) * b for a, b in slopes))

    def add_(self, s: Tensor, slopes: tuple[Slope, ...]) -> "RateSums":
        """Adds another step, in place."""
        self.spikes.add_(s)
        for total, (a, b) in zip(self.slopes, slopes, strict=True):
            _add_product_(total, a, b)
        return self


def rates(
    sums: RateSums, steps: int, dtype: torch.dtype, counted: bool, divide: Callable = Tensor.div_
) -> tuple[Tensor, ...]:
    """The firing rate and its slopes as ``dtype``; then, if ``counted``, the spikes' number as uint8.

    ``divide``: the slopes; by default in place, so that ``sums`` are used up.
    """
    count = (sums.spikes.to(torch.uint8),) if counted else ()
    # Not in place: the network may work in place on the rate, but not on a view.
    return (sums.spikes / steps).to(dtype), *(divide(total, steps).to(dtype) for total in sums.slopes), *count


class NeuronRecord(NamedTuple):
    """What the steps of a window so far leave behind; ``sums`` is None before the first."""

    state: NeuronState
    sums: RateSums | None = None

    def after(self, state: NeuronState, s: Tensor, slopes: tuple[Slope, ...]) -> "NeuronRecord":
        """The record with another step, as `LinearCharge.step` gives it; uses this one up."""
        return NeuronRecord(state, RateSums.of_step(s, slopes) if self.sums is None else self.sums.add_(s, slopes))


def _add_product_(total: Tensor, x: Tensor, factor: Tensor | float) -> Tensor:
    """``total + factor * x``, in place and in one pass over memory."""
    return total.addcmul_(x, factor) if isinstance(factor, Tensor) else total.add_(x, alpha=factor)


@dataclass(frozen=True)
class LinearCharge:
    """Integrate-and-fire neurons whose charge is linear, with 1 / tau possibly learnable (q = sigmoid(w)):

        h[t]   = charge(v[t-1], x[t]) = decay * v[t-1] + gain * x[t] + a constant
        rho[t] = dh[t]/dc = gain + decay * dv[t-1]/dc                     (rho[1] = gain)
        ds[t]/dc = sg(h[t]) * rho[t],   dv[t]/dc = dv[t]/dh[t] * rho[t]

    With respect to w the same recursion holds with q (1 - q) (x[t] - v[t-1] + v_reset), or q (1 - q) (v_reset - v[t-1])
    where the input is not decayed, in place of gain. The eligibility e = mean over t of ds[t]/dc;
    tests/rate/test_eligibility.py holds it against autograd for each reset.
    """

    decay: float | Tensor
    gain: float | Tensor
    charge: Callable[[Tensor, Tensor], Tensor]
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate_function: Callable[[Tensor], Tensor] = field(repr=False)
    by_parameter: Callable[[Tensor, Tensor], Tensor] | None = None  # (v, x) -> dh/dw where v is held
    leak: "Leak | None" = None  # ``charge`` for those who write it themselves

    def step(
        self, state: NeuronState, x: Tensor, out: Tensor | None = None
    ) -> tuple[NeuronState, Tensor, tuple[Slope, ...]]:
        """``x``: one step's input current. Returns the state after the step, the spikes s[t] and their slopes.

        All have the shape of ``x``. The spikes are written to ``out``, if given.
        """
        (v,) = state.memory
        drives = (self.gain,) if self.by_parameter is None else (self.gain, self.by_parameter(v, x))
        h = self.charge(v, x)
        distance = h - self.v_threshold
        s = (distance >= 0).to(h.dtype) if out is None else torch.ge(distance, 0, out=out)
        sg = surrogate_slope(self.surrogate_function, distance)
        rhos = [drive + self.decay * slope for drive, (slope,) in zip(drives, state.memory_slopes, strict=True)]
        reset_slope = self._reset_slope(h, s, sg)
        v = _add_product_(h, s, -self.v_threshold) if self.v_reset is None else h.masked_fill_(s.bool(), self.v_reset)
        after = NeuronState((v,), tuple((reset_slope * rho,) for rho in rhos))
        return after, s, tuple((sg, rho) for rho in rhos)

    def _reset_slope(self, h: Tensor, s: Tensor, sg: Tensor) -> Tensor | float:
        """dv[t]/dh[t]; ``sg`` = ds[t]/dh[t] enters where the reset is not detached."""
        if self.v_reset is None:
            return 1.0 if self.detach_reset else 1 - self.v_threshold * sg
        return 1 - s if self.detach_reset else (1 - s) + (self.v_reset - h) * sg


class Leak(NamedTuple):
    """Which expression of x and v the charge is, and the time constant in it.

    Kinds: 'none': v + x; 'input too': v + (x - (v - v_reset)) / tau; 'potential': v - (v - v_reset) / tau + x;
    'factor': v * (1 - 1 / tau) + x. Without v_reset it counts as 0.
    """

    kind: str
    tau: float | Tensor = 1.0


class NotElementwiseError(ValueError):
    """A neuron's step does not act on each element alone, so its derivatives have no elementwise form."""


@dataclass(frozen=True)
class Differentiated:
    """Any neuron whose step acts on each element alone: autograd gives the derivatives of one step at a time.

    For such a neuron the gradient of the sum of an output is its elementwise derivative, so one step's graph of one
    layer is all that ever exists. Learnable parameters are expanded to one copy an element, for the same reason; they
    must broadcast to the shape of one step's input.
    """

    module: base.MemoryModule
    check: bool = False  # whether to make sure that the neuron is such a one

    def step(self, state: NeuronState, x: Tensor) -> tuple[NeuronState, Tensor, tuple[Slope, ...]]:
        """As `LinearCharge.step`; leaves the module's own state variables as the step made them.

        Raises:
            NotElementwiseError: with ``check``, where an output depends on another element's input or state, or the
                step keeps a state that SpikingJelly does not know of.
        """
        names = memory_names(self.module)
        parameters = learnable_parameters(self.module)
        before = dict(vars(self.module))
        with torch.enable_grad(), _replaced(parameters, x) as copies:
            sources = [t.detach().requires_grad_() for t in (x, *state.memory)]
            for name, value in zip(names, sources[1:], strict=True):
                setattr(self.module, name, value)
            s = self.module.single_step_forward(sources[0])
            results = [s, *(getattr(self.module, name) for name in names)]
            partials = [self._partials(result, [*sources, *copies]) for result in results]
        changed = [name for name, value in vars(self.module).items() if before.get(name, before) is not value]
        if self.check and changed:
            raise NotElementwiseError(f"its step changes {changed[0]!r}, which is no memory (see register_memory)")
        units = torch.eye(1 + len(copies)).tolist()  # of the input and the parameters with respect to each source
        slopes = [
            [self._slope(s, partial, (unit[0], *memory_slopes, *unit[1:])) for partial in partials]
            for unit, memory_slopes in zip(units, state.memory_slopes, strict=True)
        ]  # [source][result]
        after = NeuronState(tuple(r.detach() for r in results[1:]), tuple(tuple(slope[1:]) for slope in slopes))
        return after, s.detach(), tuple((slope[0], 1.0) for slope in slopes)

    def _partials(self, result: Tensor, sources: list[Tensor]) -> list[Tensor | None]:
        """The elementwise partial derivatives of one output of the step."""
        if not result.requires_grad:
            return [None] * len(sources)
        partials = torch.autograd.grad(result.sum(), sources, retain_graph=True, allow_unused=True)
        if self.check:  # for an elementwise step, weighting the outputs weights their derivatives alike
            eps = max(torch.finfo(x.dtype).eps for x in (result, *sources))
            weights = torch.linspace(1, 2, result.numel(), dtype=result.dtype, device=result.device).view_as(result)
            weighted = torch.autograd.grad((result * weights).sum(), sources, retain_graph=True, allow_unused=True)
            for partial, other in zip(partials, weighted, strict=True):
                if partial is not None and not _close(partial * weights, other, eps):
                    raise NotElementwiseError("its step does not act on each element alone")
        return list(partials)

    @staticmethod
    def _slope(like: Tensor, partials: list[Tensor | None], slopes: tuple[Tensor | float, ...]) -> Tensor:
        """d output / d source by the chain rule over the step's input, state variables and parameters."""
        total = torch.zeros_like(like)
        for partial, slope in zip(partials, slopes, strict=True):
            if partial is not None:
                total = total + partial * slope
        return total


def _close(a: Tensor, b: Tensor, eps: float) -> bool:
    """Equal but for rounding, of which a single one is ``eps``."""
    return torch.allclose(a.double(), b.double(), rtol=max(1e-3, 8 * eps), atol=max(1e-6, eps))


@contextmanager
def _replaced(parameters: list[tuple[nn.Module, str]], like: Tensor) -> Iterator[list[Tensor]]:
    """The parameters replaced, for a while, by copies of ``like``'s shape, each of which has a gradient of its own."""
    originals = [owner._parameters[name] for owner, name in parameters]
    try:
        copies = []
        for (owner, name), original in zip(parameters, originals, strict=True):
            try:
                copies.append(original.detach().expand_as(like).clone().requires_grad_())
            except RuntimeError as error:
                shapes = f"{list(original.shape)} does not broadcast to one step's {list(like.shape)}"
                raise NotElementwiseError(f"its parameter {name!r} of shape {shapes}") from error
            owner._parameters[name] = copies[-1]
        yield copies
    finally:
        for (owner, name), original in zip(parameters, originals, strict=True):
            owner._parameters[name] = original


def learnable_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of each parameter of a neuron and its submodules that is being trained."""
    owned = [(owner, name) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]
    return [(owner, name) for owner, name in owned if owner._parameters[name].requires_grad]


def surrogate_slope(function: Callable[[Tensor], Tensor], distance: Tensor) -> Tensor:
    """The surrogate derivative ds/dh, elementwise, at ``distance`` = h - v_threshold."""
    if type(function) is surrogate.Sigmoid:
        p = (function.alpha * distance).sigmoid_()
        alpha = torch.full((), function.alpha, dtype=p.dtype, device=p.device).expand_as(p)
        return torch.ops.aten.sigmoid_backward(alpha, p)  # alpha * p * (1 - p), in one pass
    if type(function) is surrogate.ATan:
        return function.alpha / 2 / (1 + (math.pi / 2 * function.alpha * distance).square())
    with torch.enable_grad():
        distance = distance.detach().requires_grad_()
        return torch.autograd.grad(function(distance).sum(), distance)[0]


def run_steps(
    dynamics: LinearCharge | Differentiated, record: NeuronRecord, currents: Tensor
) -> tuple[NeuronRecord, Tensor]:
    """Steps of a neuron layer: currents [T, ...] -> the record with them, and the spikes [T, ...].

    ``record`` is used up: its sums are those of the new one.
    """
    if isinstance(dynamics, Differentiated):  # what it puts out may be of another type than its input
        return run_steps_apart(dynamics, record, currents)
    like = currents[0]
    if is_dense(like):  # empty_like would lose the layout of a static image's currents, of stride 0 along time
        strides = (like.numel(), *like.stride())
        spikes = torch.empty_strided(currents.shape, strides, dtype=like.dtype, device=like.device)
    else:
        spikes = torch.empty_like(currents)
    for current, out in zip(currents.unbind(0), spikes.unbind(0), strict=True):
        record = record.after(*dynamics.step(record.state, current, out))
    return record, spikes


def run_steps_apart(
    dynamics: LinearCharge | Differentiated, record: NeuronRecord, currents: Tensor
) -> tuple[NeuronRecord, Tensor]:
    """`run_steps` with each step's spikes in a tensor of their own: also what the compiler fuses, of any size."""
    spikes = []
    for current in currents.unbind(0):
        state, s, slopes = dynamics.step(record.state, current)
        record = record.after(state, s, slopes)
        spikes.append(s)
    return record, torch.stack(spikes)


def memory_names(module: base.MemoryModule) -> list[str]:
    """The names of a neuron's state variables, the membrane potential v first."""
    return sorted((name for name, _ in module.named_memories()), key=lambda name: name != "v")


# Those whose value is 1 where h >= v_threshold and 0 elsewhere, whatever their derivative.
_STEP_SURROGATES = {
    getattr(surrogate, name)
    for name in (
        "ATan", "Erf", "FakeNumericalGradient", "LeakyKReLU", "LogTailedReLU", "NonzeroSignLogAbs", "PiecewiseExp",
        "PiecewiseLeakyReLU", "PiecewiseQuadratic", "QPseudoSpike", "Rect", "S2NN", "Sigmoid", "SoftSign",
        "SquarewaveFourierSeries", "SuperSpike",
    )
    if hasattr(surrogate, name)
}  # fmt: skip

_FACTOR = "neuronal_charge_no_decay_input_reset0"  # SpikingJelly 0.0.0.0.14 has it, and another expression there

# By (decay_input, v_reset == 0). To the bit SpikingJelly's own expressions: a current that meets the threshold exactly
# must fire in training where it fires in evaluation.
_LIF_CHARGES = {
    (True, True): lambda v, x, tau, v_reset: v + (x - v) / tau,
    (True, False): lambda v, x, tau, v_reset: v + (x - (v - v_reset)) / tau,
    (False, True): (lambda v, x, tau, v_reset: v * (1 - 1 / tau) + x)
    if hasattr(neuron.LIFNode, _FACTOR)
    else (lambda v, x, tau, v_reset: v - v / tau + x),
    (False, False): lambda v, x, tau, v_reset: v - (v - v_reset) / tau + x,
}
_PARAMETRIC_LIF_CHARGES = {
    (True, True): lambda v, x, q, v_reset: v + (x - v) * q,
    (True, False): lambda v, x, q, v_reset: v + (x - (v - v_reset)) * q,
    (False, True): (lambda v, x, q, v_reset: v * (1 - q) + x)
    if hasattr(neuron.LIFNode, _FACTOR)
    else (lambda v, x, q, v_reset: v - v * q + x),
    (False, False): lambda v, x, q, v_reset: v - (v - v_reset) * q + x,
}


def dynamics_of(module: base.MemoryModule, check: bool = False) -> LinearCharge | Differentiated:
    """The step rule of a SpikingJelly neuron. Only the exact classes have a closed form: a subclass may change it."""
    rule = (module.v_threshold, module.v_reset, module.detach_reset, module.surrogate_function)
    spiking = getattr(module.surrogate_function, "spiking", True)  # else it puts out the surrogate itself, not spikes
    own = {"w"} if type(module) is neuron.ParametricLIFNode else set()  # what the closed form has a derivative for
    learns = any(owner is not module or name not in own for owner, name in learnable_parameters(module))
    differs = isinstance(module.v_reset, Tensor)  # from neuron to neuron
    if not spiking or learns or differs or type(module.surrogate_function) not in _STEP_SURROGATES:
        return Differentiated(module, check)
    if type(module) is neuron.IFNode:
        return LinearCharge(1.0, 1.0, lambda v, x: v + x, *rule, leak=Leak("none"))
    if type(module) is neuron.LIFNode:
        tau, v_reset = module.tau, module.v_reset or 0.0
        charge = _LIF_CHARGES[module.decay_input, v_reset == 0]
        by_factor = v_reset == 0 and hasattr(neuron.LIFNode, _FACTOR)
        kind = "input too" if module.decay_input else "factor" if by_factor else "potential"
        gain = 1 / tau if module.decay_input else 1.0
        return LinearCharge(1 - 1 / tau, gain, lambda v, x: charge(v, x, tau, v_reset), *rule, leak=Leak(kind, tau))
    if type(module) is neuron.ParametricLIFNode:
        return _parametric_lif(module, rule)
    return Differentiated(module, check)


def _parametric_lif(module: neuron.ParametricLIFNode, rule: tuple) -> LinearCharge:
    q, v_reset = module.w.detach().sigmoid(), module.v_reset or 0.0
    if module.decay_input:
        gain, slope = q, lambda v, x: x - (v - v_reset)
    else:
        gain, slope = 1.0, lambda v, x: v_reset - v
    charge = _PARAMETRIC_LIF_CHARGES[module.decay_input, v_reset == 0]
    by_w = (lambda v, x: q * (1 - q) * slope(v, x)) if module.w.requires_grad else None
    return LinearCharge(1 - q, gain, lambda v, x: charge(v, x, q, v_reset), *rule, by_w)
