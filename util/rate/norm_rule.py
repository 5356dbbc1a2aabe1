"""How normalisation layers behave in the two passes: values by the spike pass's statistics, gradients by the rates'."""

import math

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .compiled import batch_norm_compiled, batch_norm_gradients_compiled, update_running_compiled
from .function import BatchNormRate, batch_norm_gradients, synchronised_batch_norm_gradients
from .registry import rule_for
from .rule import Rule
from .sums import in_sum_type, sum_type
from .sync_norm import (
    SYNCHRONISED,
    count_batch,
    flattened,
    is_synchronised,
    statistics_of_all,
    update_running,
    uses_batch_statistics,
    variance,
)


@rule_for(*(getattr(place, f"BatchNorm{n}d") for place in (nn, layer) for n in (1, 2, 3)), *SYNCHRONISED)
class BatchNormRule(Rule):
    """BatchNorm in training: the record holds mu_t and 1 / sqrt(var_t + eps) of each call, [C] each.

    In step mode 's' each call has statistics of its own; the rate pass takes the means of mu_t and of var_t. With the
    mean of 1 / (var_t + eps) it would explode where a channel is silent at one step.
    Running statistics are updated here alone, as PyTorch's own forward updates them for all the steps of a call.
    """

    knows_time = False

    def forward(self, *args, **kwargs) -> Tensor:
        return (super().forward if uses_batch_statistics(self.module) else self.original_forward)(*args, **kwargs)

    def spike(self, x: Tensor, record: tuple | None) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        self._check(x)
        momentum, static = count_batch(self.module), self.session.window.static.contains(x)
        if is_synchronised(self.module):
            y, mean, invstd, count = self.once_if_static(x, self._normalise_with_all)
            if momentum is not None:
                steps = self.setting.steps_per_call if static else 1
                self._update_running(mean, invstd, momentum, count * steps)
        elif static or self._compiles(x):
            y, mean, invstd = self.once_if_static(x, self._normalise)
            if momentum is not None:
                self._update_running(mean, invstd, momentum, x.numel() // len(mean))
        else:
            y, mean, invstd = self._normalise(x, momentum)
        return y, (*(record or ()), (mean, invstd))

    def _check(self, x: Tensor) -> None:
        flat, channels = flattened(self.module, x), self.module.num_features
        self.module._check_input_dim(flat)
        if flat.shape[1] != channels:
            raise ValueError(f"{self.name!r}: BatchNorm of {channels} channels got {list(x.shape)}")
        if flat.numel() == channels and not is_synchronised(self.module):
            raise ValueError(
                f"{self.name!r}: BatchNorm needs more than 1 value per channel to train, got {list(x.shape)}"
            )

    def _compiles(self, x: Tensor) -> bool:
        parameters = (self.module.weight, self.module.running_mean)
        return self.setting.compiled and all(p is None or p.dtype == sum_type(x.dtype) for p in parameters)

    def _normalise(self, x: Tensor, momentum: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the batch's mean and 1 / sqrt(var + eps) of each channel.

        With ``momentum`` the running statistics are updated too.
        """
        module, flat = self.module, flattened(self.module, x)
        if momentum is None and self._compiles(x) and (found := batch_norm_compiled(flat, module)):
            y, mean, invstd = found
        else:
            weight, running = module.weight, (None, None)
            if momentum is not None:
                running = (module.running_mean, module.running_var)
            elif weight is None and module.running_mean is not None:
                weight = torch.ones_like(module.running_mean)  # lest statistics of bfloat16 be computed in it
            y, mean, invstd = torch.native_batch_norm(
                flat, weight, module.bias, *running, True, momentum or 0.0, module.eps
            )
        return y.view(x.shape), mean, invstd

    def _normalise_with_all(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_normalise`, by the statistics of all processes; and how many values a channel they are of."""
        module, flat = self.module, flattened(self.module, x)
        mean, var, count = statistics_of_all(flat)
        y = torch.native_batch_norm(flat, module.weight, module.bias, mean, var, False, 0.0, module.eps)[0]
        return y.view(x.shape), mean, (var + module.eps).rsqrt(), count

    def _update_running(self, mean: Tensor, invstd: Tensor, momentum: float, count: Tensor | int) -> None:
        if self.setting.compiled and isinstance(count, int):
            update_running_compiled(self.module, mean, invstd, momentum, count)
        else:
            update_running(self.module, mean, variance(invstd, self.module.eps), momentum, count)

    def rate(self, x: Tensor, record: tuple[tuple[Tensor, Tensor], ...], one_step: bool) -> Tensor:
        mean, invstd = record[0] if len(record) == 1 else _pooled(record)
        module, flat = self.module, flattened(self.module, x)
        gradients = batch_norm_gradients_compiled if self.setting.compiled else batch_norm_gradients
        if is_synchronised(module):
            gradients = synchronised_batch_norm_gradients
        rate = BatchNormRate.apply(flat, module.weight, module.bias, mean, invstd, gradients)
        return rate.view(x.shape)

    def probe(self, x: Tensor) -> Tensor:
        return x  # batch statistics are common to all steps


def _pooled(statistics: tuple[tuple[Tensor, Tensor], ...]) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(var + eps) of several steps together: the means of theirs, of var + eps."""
    means, invstds = (in_sum_type(torch.stack(values)) for values in zip(*statistics, strict=True))
    dtype = statistics[0][0].dtype
    return means.mean(0).to(dtype), invstds.square().reciprocal().mean(0).rsqrt().to(dtype)


@rule_for(nn.GroupNorm, layer.GroupNorm, nn.LayerNorm)
class SampleNormRule(Rule):
    """GroupNorm and LayerNorm: BatchNorm's rate pass, with the statistics of a group or row in place of a channel's.

    The spike pass normalises every step by its own mu_t and var_t. In the rate pass the mean input c is normalised by
    mu = mean over t of mu_t and var = mean over t of var_t, as values, with the gradients of
    the mean and variance of c. (The paper does not speak of these layers. Normalising c by its own variance would
    enlarge gradients by up to sqrt(T): the mean of T steps varies less than each step does.)

    The record holds the sums over steps of mu_t and of var_t + eps, for each row of values normalised together, and the
    type of the output.
    """

    def spike(self, x: Tensor, record: tuple | None) -> tuple[Tensor, tuple | None]:
        y = self.original_forward(x)
        steps = self.unfold_steps(x)
        if steps is None:
            return y, None
        rows = in_sum_type(steps).reshape(len(steps), -1, self._row_length(x))  # [T or 1, rows, D]
        var, mean = torch.var_mean(rows, -1, correction=0)
        sums = torch.stack([mean.sum(0), (var + self.module.eps).sum(0)])  # [2, rows]
        return y, (sums if record is None else record[0] + sums, y.dtype)

    def rate(self, x: Tensor, record: tuple | None, one_step: bool) -> Tensor:
        if not one_step:
            return self.original_forward(x)
        sums, dtype = record
        mean, var = sums / self.setting.time_step
        rows, module = x.to(sums.dtype).reshape(1, -1, self._row_length(x)), self.module
        normalised = (
            BatchNormRate.apply(rows, None, None, mean, var.rsqrt(), batch_norm_gradients).view(x.shape).to(dtype)
        )
        if module.weight is None:
            return normalised
        weight, bias = module.weight, module.bias
        if isinstance(module, nn.GroupNorm):  # [C] -> [C, 1, ...]
            trailing = [1] * (x.dim() - self._channel_dim() - 1)
            weight, bias = weight.view(-1, *trailing), bias.view(-1, *trailing)
        return normalised * weight if bias is None else torch.addcmul(bias, normalised, weight)

    def _row_length(self, x: Tensor) -> int:
        """How many values are normalised together."""
        if isinstance(self.module, nn.LayerNorm):
            return math.prod(self.module.normalized_shape)
        return math.prod(x.shape[self._channel_dim() :]) // self.module.num_groups

    def _channel_dim(self) -> int:
        return 2 if getattr(self.module, "step_mode", "s") == "m" else 1
