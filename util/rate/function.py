"""The rate pass of single layers as autograd functions: values come from the spike pass, gradients flow through rates.

A value known beforehand is handed over in a tuple, so that autograd does not take the output for a view of an input.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .spike_counts import SpikeCounts


class NeuronRate(Function):
    """Output: the firing rate r, and zeros that stand for the input current.

    Backward: the gradient arriving at r times the eligibility e, plus the gradient arriving at the zeros as it is (see
    `StateValue`). ``parameters`` are the neuron's own, ``parameter_slopes`` the derivatives of r with respect to each.
    All of one step's shape.
    """

    @staticmethod
    def forward(
        ctx,
        current: Tensor,
        rate: tuple[Tensor],
        eligibility: Tensor,
        parameter_slopes: tuple[Tensor, ...],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(eligibility, *parameter_slopes)
        ctx.parameter_shapes = [p.shape for p in parameters]
        ctx.set_materialize_grads(False)
        return rate[0], current.new_zeros(()).expand(current.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_current: Tensor | None):
        if grad is None:
            return grad_current, None, None, None, *(None for _ in ctx.parameter_shapes)
        eligibility, *parameter_slopes = ctx.saved_tensors
        of_parameters = [
            (grad * slope).sum_to_size(shape)
            for slope, shape in zip(parameter_slopes, ctx.parameter_shapes, strict=True)
        ]
        of_current = grad * eligibility
        if grad_current is not None:
            of_current = of_current + grad_current
        return of_current, None, None, None, *of_parameters


class StateValue(Function):
    """A neuron's state variable [B, ...] with the gradients of ``current`` and of the neuron's own ``parameters``.

    ``slopes``: its derivatives by a constant added to the input at every step, and by each of the parameters.
    """

    @staticmethod
    def forward(
        ctx, current: Tensor, value: tuple[Tensor], slopes: tuple[Tensor | float, ...], *parameters: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*(slope for slope in slopes if isinstance(slope, Tensor)))
        ctx.slopes = [None if isinstance(slope, Tensor) else slope for slope in slopes]
        ctx.shapes = [current.shape, *(p.shape for p in parameters)]
        return value[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = iter(ctx.saved_tensors)
        of_current, *of_parameters = (grad * (next(saved) if slope is None else slope) for slope in ctx.slopes)
        shape, *shapes = ctx.shapes
        sums = (g.sum_to_size(shape) for g, shape in zip(of_parameters, shapes, strict=True))
        return of_current.reshape(shape), None, None, *sums


class Unreadable(Function):
    """A value whose derivatives by ``sources`` are not known: a gradient that arrives at it raises ``error``."""

    @staticmethod
    def forward(ctx, error: Exception, value: tuple[Tensor], *sources: Tensor) -> Tensor:
        ctx.error = error
        return value[0].detach()

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise ctx.error


class BatchNormRate(Function):
    """BatchNorm of the mean input c with the spike pass's statistics as values (method: rate pass of BatchNorm).

    Args:
        c: [N, C, ...], the time mean of the layer's inputs.
        weight, bias: [C] or None.
        mean, invstd: [C], statistics over the T steps; invstd = 1 / sqrt(var + eps).
        gradients: `batch_norm_gradients`, or another that takes and gives the same: where the means over (N, ...)
            below are over the batches of all processes, `synchronised_batch_norm_gradients`.

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
        return grad_c, grad_weight if ctx.needs_input_grad[1] else None, grad_bias, None, None, None


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


def synchronised_batch_norm_gradients(
    grad: Tensor, c: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`BatchNormRate`'s gradients with means over all processes; those of weight and bias are of this one's batch.

    One reduction, of 3 numbers a channel. With weight * invstd = scale, and xhat = (c - mean) * invstd,
    grad_c = scale * (grad - mean(grad) - invstd * mean(grad * xhat) * (c - m(c))).
    """
    needs_c, _, needs_bias = needs
    var = invstd.square().reciprocal()
    factor = torch.ones_like(mean) if weight is None else weight
    grad_c, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, c, factor, mean, var, None, None, False, 0.0, (needs_c, True, True)
    )  # as if mean and var were constants
    if needs_c:
        others, channels = [d for d in range(c.dim()) if d != 1], c.shape[1]
        count = mean.new_tensor([c.numel() // channels])
        sums = torch.cat([grad_weight, grad_bias, c.sum(others, dtype=mean.dtype), count])
        dist.all_reduce(sums)
        with_xhat, of_grad, mean_c = (sums[:-1] / sums[-1]).view(3, channels)
        scale = invstd if weight is None else invstd * weight
        slope = scale * invstd * with_xhat
        shift = slope * mean_c - scale * of_grad
        slope, shift = (x.view(-1, *[1] * (c.dim() - 2)).to(grad_c.dtype) for x in (slope, shift))
        grad_c = torch.addcmul(grad_c + shift, slope, c, value=-1)
    return grad_c, grad_weight, grad_bias if needs_bias else None


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
    """A convolution of rates [..., C, H, W] whose ``value`` is known: linear, so it is the mean of the spike pass's.

    With ``counts`` these are kept for backward instead of ``rate``.
    """

    @staticmethod
    def forward(
        ctx,
        rate: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        value: tuple[Tensor],
        counts: SpikeCounts | None,
        args: ConvolutionArgs,
    ) -> Tensor:
        saved, ctx.steps = counts or (rate, None)
        ctx.save_for_backward(saved, weight)
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
        return None if grads[0] is None else grads[0].view(rate.shape), *grads[1:], None, None, None


class LinearRate(Function):
    """A linear layer of rates [..., in] whose ``value`` [..., out] is known, as `ConvolutionRate`."""

    @staticmethod
    def forward(
        ctx, rate: Tensor, weight: Tensor, bias: Tensor | None, value: tuple[Tensor], counts: SpikeCounts | None
    ) -> Tensor:
        saved, ctx.steps = counts or (rate, None)
        ctx.save_for_backward(saved, weight)
        return value[0]

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
        )


class SpikeValue(Function):
    """The spike pass's output with the gradient of the rate pass's; of a [T, B, ...] output the T gradients add up.

    Shapes: value [B, ...] and rate [B, ...], or value [T, B, ...] and rate [1, B, ...].
    """

    @staticmethod
    def forward(ctx, rate: Tensor, value: tuple[Tensor]) -> Tensor:
        ctx.same_shape = rate.shape == value[0].shape
        return value[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return (grad if ctx.same_shape else grad.sum(0, keepdim=True)), None
