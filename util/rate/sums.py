"""Sums and means over time, in float32 at least: bfloat16 keeps 8 bits, so that a count of spikes sticks at 256."""

import torch
from torch import Tensor

from .layout import flat_steps, is_dense, like_step


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``dtype`` are summed over time: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def in_sum_type(x: Tensor) -> Tensor:
    return x.to(sum_type(x.dtype))


def mean_over_steps(steps: Tensor) -> Tensor:
    """[T, ...] -> [...], laid out in memory as one step: torch's own reductions would put out NCHW."""
    like, dtype = steps[0], sum_type(steps.dtype)
    if not is_dense(like) or steps.requires_grad:
        return steps.mean(0, dtype=dtype)
    return like_step(flat_steps(steps).mean(0, dtype=dtype), like)
