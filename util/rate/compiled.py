"""By torch.compile: all steps of a neuron layer in one pass over memory, and BatchNorm in two."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .eligibility import (
    Differentiated,
    LinearCharge,
    NeuronRecord,
    NeuronState,
    dynamics_of,
    is_dense,
    run_steps,
    run_steps_apart,
)

logger = logging.getLogger(__name__)

# Of less, compiled code keeps in float32 what step by step is rounded in between, and other neurons would fire.
_PRECISE = (torch.float32, torch.float64)
_WRITTEN_OUT = (surrogate.Sigmoid, surrogate.ATan)  # surrogates whose slope needs no autograd


def run_steps_compiled(
    dynamics: LinearCharge | Differentiated, record: NeuronRecord, currents: Tensor
) -> tuple[NeuronRecord, Tensor]:
    """As `run_steps`; each current is read once, each spike written once, and nothing else of T steps' size is touched.

    Compiled once for all layers with alike neurons and T steps, whatever their shape, and in step mode 's' once for the
    first and once for all later steps. Neurons without a closed form, layouts in memory that are neither contiguous nor
    channels_last, and less than float32 run step by step.
    """
    like = currents[0]
    # Tensors in place of numbers: the compiler would make code anew for each value of a number.
    memory = tuple(v if isinstance(v, Tensor) else torch.full_like(like, v) for v in record.state.memory)
    slopes = tree_map(lambda x: x if isinstance(x, Tensor) else like.new_full((), x), record.state.memory_slopes)
    record = record._replace(state=NeuronState(memory, slopes))
    tensors = [x for x in tree_flatten(record)[0] if isinstance(x, Tensor) and x.dim()]
    closed = isinstance(dynamics, LinearCharge) and type(dynamics.surrogate_function) in _WRITTEN_OUT
    closed = closed and like.dtype in _PRECISE and not _has_values_of_its_own(dynamics)
    if not (closed and is_dense(like) and all(x.stride() == like.stride() and x.dtype == like.dtype for x in tensors)):
        return run_steps(dynamics, record, currents)
    function = dynamics.surrogate_function
    dynamics = replace(dynamics, surrogate_function=_one_of_its_kind(type(function), function.alpha))
    flat_record = _reshaped(record, (like.numel(),), (1,))
    flat_currents = _reshaped(currents, (len(currents), like.numel()), (currents.stride(0), 1))
    run = _compiled(run_steps_apart) if compiler_works(like.device.type) else run_steps
    record, spikes = run(dynamics, flat_record, flat_currents)
    spikes = _reshaped(spikes, currents.shape, (like.numel(), *like.stride()))
    return _reshaped(record, like.shape, like.stride()), spikes


def _has_values_of_its_own(dynamics: LinearCharge) -> bool:
    """Whether threshold, time constant or reset differ between elements: compiled code sees these as one dimension."""
    values = (dynamics.decay, dynamics.gain, dynamics.v_threshold, dynamics.v_reset)
    return any(isinstance(value, Tensor) and value.dim() for value in values)


@cache
def _one_of_its_kind(kind: type[nn.Module], alpha: float) -> nn.Module:
    """A surrogate function for all layers: torch 2.3 compiles anew for each object."""
    return kind(alpha)


def batch_norm_compiled(x: Tensor, module: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor, Tensor] | None:
    """BatchNorm of a batch [N, C, ...]: the output, and of each channel mean and 1 / sqrt(var + eps).

    Reads the batch twice, where PyTorch's own reads it three times. None where there is no compiler, for layouts in
    memory that are neither contiguous nor channels_last, and for less than float32.
    """
    if x.dtype not in _PRECISE or not is_dense(x) or not compiler_works(x.device.type):
        return None
    channels = x.shape[1]
    if x.is_contiguous():
        shape = (x.shape[0], channels, x[0, 0].numel())
        strides = (channels * shape[2], shape[2], 1)
    else:  # channels last
        shape, strides = (x.numel() // channels, channels, 1), (channels, 1, 1)
    weight = x.new_ones(channels) if module.weight is None else module.weight.detach()
    bias = x.new_zeros(channels) if module.bias is None else module.bias.detach()
    y, mean, invstd = _compiled(_batch_norm)(_reshaped(x, shape, strides), weight, bias, x.new_full((), module.eps))
    return _reshaped(y, x.shape, x.stride()), mean, invstd


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``x``: [N, C, L]."""
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    invstd = (var + eps).rsqrt()
    y = (x - mean.view(-1, 1)) * (invstd * weight).view(-1, 1) + bias.view(-1, 1)
    return y, mean, invstd


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


def _reshaped(tree: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """The memory of tensors seen in another shape. Not as views: compiled code is made anew for each base of a view."""

    def alias(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        same = torch.empty(0, dtype=x.dtype, device=x.device)
        return same.set_(x.untyped_storage(), x.storage_offset(), shape, strides)

    return tree_map(alias, tree)
