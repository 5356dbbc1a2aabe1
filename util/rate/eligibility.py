"""One time step of a neuron layer together with the derivative of its firing rate: the eligibility.

`LinearCharge` is the closed form of SpikingJelly's IF and LIF neurons. dynamics.py says which neuron has it, and serves
others by differentiating each of their steps. Both map (state, input) to (state, spikes, the spikes' slopes).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .layout import is_usual
from .sums import in_sum_type, sum_type


class NeuronState(NamedTuple):
    """What one step of a neuron layer leaves to the next one of the window. No step changes it in place.

    Slopes are derivatives with respect to each of the sources: c, a constant added to the input at every step of the
    window, then the neuron's learnable parameters, if any, and then, where an earlier window has made it, the memory
    that the window began with. Every tensor has the shape of one step's input; a number stands for a tensor that is the
    same everywhere.

    Attributes:
        memory: the neuron's state variables after the step; the membrane potential v comes first.
        memory_slopes: for each source, d memory / d source.
    """

    memory: tuple[Tensor | float, ...]
    memory_slopes: tuple[tuple[Tensor | float, ...], ...]

    @classmethod
    def start(cls, memory: tuple[Tensor | float, ...], parameters: int = 0, follow: bool = False) -> "NeuronState":
        """Before the first step of a window; ``follow``: the memory is a source."""
        size = len(memory)
        units = tuple(tuple(float(i == j) for j in range(size)) for i in range(size)) if follow else ()
        return cls(memory, ((0.0,) * size,) * (1 + parameters) + units)


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


class Dynamics(Protocol):
    """The step rule of a neuron."""

    def step(self, state: NeuronState, x: Tensor) -> tuple[NeuronState, Tensor, tuple[Slope, ...]]:
        """``x``: one step's input current. Returns the state after the step, the spikes s[t] and their slopes."""


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
        drives += (0.0,) * (len(state.memory_slopes) - len(drives))  # what the window began with drives no later step
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


def run_steps(dynamics: Dynamics, record: NeuronRecord, currents: Tensor) -> tuple[NeuronRecord, Tensor]:
    """Steps of a neuron layer: currents [T, ...] -> the record with them, and the spikes [T, ...].

    ``record`` is used up: its sums are those of the new one.
    """
    if not isinstance(dynamics, LinearCharge):  # what it puts out may be of another type than its input
        return run_steps_apart(dynamics, record, currents)
    like = currents[0]
    steps = like if is_usual(like) else torch.empty(like.shape, device="meta")  # as torch.stack would lay them out
    strides = (like.numel(), *steps.stride())
    spikes = torch.empty_strided(currents.shape, strides, dtype=like.dtype, device=like.device)
    for current, out in zip(currents.unbind(0), spikes.unbind(0), strict=True):
        record = record.after(*dynamics.step(record.state, current, out))
    return record, spikes


def run_steps_apart(dynamics: Dynamics, record: NeuronRecord, currents: Tensor) -> tuple[NeuronRecord, Tensor]:
    """`run_steps` with each step's spikes in a tensor of their own: also what the compiler fuses, of any size."""
    spikes = []
    for current in currents.unbind(0):
        state, s, slopes = dynamics.step(record.state, current)
        record = record.after(state, s, slopes)
        spikes.append(s)
    return record, torch.stack(spikes)
