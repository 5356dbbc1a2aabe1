"""How tensors lie in memory: the elements of a layer's steps seen as [T, N], whatever their shape."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie in memory without gaps and apart, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_usual(x: Tensor) -> bool:
    """Whether ``x`` lies in memory as torch.stack lays out such steps: contiguous, or channels_last."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def reshaped(tree: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """The memory of tensors seen in another shape. Not as views: compiled code is made anew for each base of a view."""

    def alias(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim():
            return x
        same = torch.empty(0, dtype=x.dtype, device=x.device)
        return same.set_(x.untyped_storage(), x.storage_offset(), shape, strides)

    return tree_map(alias, tree)


def flat_steps(steps: Tensor) -> Tensor:
    """[T, ...] whose steps are dense -> [T, N], in the order of memory; a step that is repeated stays so."""
    return reshaped(steps, (len(steps), steps[0].numel()), (steps.stride(0), 1))


def like_step(flat: Tensor, like: Tensor) -> Tensor:
    """[N] or [T, N], in the order of memory -> as ``like``, one step, or as T of them."""
    if flat.dim() == 1:
        return reshaped(flat, like.shape, like.stride())
    return reshaped(flat, (len(flat), *like.shape), (flat.stride(0), *like.stride()))
