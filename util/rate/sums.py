"""Sums over time in half precision: bfloat16 keeps 8 bits, so that a count of spikes sticks at 256."""

import torch
from torch import Tensor


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of ``dtype`` are summed over time: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def in_sum_type(x: Tensor) -> Tensor:
    return x.to(sum_type(x.dtype))
