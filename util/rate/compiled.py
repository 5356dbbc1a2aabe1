"""By torch.compile: all steps of a neuron layer in one pass over memory, BatchNorm in two, its gradients in two.

On a GPU the steps of IF and LIF neurons are a kernel of their own (lif_kernel.py).
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .dynamics import dynamics_of
from .eligibility import (
    Dynamics,
    LinearCharge,
    NeuronRecord,
    NeuronState,
    RateSums,
    rates,
    run_steps,
    run_steps_apart,
)
from .function import batch_norm_gradients
from .layout import flat_steps, is_dense, is_usual, like_step, reshaped
from .sums import mean_over_steps, sum_type
from .sync_norm import update_running, variance

logger = logging.getLogger(__name__)

# Of less, compiled code keeps in float32 what step by step is rounded in between, and other neurons would fire.
_PRECISE = (torch.float32, torch.float64)
_UNROLLED = 32  # steps, at most, of which straight code is made
_WRITTEN_OUT = (surrogate.Sigmoid, surrogate.ATan)  # surrogates whose slope needs no autograd


def run_steps_compiled(dynamics: Dynamics, record: NeuronRecord, currents: Tensor) -> tuple[NeuronRecord, Tensor]:
    """As `run_steps`; each current is read once, each spike written once, and nothing else of T steps' size is touched.

    Compiled once for all layers with alike neurons and T steps, whatever their shape, and in step mode 's' once for the
    first and once for all later steps. Neurons without a closed form, layouts in memory with gaps, and
    less than float32 run step by step; on a GPU `lif_kernel` may serve what is of less.
    """
    like = currents[0]
    if len(record.state.memory_slopes) == 1 and (kernel := lif_kernel(dynamics, currents)):
        return kernel(dynamics, record, currents)
    # Tensors in place of numbers: the compiler would make code anew for each value of a number.
    memory = tuple(v if isinstance(v, Tensor) else torch.full_like(like, v) for v in record.state.memory)
    slopes = tree_map(lambda x: x if isinstance(x, Tensor) else like.new_full((), x), record.state.memory_slopes)
    record = record._replace(state=NeuronState(memory, slopes))
    tensors = [x for x in tree_flatten(record)[0] if isinstance(x, Tensor) and x.dim()]
    closed = isinstance(dynamics, LinearCharge) and type(dynamics.surrogate_function) in _WRITTEN_OUT
    closed = closed and like.dtype in _PRECISE and not _has_values_of_its_own(dynamics)
    if not (closed and is_usual(like) and all(x.stride() == like.stride() and x.dtype == like.dtype for x in tensors)):
        return run_steps(dynamics, record, currents)
    function = dynamics.surrogate_function
    dynamics = replace(dynamics, surrogate_function=_one_of_its_kind(type(function), function.alpha))
    flat_record, flat_currents = reshaped(record, (like.numel(),), (1,)), flat_steps(currents)
    run = _compiled(run_steps_apart) if compiler_works(like.device.type) else run_steps
    record, spikes = run(dynamics, flat_record, flat_currents)
    return reshaped(record, like.shape, like.stride()), like_step(spikes, like)


def lif_kernel(dynamics: Dynamics, currents: Tensor) -> Callable | None:
    """`run_steps` as one kernel of a GPU, where there is one for such neurons and currents."""
    if currents.device.type != "cuda" or not compiler_works("cuda"):
        return None
    from . import lif_kernel as kernels  # imports Triton

    return kernels.run_steps if kernels.serves(dynamics, currents) else None


def mean_over_steps_compiled(steps: Tensor) -> Tensor:
    """As `mean_over_steps`."""
    like = steps[0]
    if not is_dense(like) or len(steps) > _UNROLLED or not compiler_works(steps.device.type):
        return mean_over_steps(steps)
    return like_step(_compiled(_mean)(flat_steps(steps), sum_type(steps.dtype)), like)


def _mean(steps: Tensor, dtype: torch.dtype) -> Tensor:
    first, *others = steps.unbind(0)
    return sum((x.to(dtype) for x in others), first.to(dtype)) / len(steps)


def rates_compiled(sums: RateSums, steps: int, dtype: torch.dtype, counted: bool) -> tuple[Tensor, ...]:
    """As `rates`, each sum read once."""
    like = sums.spikes
    alike = all(x.stride() == like.stride() for x in sums.slopes)
    if not (alike and is_dense(like) and compiler_works(like.device.type)):
        return rates(sums, steps, dtype, counted)
    found = _compiled(rates)(reshaped(sums, (like.numel(),), (1,)), steps, dtype, counted, torch.div)
    return reshaped(found, like.shape, like.stride())


def _has_values_of_its_own(dynamics: LinearCharge) -> bool:
    """Whether threshold, time constant or reset differ between elements: compiled code sees these as one dimension."""
    values = (dynamics.decay, dynamics.gain, dynamics.v_threshold, dynamics.v_reset)
    return any(isinstance(value, Tensor) and value.dim() for value in values)


@cache
def _one_of_its_kind(kind: type[nn.Module], alpha: float) -> nn.Module:
    """A surrogate function for all layers: torch 2.3 compiles anew for each object."""
    return kind(alpha)


def batch_norm_compiled(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """BatchNorm of a batch [N, C, ...]: the output, and of each channel mean and 1 / sqrt(var + eps).

    Reads the batch twice, where PyTorch's own reads it three times. None where there is no compiler, and for layouts in
    memory that are neither contiguous nor channels_last. Of less than float32 the statistics are float32.
    """
    channels, seen = x.shape[1], _rows_of_channels(x)
    if seen is None or not compiler_works(x.device.type):
        return None
    dtype = sum_type(x.dtype)
    weight = x.new_ones(channels, dtype=dtype) if weight is None else weight.detach()
    bias = x.new_zeros(channels, dtype=dtype) if bias is None else bias.detach()
    y, mean, invstd = _compiled(_batch_norm)(reshaped(x, *seen), _as_constant(weight), bias, eps)
    return reshaped(y, x.shape, x.stride()), mean, invstd


_channels: set[int] = set()  # of which code of its own is made
_momenta: set[float] = set()
_MOST = 6  # such numbers: what torch.compile makes for more than 8 cases it does no more


def _as_constant(weight: Tensor) -> Tensor:
    """``weight`` [C]; on a GPU the compiler makes code for its very size, where reductions over all else are faster."""
    if not weight.is_cuda or (len(weight) not in _channels and len(_channels) >= _MOST):
        return weight.detach()
    _channels.add(len(weight))
    return nn.Parameter(weight.detach(), requires_grad=False)  # whose sizes it takes for constants


def _rows_of_channels(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides that make [N, C, L] of a batch [N, C, ...]; None where it is laid out otherwise."""
    channels = x.shape[1]
    if x.is_contiguous():
        length = x.numel() // (len(x) * channels)
        return (len(x), channels, length), (channels * length, length, 1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return (x.numel() // channels, channels, 1), (channels, 1, 1)
    return None


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``x``: [N, C, L]; the others of float32 at least."""
    dtype, x = x.dtype, x.to(weight.dtype)
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    invstd = (var + eps).rsqrt()
    y = (x - mean.view(-1, 1)) * (invstd * weight).view(-1, 1) + bias.view(-1, 1)
    return y.to(dtype), mean, invstd


def update_running_compiled(
    running: tuple[Tensor, Tensor], mean: Tensor, invstd: Tensor, eps: float, momentum: float, count: int
) -> None:
    """As `update_running`, of a batch with ``count`` values a channel, in one pass."""
    known = momentum in _momenta or len(_momenta) < _MOST  # code is made for each value
    if not known or not compiler_works(mean.device.type):
        update_running(running, mean, variance(invstd, eps), momentum, count)
        return
    _momenta.add(momentum)
    torch._foreach_copy_(running, _compiled(_running)(*running, mean, invstd, eps, momentum, count))


def _running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, invstd: Tensor, eps: float, part: float, count: int
) -> tuple[Tensor, Tensor]:
    """Tensors [C]."""
    var = variance(invstd, eps) * (count / (count - 1))
    return torch.lerp(running_mean, mean, part), torch.lerp(running_var, var, part)


def batch_norm_gradients_compiled(
    grad: Tensor, c: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """As `batch_norm_gradients`, in two passes over memory where `batch_norm_compiled` has its two."""
    seen = _rows_of_channels(c)
    factor = torch.ones_like(mean) if weight is None else weight
    wide = {factor.dtype, mean.dtype} == {sum_type(c.dtype)}
    if not (wide and needs[0] and seen and compiler_works(c.device.type)):
        return batch_norm_gradients(grad, c, weight, mean, invstd, needs)
    if grad.stride() != c.stride():
        grad = torch.empty_like(c, dtype=grad.dtype).copy_(grad)
    seen_grad, seen_c = reshaped((grad, c), *seen)
    of_c, *others = _compiled(_batch_norm_gradients)(seen_grad, seen_c, _as_constant(factor), mean, invstd)
    return reshaped(of_c, c.shape, c.stride()), *others


def _batch_norm_gradients(
    grad: Tensor, c: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad``, ``c``: [N, C, L]; the others [C]. The mean over (N, L) of c need not be ``mean``."""
    count, dtype = c.shape[0] * c.shape[2], c.dtype
    grad, c = grad.to(mean.dtype), c.to(mean.dtype)
    centred = c - mean.view(-1, 1)
    of_bias, with_centred, of_mean = (x.sum((0, 2)) for x in (grad, grad * centred, centred))
    slope = invstd.square() * with_centred / count
    shift = of_bias / count - slope * of_mean / count
    of_c = (invstd * weight).view(-1, 1) * (grad - shift.view(-1, 1) - slope.view(-1, 1) * centred)
    return of_c.to(dtype), with_centred * invstd, of_bias


@cache
def _compiled(function: Callable) -> Callable:
    """What stands for ``function``, for tensors of any size."""
    # Named, because code that an earlier process made for another number of threads would be taken from disk.
    return torch.compile(function, dynamic=True, options={"cpp.threads": torch.get_num_threads()})


@cache
def compiler_works(device_type: str) -> bool:
    """Whether there is a compiler for such devices; tried out once in a process.

    A CPU needs a C++ compiler, a GPU Triton; that one is there says nothing of the other.
    """
    try:
        record = NeuronRecord(NeuronState.start((torch.zeros(8, device=device_type),)))
        _compiled(run_steps_apart)(dynamics_of(neuron.IFNode()), record, torch.ones(2, 8, device=device_type))
    except Exception as error:  # torch raises whatever its backend does
        logger.warning(
            f"torch.compile does not work here for {device_type} ({type(error).__name__}): running without it"
        )
        return False
    return True
