"""What travels: a value of T steps, and beside it the rate, its mean over time, through which gradients go.

A rate is of K windows of steps, [K, B, ...] for a value [T, B, ...], or [K * B, ...] for [T * B, ...]; the published
method has one window, K = 1. At K = T a rate is the value itself and the method is BPTT.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .sums import mean_over_steps, sum_type


class Rated(NamedTuple):
    """The rate of a value.

    Attributes:
        rate: has one row where the value has the steps of a window.
        dim: the dimension of both in which time leads, the batch perhaps folded behind it.
        windows: K.
        version: of the value when this was its rate: what changes it in place makes another value of it.
        count: for spikes, how many of them the rate is made of, of its shape, a byte where the rate takes four.
    """

    rate: Tensor
    dim: int
    windows: int
    version: int
    count: Tensor | None = None

    def steps(self, value: Tensor) -> int:
        """The steps of a window."""
        return value.shape[self.dim] // self.rate.shape[self.dim]


def rated(x: Any) -> Rated | None:
    """The rate that travels with ``x``; None where there is none, or where ``x`` was changed in place since."""
    found = getattr(x, "_rated", None)
    return found if found is not None and found.version == x._version else None


def rate_of(x: Tensor) -> Tensor | None:
    """The rate of a value inside a network's forward, with a graph: for penalties on rates, and for branches.

    Returns:
        [K, B, ...] for a value [T, B, ...] in step mode 'm' (K windows of rates, by default 1); [B, ...] in step mode
        's', in the call that ends a window. None in its other calls, without hooks, and of a value of which only its T
        steps are known (see `check_network`).
    """
    found, mark = rated(x), getattr(x, "_mark", None)
    if found is None:
        return None
    return found.rate if mark is None else mark.run.rate_of(found.rate)


class Value(Function):
    """The value whose mean is ``rate``: hands the gradients that arrive at the steps of a window, summed, to it.

    With ``changed``, the object that held another value before and holds this one now, changed in place.
    """

    @staticmethod
    def forward(ctx, changed: Tensor | None, rate: Tensor, value: tuple[Tensor], dim: int, windows: int) -> Tensor:
        ctx.dim, ctx.windows, ctx.rows = dim, windows, rate.shape[dim]
        ctx.of_a_view = changed is not None and changed._is_view()
        if changed is not None:
            ctx.mark_dirty(changed)
            return changed
        return value[0].data  # no view: torch forbids to change one in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # Zeros, where autograd puts them into the gradient of the whole that a view is of.
        of_changed = torch.zeros_like(grad) if ctx.of_a_view else None
        return of_changed, sum_over_steps(grad, ctx.rows, ctx.dim, ctx.windows), None, None, None


def with_rate(
    value: Tensor, rate: Tensor, dim: int, windows: int, count: Tensor | None = None, changed: Tensor | None = None
) -> Tensor:
    """``value``, which has no graph, with the gradient of ``rate``; ``changed`` as in `Value`."""
    if rate.requires_grad:
        value = Value.apply(changed, rate, (value,), dim, windows)
    return tagged(value, rate, dim, windows, count)


def tagged(value: Tensor, rate: Tensor, dim: int, windows: int, count: Tensor | None = None) -> Tensor:
    """``value``, known to have the rate; its graph stays what it is."""
    value._rated = Rated(rate, dim, windows, value._version, count)
    return value


def sum_over_steps(x: Tensor, rows: int, dim: int, windows: int) -> Tensor:
    """[.., K * n * R, ..] -> [.., K * R, ..] of ``rows`` = K * R, over the n steps of each window."""
    steps = x.shape[dim] // rows
    if steps == 1:
        return x
    return x.unflatten(dim, (windows, steps, rows // windows)).sum(dim + 1).flatten(dim, dim + 1)


def mean_of_steps(x: Tensor, steps: int, windows: int, mean=mean_over_steps) -> Tensor:
    """[K * n * R, ...] -> [K * R, ...], over the n = ``steps`` of each window, in float32 at least, in one's layout.

    ``mean``: [n, R, ...] -> [R, ...].
    """
    if steps == 1:
        return x.to(sum_type(x.dtype), copy=True)
    if windows == 1:
        return mean(x.unflatten(0, (steps, -1)))
    return torch.cat([mean(part.unflatten(0, (steps, -1))) for part in x.chunk(windows)])
