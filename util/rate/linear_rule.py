"""Convolutions and linear layers in the two passes."""

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .compiled import mean_over_steps_compiled
from .function import ConvolutionArgs, ConvolutionRate, LinearRate
from .registry import rule_for
from .rule import Rule
from .sums import in_sum_type, mean_over_steps

_CONVOLUTIONS = [
    getattr(place, f"Conv{kind}{n}d") for place in (nn, layer) for kind in ("", "Transpose") for n in (1, 2, 3)
]


@rule_for(nn.Linear, layer.Linear, *_CONVOLUTIONS)
class LinearMapRule(Rule):
    """Convolutions and linear layers: the record is the mean over time of the outputs, so far, and their type.

    Being linear, the layer's output for the mean input, its value in the rate pass, is the mean of its outputs: no
    forward is computed twice.
    """

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or explicit_padding(module) is not None

    def forward(self, *args, **kwargs) -> Tensor:
        if len(args) + len(kwargs) > 1:  # a transposed convolution's output_size: run as any differentiable layer
            return self.original_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def spike(self, x: Tensor, record: tuple | None) -> tuple[Tensor, tuple | None]:
        (y,) = self.once_if_static(x, lambda x: (self.original_forward(x),))
        steps = self.unfold_steps(y)
        if steps is None:
            return y, None
        if self.setting.steps_per_call > 1:
            return y, ((mean_over_steps_compiled if self.setting.compiled else mean_over_steps)(steps), y.dtype)
        part = 1 / self.setting.time_step
        return y, (in_sum_type(y) * part if record is None else record[0].add_(y, alpha=part), y.dtype)

    def rate(self, x: Tensor, record: tuple | None, one_step: bool) -> Tensor:
        if not one_step:
            return self.original_forward(x)
        mean, dtype = record
        value = mean.to(dtype)
        module = self.module
        weight, bias = module.weight.to(value.dtype), None if module.bias is None else module.bias.to(value.dtype)
        counts = self.session.window.counts.of(x)
        x = x.to(value.dtype)  # which under autocast is not the parameters'
        if isinstance(module, nn.Linear):
            return LinearRate.apply(x, weight, bias, (value,), counts)
        args = ConvolutionArgs(
            module.stride,
            explicit_padding(module),
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
        )
        return ConvolutionRate.apply(x, weight, bias, (value,), counts, args)


def explicit_padding(module: nn.Module) -> tuple[int, ...] | None:
    """A convolution's zeros on each side of each dimension; None where it pads otherwise, or one side more."""
    if module.padding_mode != "zeros":
        return None
    if module.padding == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(p % 2 for p in both) else tuple(p // 2 for p in both)
    return (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding
