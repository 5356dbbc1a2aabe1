"""The rate pass of single layers as autograd functions: values come from the spike pass, gradients flow through rates.

A value known beforehand is handed over in a tuple, so that autograd does not take the output for a view of an input.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class NeuronRate(Function):
    """Output: the firing rate r. Backward: the incoming gradient times the eligibility e. All of one step's shape."""

    @staticmethod
    def forward(ctx, current: Tensor, rate: tuple[Tensor], eligibility: Tensor) -> Tensor:
        ctx.save_for_backward(eligibility)
        return rate[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (eligibility,) = ctx.saved_tensors
        return grad * eligibility, None, None


class BatchNormRate(Function):
    """BatchNorm of the mean input c with the spike pass's statistics as values (method: rate pass of BatchNorm).

    Args:
        c: [N, C, ...], the time mean of the layer's inputs.
        weight, bias: [C] or None.
        mean, invstd: [C], statistics over the T steps; invstd = 1 / sqrt(var + eps).

    The gradients of mean and variance are those of c's own statistics. As c's mean over (N, ...) is ``mean`` itself,
    this is BatchNorm's usual backward evaluated with ``mean`` and ``invstd``.
    """

    @staticmethod
    def forward(ctx, c: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor) -> Tensor:
        ctx.save_for_backward(c, weight, mean, invstd)
        return torch.native_batch_norm(c, weight, bias, mean, invstd.square().reciprocal(), False, 0.0, 0.0)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        c, weight, mean, invstd = ctx.saved_tensors
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, c, weight, None, None, mean, invstd, True, 0.0, ctx.needs_input_grad[:3]
        )
        return *grads, None, None


class ConvolutionArgs(NamedTuple):
    """What torch's convolution_backward wants to know of a convolution besides its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class ConvolutionRate(Function):
    """A convolution of rates [N, C, ...] whose ``value`` is known: linear, so it is the spike pass's mean output."""

    @staticmethod
    def forward(
        ctx, rate: Tensor, weight: Tensor, bias: Tensor | None, value: tuple[Tensor], args: ConvolutionArgs
    ) -> Tensor:
        ctx.save_for_backward(rate, weight)
        ctx.args = args
        ctx.bias_size = None if bias is None else list(bias.shape)
        return value[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rate, weight = ctx.saved_tensors
        grads = torch.ops.aten.convolution_backward(
            grad, rate, weight, ctx.bias_size, *ctx.args, ctx.needs_input_grad[:3]
        )
        return *grads, None, None


class LinearRate(Function):
    """A linear layer of rates [..., in] whose ``value`` [..., out] is known, as `ConvolutionRate`."""

    @staticmethod
    def forward(ctx, rate: Tensor, weight: Tensor, bias: Tensor | None, value: tuple[Tensor]) -> Tensor:
        ctx.save_for_backward(rate, weight)
        return value[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rate, weight = ctx.saved_tensors
        needs_rate, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rows = grad.flatten(0, -2)  # [N, out]
        return (
            grad @ weight if needs_rate else None,
            rows.T @ rate.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )
