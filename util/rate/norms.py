"""The rules of normalisations: the steps' statistics as values, with the gradients of the rates'."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import batch_norm_compiled, batch_norm_gradients_compiled, update_running_compiled
from .function import BatchNormRate, batch_norm_gradients
from .rule import Rule, rule_for
from .sums import in_sum_type, sum_type
from .sync_norm import statistics, synchronised, synchronised_batch_norm_gradients, update_running, variance


@rule_for(F.batch_norm)
class BatchNorm(Rule):
    """BatchNorm by the spikes' statistics as values, with the gradients of the rates' (doc/method/method.md).

    The record holds mu_t and 1 / sqrt(var_t + eps) of each call, [C] each. In step mode 's' each step has statistics of
    its own; the rate takes the means of mu_t and of var_t. With the mean of 1 / (var_t + eps) it would explode where a
    channel is silent at one step. Running statistics are those of BPTT.
    """

    def serves(self, x: Tensor, *args, **kwargs) -> bool:
        *by_channel, training, _, _ = _batch_norm_arguments(*args, **kwargs)
        return training and x.dim() > 1 and all(p is None or p.numel() == x.shape[1] for p in by_channel)

    def spike(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        running_mean, running_var, weight, bias, _, momentum, eps = _batch_norm_arguments(*args, **kwargs)
        F._verify_batch_size(x.shape)
        compiled = self.setting.compiled and all(
            p is None or p.dtype == sum_type(x.dtype) for p in (weight, running_mean)
        )
        if found := compiled and batch_norm_compiled(x, weight, bias, eps):
            y, mean, invstd = found
        else:
            if weight is None and running_mean is not None:
                weight = torch.ones_like(running_mean)  # lest statistics of bfloat16 be computed in it
            running = (None, None) if self.repeats > 1 else (running_mean, running_var)
            y, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        if running_mean is not None and (found or self.repeats > 1):
            count = self.repeats * x.numel() // len(mean)
            self._update_running((running_mean, running_var), mean, invstd, eps, momentum, count)
        return y, [(mean, invstd)]

    def _update_running(self, running: tuple, mean: Tensor, invstd: Tensor, eps: float, *momentum_and_count) -> None:
        if self.setting.compiled:
            update_running_compiled(running, mean, invstd, eps, *momentum_and_count)
        else:
            update_running(running, mean, variance(invstd, eps), *momentum_and_count)

    def rate(self, x: Tensor, record: list[tuple[Tensor, Tensor]], *args, **kwargs) -> Tensor:
        _, _, weight, bias, *_ = _batch_norm_arguments(*args, **kwargs)
        mean, invstd = record[0] if len(record) == 1 else _pooled(record)
        gradients = batch_norm_gradients_compiled if self.setting.compiled else batch_norm_gradients
        return BatchNormRate.apply(x, weight, bias, mean, invstd, gradients)

    def together(self, earlier: list | None, record: list) -> list:
        return (earlier or []) + record

    def again(self, record: list, x: Tensor, *args, **kwargs) -> None:
        ((mean, invstd),) = record
        running_mean, running_var, _, _, _, momentum, eps = _batch_norm_arguments(*args, **kwargs)
        if running_mean is not None:
            self._update_running((running_mean, running_var), mean, invstd, eps, momentum, x.numel() // len(mean))


def _batch_norm_arguments(
    running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> tuple:  # fmt: skip
    return running_mean, running_var, weight, bias, training, momentum, eps


def _pooled(statistics: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of several steps together: the means of theirs, of var + eps."""
    means, invstds = (in_sum_type(torch.stack(values)) for values in zip(*statistics, strict=True))
    dtype = statistics[0][0].dtype
    return means.mean(0).to(dtype), invstds.square().reciprocal().mean(0).rsqrt().to(dtype)


@rule_for(synchronised)
class SynchronisedBatchNorm(BatchNorm):
    """By the statistics of all processes."""

    def serves(self, x: Tensor, *args) -> bool:
        return True

    def spike(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running) -> tuple[Tensor, list]:
        mean, invstd, count = statistics(x, *running, self.repeats)
        y = torch.native_batch_norm(x, weight, bias, mean, invstd.square().reciprocal(), False, 0.0, 0.0)[0]
        return y, [(mean, invstd, count)]

    def again(self, record: list, x: Tensor, weight: Tensor | None, bias: Tensor | None, *running) -> None:
        ((mean, invstd, count),) = record
        running_mean, running_var, momentum, eps = running
        if momentum is not None:
            update_running((running_mean, running_var), mean, variance(invstd, eps), momentum, count)

    def rate(self, x: Tensor, record: list, weight: Tensor | None, bias: Tensor | None, *running) -> Tensor:
        mean, invstd = record[0][:2] if len(record) == 1 else _pooled([statistics[:2] for statistics in record])
        return BatchNormRate.apply(x, weight, bias, mean, invstd, synchronised_batch_norm_gradients)


class SampleNorm(Rule):
    """GroupNorm and LayerNorm: BatchNorm's rate, with the statistics of a group or row in place of a channel's.

    Every step is normalised by its own mu_t and var_t, the rate c by mu = mean over t of mu_t and var = mean over t of
    var_t, as values, with the gradients of the mean and variance of c. (The paper does not speak of these layers.
    Normalising c by its own variance would enlarge gradients by up to sqrt(T): the mean of T steps varies less than
    each step does.)

    The record holds mu and var + eps, for each row of values normalised together.
    """

    @staticmethod
    def row_length(x: Tensor, size: Any) -> int:
        """``size``: the function's second argument."""
        raise NotImplementedError

    @staticmethod
    def parameter_shape(x: Tensor, p: Tensor) -> tuple[int, ...]:
        """In which a weight or bias broadcasts to ``x``."""
        return p.shape

    def spike(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        size, _, _, eps = _norm_arguments(*args, **kwargs)
        y = self.original(x, *args, **kwargs)
        rows = in_sum_type(x).reshape(len(x), -1, self.row_length(x, size))
        var, mean = torch.var_mean(rows, -1, correction=0)  # [T * B, rows]
        return y, (self.mean(mean), self.mean(var + eps))

    def rate(self, x: Tensor, record: tuple[Tensor, Tensor], *args, **kwargs) -> Tensor:
        size, weight, bias, _ = _norm_arguments(*args, **kwargs)
        mean, var = (statistic.flatten() for statistic in record)
        rows = x.to(mean.dtype).reshape(1, -1, self.row_length(x, size))
        y = BatchNormRate.apply(rows, None, None, mean, var.rsqrt(), batch_norm_gradients).view(x.shape).to(self.dtype)
        weight, bias = (p if p is None else p.view(self.parameter_shape(x, p)) for p in (weight, bias))
        y = y if weight is None else y * weight
        return y if bias is None else y + bias


def _norm_arguments(
    size: Any = None, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5,
    normalized_shape: Any = None, num_groups: int | None = None,
) -> tuple:  # fmt: skip
    return size or normalized_shape or num_groups, weight, bias, eps


@rule_for(F.layer_norm)
class LayerNorm(SampleNorm):
    def serves(self, x: Tensor, *args, **kwargs) -> bool:
        return x.dim() > len(_norm_arguments(*args, **kwargs)[0])

    @staticmethod
    def row_length(x: Tensor, size: Any) -> int:
        return math.prod(size)


@rule_for(F.group_norm)
class GroupNorm(SampleNorm):
    @staticmethod
    def row_length(x: Tensor, size: int) -> int:
        return math.prod(x.shape[1:]) // size

    @staticmethod
    def parameter_shape(x: Tensor, p: Tensor) -> tuple[int, ...]:
        return (-1, *[1] * (x.dim() - 2))
