"""The rates of single layers as autograd functions: values are known from the spikes, gradients flow through rates.

A value known beforehand is handed over in a tuple, so that autograd does not take the output for a view of an input.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Linearised(Function):
    """A value of a neuron layer whose derivatives by ``sources`` are known elementwise: its rate, or its memory.

    The rate's derivative by the input current is the eligibility.

    Args:
        value: of one step's shape, in a tuple.
        slopes: for each source the derivative, of the value's shape, or a number where it is the same everywhere.
        sources: of the value's shape (or with a leading 1 more), or, as a neuron's parameters, broadcasting to it.
    """

    @staticmethod
    def forward(ctx, value: tuple[Tensor], slopes: tuple[Tensor | float, ...], *sources: Tensor) -> Tensor:
        ctx.save_for_backward(*(slope for slope in slopes if isinstance(slope, Tensor)))
        ctx.slopes = [None if isinstance(slope, Tensor) else slope for slope in slopes]
        ctx.shapes = [source.shape for source in sources]
        return value[0].data

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = iter(ctx.saved_tensors)
        slopes = [next(saved) if slope is None else slope for slope in ctx.slopes]
        needed = ctx.needs_input_grad[2:]
        grads = [
            _summed_to(grad * slope, shape) if needs else None
            for slope, shape, needs in zip(slopes, ctx.shapes, needed, strict=True)
        ]
        return None, None, *grads


def _summed_to(grad: Tensor, shape: torch.Size) -> Tensor:
    return grad.reshape(shape) if grad.numel() == shape.numel() else grad.sum_to_size(shape)


class BatchNormRate(Function):
    """BatchNorm of the mean input c with the statistics of T steps as values (doc/method/method.md).

    Args:
        c: [N, C, ...], the time mean of the layer's inputs.
        weight, bias: [C] or None.
        mean, invstd: [C], statistics over the T steps; invstd = 1 / sqrt(var + eps).
        gradients: `batch_norm_gradients`, or another that takes and gives the same: where the means over (N, ...)
            below are over the batches of all processes, that of sync_norm.py.

    The gradient of ``mean`` is that of m(c) = mean of c over (N, ...), the gradient of var that of
    q(c) = mean of (c - mean)^2. Where m(c) is ``mean`` itself this is BatchNorm's usual backward; behind a nonlinear
    layer m(c) differs, and the gradient of q(c) through its mean adds
    weight * invstd^3 * mean(grad * (c - mean)) * (m(c) - mean).
    """

    @staticmethod
    def forward(
        ctx,
        c: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        gradients: Callable,
    ) -> Tensor:
        ctx.save_for_backward(c, weight, mean, invstd)
        ctx.gradients = gradients
        return torch.native_batch_norm(c, weight, bias, mean, invstd.square().reciprocal(), False, 0.0, 0.0)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        c, weight, mean, invstd = ctx.saved_tensors
        grad_c, grad_weight, grad_bias = ctx.gradients(grad, c, weight, mean, invstd, ctx.needs_input_grad[:3])
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        return grad_c, grad_weight if needs_weight else None, grad_bias if needs_bias else None, None, None, None


def batch_norm_gradients(
    grad: Tensor, c: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`BatchNormRate`'s gradients; that of the weight is always computed."""
    needs_c, _, needs_bias = needs
    factor = torch.ones_like(mean) if weight is None else weight  # CUDA has no gradient of a weight that is not there
    grad_c, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, c, factor, None, None, mean, invstd, True, 0.0, (needs_c, True, needs_bias)
    )
    if needs_c:
        others = [d for d in range(c.dim()) if d != 1]
        per_value = grad_weight / (c.numel() / c.shape[1])  # = invstd * mean(grad * (c - mean))
        through_mean = per_value * invstd.square() * (c.mean(others) - mean)
        through_mean = through_mean if weight is None else through_mean * weight
        grad_c = grad_c + through_mean.view(-1, *[1] * (c.dim() - 2))
    return grad_c, grad_weight, grad_bias


class ConvolutionArgs(NamedTuple):
    """What torch's convolution_backward wants to know of a convolution besides its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def _rate(saved: Tensor, steps: int | None, dtype: torch.dtype) -> Tensor:
    """The rate of what was kept in its place."""
    if steps is None:
        return saved
    if dtype == torch.float64:
        return saved.to(dtype) / steps
    return torch.div(saved, steps, out=torch.empty_like(saved, dtype=dtype))  # in one pass


class ConvolutionRate(Function):
    """A convolution of rates [..., C, H, W] whose ``value`` is known: linear, so it is the mean of those of T steps.

    With ``count`` (see `rated.Rated`), of ``steps`` steps, this is kept for backward instead of ``rate``.
    """

    @staticmethod
    def forward(
        ctx,
        rate: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: tuple[Tensor],
        count: Tensor | None,
        steps: int,
        args: ConvolutionArgs | None = None,
    ) -> Tensor:
        ctx.steps = None if count is None else steps
        ctx.save_for_backward(rate if count is None else count, weight)
        ctx.args = args
        ctx.bias_size = None if bias is None else list(bias.shape)
        return value[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved, weight = ctx.saved_tensors
        rate = _rate(saved, ctx.steps, grad.dtype)
        batch_dims = grad.dim() - (weight.dim() - 1)  # of [1, B, C, ...] or [B, C, ...]
        grads = torch.ops.aten.convolution_backward(
            grad.reshape(-1, *grad.shape[batch_dims:]), rate.reshape(-1, *rate.shape[batch_dims:]), weight,
            ctx.bias_size, *ctx.args, ctx.needs_input_grad[:3],
        )  # fmt: skip
        return None if grads[0] is None else grads[0].view(rate.shape), *grads[1:], None, None, None, None


class LinearRate(ConvolutionRate):
    """A linear layer of rates [..., in] whose ``value`` [..., out] is known."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved, weight = ctx.saved_tensors
        rate = _rate(saved, ctx.steps, grad.dtype)
        needs_rate, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = grad.reshape(-1, grad.shape[-1])  # [N, out]
        return (
            grad @ weight if needs_rate else None,
            rows.T @ rate.reshape(-1, rate.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
            None,
            None,
        )
