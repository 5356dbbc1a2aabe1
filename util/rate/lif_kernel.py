"""The steps of a layer of IF or LIF neurons as one GPU kernel, in Triton: `eligibility.run_steps`, memory passed once.

Currents of half precision are computed with in float32, in which potentials and sums are too; their spikes are of half
precision, which has 0 and 1.
"""

import torch
import triton
import triton.language as tl
from spikingjelly.activation_based import surrogate
from torch import Tensor

from .eligibility import Dynamics, LinearCharge, NeuronRecord, NeuronState, RateSums
from .layout import flat_steps, is_usual, like_step
from .sums import sum_type

_LEAKS = {"none": 0, "input too": 1, "potential": 2, "factor": 3}
_SURROGATES = {surrogate.Sigmoid: 0, surrogate.ATan: 1}
_BLOCK = 1024
_STEPS = 16  # of which straight code is made; more are run in several launches


@triton.jit
def _run(
    currents, spikes, v_in, v_out, slope_in, slope_out, spike_sums, slope_sums, n, stride,
    steps: tl.constexpr, leak: tl.constexpr, inverse_tau: tl.constexpr, gain: tl.constexpr, decay: tl.constexpr,
    v_threshold: tl.constexpr, hard: tl.constexpr, v_reset: tl.constexpr, detached: tl.constexpr,
    kind: tl.constexpr, alpha: tl.constexpr, v_start: tl.constexpr, slope_start: tl.constexpr, first: tl.constexpr,
    same_slope: tl.constexpr, dtype: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Names as in `LinearCharge`. ``currents``, ``spikes``: [steps, n]; the others [n], a slope that is the same
    everywhere [1]. A start that is None is in ``v_in`` or ``slope_in``.
    """
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    zeros = tl.full([block], 0, dtype)
    v = tl.load(v_in + at, inside) if v_start is None else zeros + v_start
    if slope_start is not None:
        slope = zeros + slope_start
    elif same_slope:
        slope = zeros + tl.load(slope_in)
    else:
        slope = tl.load(slope_in + at, inside)
    total = zeros if first else tl.load(spike_sums + at, inside)
    slope_total = zeros if first else tl.load(slope_sums + at, inside)
    current_at, spike_at = currents + at, spikes + at
    for _ in tl.static_range(steps):
        x = tl.load(current_at, inside).to(dtype)
        if leak == 0:
            h = v + x
        elif leak == 1:
            h = v + (x - (v - v_reset)) * inverse_tau
        elif leak == 2:
            h = v - (v - v_reset) * inverse_tau + x
        else:
            h = v * decay + x
        distance = h - v_threshold
        s = (distance >= 0).to(dtype)
        if kind == 0:
            p = 1 / (1 + tl.exp(-alpha * distance))
            sg = alpha * (1 - p) * p
        else:
            y = 1.5707963267948966 * alpha * distance
            sg = alpha / 2 / (1 + y * y)
        rho = gain + decay * slope
        if hard:
            v = tl.where(distance >= 0, zeros + v_reset, h)
            slope = (1 - s) * rho if detached else ((1 - s) + (v_reset - h) * sg) * rho
        else:
            v = h - v_threshold * s
            slope = rho if detached else (1 - v_threshold * sg) * rho
        tl.store(spike_at, s.to(spikes.dtype.element_ty), inside)
        current_at += stride
        spike_at += n
        total += s
        slope_total += sg * rho
    tl.store(v_out + at, v, inside)
    if same_slope:
        tl.store(slope_out + at * 0, slope, at == 0)
    else:
        tl.store(slope_out + at, slope, inside)
    tl.store(spike_sums + at, total, inside)
    tl.store(slope_sums + at, slope_total, inside)


def serves(dynamics: Dynamics, currents: Tensor) -> bool:
    """Whether the kernel has the expressions of such neurons, and such currents [T, ...] are dense."""
    if int(triton.__version__.partition(".")[0]) < 3:  # on which it has not been tried
        return False
    if not isinstance(dynamics, LinearCharge) or dynamics.leak is None or dynamics.by_parameter is not None:
        return False
    numbers = (dynamics.leak.tau, dynamics.v_threshold, 0.0 if dynamics.v_reset is None else dynamics.v_reset)
    known = type(dynamics.surrogate_function) in _SURROGATES and all(isinstance(x, int | float) for x in numbers)
    return known and currents.numel() > 0 and currents.is_floating_point() and is_usual(currents[0])


def run_steps(dynamics: LinearCharge, record: NeuronRecord, currents: Tensor) -> tuple[NeuronRecord, Tensor]:
    """As `eligibility.run_steps`, for what `serves` says."""
    like = currents[0]
    spikes = torch.empty(len(currents), like.numel(), dtype=currents.dtype, device=currents.device)
    with torch.cuda.device_of(currents):
        for part, out in zip(flat_steps(currents).split(_STEPS), spikes.split(_STEPS), strict=True):
            record = _run_steps(dynamics, record, part, out, like)
    return record, like_step(spikes, like)


def _run_steps(
    dynamics: LinearCharge, record: NeuronRecord, currents: Tensor, spikes: Tensor, like: Tensor
) -> NeuronRecord:
    """``currents``, ``spikes``: [T, N], the latter to be written; ``like``: one step."""
    dtype, n = sum_type(currents.dtype), like.numel()
    (v,), ((slope,),) = record.state

    def as_laid_out(x: Tensor | float) -> Tensor | float:
        """A tensor of the currents' shape in their order of memory."""
        if not isinstance(x, Tensor) or not x.dim() or x.stride() == like.stride():
            return x
        return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)

    v, slope = as_laid_out(v), as_laid_out(slope)
    if isinstance(v, Tensor):
        v = v.to(dtype)
    hard, detached = dynamics.v_reset is not None, dynamics.detach_reset
    same_slope = not hard and detached
    if same_slope and isinstance(slope, Tensor) and slope.dim():
        raise ValueError("neurons whose reset is detached have the same slope everywhere")
    v_out, spike_sums, slope_sums = (
        torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device) for _ in range(3)
    )
    if record.sums is not None:
        spike_sums, slope_sums = as_laid_out(record.sums.spikes), as_laid_out(record.sums.slopes[0])
    slope_out = v_out.new_empty(()) if same_slope else torch.empty_like(v_out)
    function = dynamics.surrogate_function
    # Places that are not read get a tensor all the same.
    _run[(triton.cdiv(n, _BLOCK),)](
        currents, spikes, v if isinstance(v, Tensor) else v_out, v_out,
        slope if isinstance(slope, Tensor) else slope_out, slope_out, spike_sums, slope_sums, n, currents.stride(0),
        steps=len(currents), leak=_LEAKS[dynamics.leak.kind], inverse_tau=1 / dynamics.leak.tau,
        gain=float(dynamics.gain), decay=float(dynamics.decay), v_threshold=float(dynamics.v_threshold), hard=hard,
        v_reset=float(dynamics.v_reset or 0.0), detached=detached, kind=_SURROGATES[type(function)],
        alpha=float(function.alpha), v_start=None if isinstance(v, Tensor) else float(v),
        slope_start=None if isinstance(slope, Tensor) else float(slope), first=record.sums is None,
        same_slope=same_slope, dtype={torch.float32: tl.float32, torch.float64: tl.float64}[dtype], block=_BLOCK,
        enable_fp_fusion=False,  # products are rounded before they are added, as in evaluation
    )  # fmt: skip
    return NeuronRecord(NeuronState((v_out,), ((slope_out,),)), RateSums(spike_sums, (slope_sums,)))
