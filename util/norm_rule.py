"""How normalisation layers behave in the two passes: values by the spike pass's statistics, gradients by the rates'."""

import math

import torch
from torch import Tensor, nn

from util.compiled import batch_norm_compiled
from util.rate_function import BatchNormRate
from util.rate_rule import Rule


class BatchNormRule(Rule):
    """BatchNorm in training: the record holds the sums over steps of mu_t and of 1 / (var_t + eps), and their number.

    Running statistics are updated here alone, as PyTorch's own forward updates them for all the steps of a call.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        uses_batch_statistics = self.module.training or self.module.running_mean is None
        return (super().forward if uses_batch_statistics else self.original_forward)(*args, **kwargs)

    def spike(self, x: Tensor, record: tuple | None) -> tuple[Tensor, tuple]:
        module = self.module
        values = x.numel() // module.num_features  # of a channel
        if values == 1:
            raise ValueError(
                f"{self.name!r}: BatchNorm needs more than 1 value per channel to train, got {list(x.shape)}"
            )
        momentum = 0.0
        if module.training and module.track_running_stats:
            module.num_batches_tracked.add_(1)
            momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        if self.owner.static.holds(x):
            y, mean, invstd = self.owner.static.once((self, self.calls), x, self._normalise)
        else:
            y, mean, invstd = self._normalise(x)
        if momentum:
            self._update_running(mean, invstd, momentum, values)
        mean_sum, precision_sum, count = record or (0.0, 0.0, 0)
        return y, (mean_sum + mean, precision_sum + invstd.square(), count + 1)

    def _normalise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the batch's mean and 1 / sqrt(var + eps) of each channel."""
        weight, bias, eps, flat = self.module.weight, self.module.bias, self.module.eps, self._flat(x)
        found = batch_norm_compiled(flat, weight, bias, eps) if self.owner.compiled else None
        y, mean, invstd = found or torch.native_batch_norm(flat, weight, bias, None, None, True, 0.0, eps)
        return y.view(x.shape), mean, invstd

    def _update_running(self, mean: Tensor, invstd: Tensor, momentum: float, values: int) -> None:
        """PyTorch's update, from the statistics of ``values`` values a channel."""
        var = (invstd.square().reciprocal() - self.module.eps).clamp_min(0) * (values / (values - 1))
        self.module.running_mean.lerp_(mean.to(self.module.running_mean.dtype), momentum)
        self.module.running_var.lerp_(var.to(self.module.running_var.dtype), momentum)

    def rate(self, x: Tensor, record: tuple, one_step: bool) -> Tensor:
        mean_sum, precision_sum, count = record
        mean, invstd = mean_sum / count, (precision_sum / count).sqrt()
        return BatchNormRate.apply(self._flat(x), self.module.weight, self.module.bias, mean, invstd).view(x.shape)

    def probe(self, x: Tensor) -> Tensor:
        return x  # batch statistics are common to all steps

    def _flat(self, x: Tensor) -> Tensor:
        """[T, B, C, ...] -> [T * B, C, ...] where the module is one of SpikingJelly's in multi-step mode."""
        return x.flatten(0, 1) if getattr(self.module, "step_mode", "s") == "m" else x


class SampleNormRule(Rule):
    """GroupNorm and LayerNorm: BatchNorm's rate pass, with the statistics of a group or row in place of a channel's.

    The spike pass normalises every step by its own mu_t and var_t. In the rate pass the mean input c is normalised by
    mu = mean over t of mu_t and 1 / (var + eps) = mean over t of 1 / (var_t + eps), as values, with the gradients of
    the mean and variance of c. (The paper does not speak of these layers. Normalising c by its own variance would
    enlarge gradients by up to sqrt(T): the mean of T steps varies less than each step does.)

    The record holds the sums over steps of mu_t and of 1 / (var_t + eps), for each row of values normalised together.
    """

    def spike(self, x: Tensor, record: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self.original_forward(x)
        if x.shape[0] % self.owner.steps_per_call:
            return y, None  # no time steps: the layer stands behind the network's own time average
        rows = x.to(y.dtype).reshape(self.owner.steps_per_call, -1, self._row_length(x))  # [T or 1, rows, D]
        var, mean = torch.var_mean(rows, -1, correction=0)
        sums = torch.stack([mean.sum(0), (var + self.module.eps).reciprocal().sum(0)])  # [2, rows]
        return y, sums if record is None else record + sums

    def rate(self, x: Tensor, record: Tensor | None, one_step: bool) -> Tensor:
        if not one_step:
            return self.original_forward(x)
        mean, precision = record / self.owner.time_step
        x, module = x.to(record.dtype), self.module
        normalised = BatchNormRate.apply(
            x.reshape(1, -1, self._row_length(x)), None, None, mean, precision.sqrt()
        ).view(x.shape)
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
