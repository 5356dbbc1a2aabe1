"""The rules of layers: convolutions and linear maps, dropout; those of normalisations are in norms.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .function import ConvolutionArgs, ConvolutionRate, LinearRate
from .rule import Rule, rule_for


class LinearMap(Rule):
    """Being linear, what it makes of the rate is the mean of its outputs: no forward is computed twice."""

    def spike(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        y = self.original(x, *args, **kwargs)
        return y, self.mean(y)

    def _typed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """In the value's type, which under autocast is not the parameters'."""
        return x.to(self.dtype), weight.to(self.dtype), None if bias is None else bias.to(self.dtype)


@rule_for(F.linear)
class Linear(LinearMap):
    def serves(self, x: Tensor, *args, **kwargs) -> bool:
        return x.dim() > 1 and (args[0] if args else kwargs["weight"]).dim() == 2

    def rate(self, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return LinearRate.apply(*self._typed(x, weight, bias), (mean.to(self.dtype),), self.count, self.steps)


@rule_for(torch.conv1d, torch.conv2d, torch.conv3d)
class Convolution(LinearMap):
    def serves(self, x: Tensor, weight: Tensor, *args, **kwargs) -> bool:
        return x.dim() == weight.dim() and self._geometry(weight, *args, **kwargs) is not None

    def rate(self, x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Tensor:
        geometry = self._geometry(weight, bias, *args, **kwargs)
        typed = self._typed(x, weight, bias)
        return ConvolutionRate.apply(*typed, (mean.to(self.dtype),), self.count, self.steps, geometry)

    @staticmethod
    def _geometry(
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> ConvolutionArgs | None:
        """None where zeros are padded to one side more."""
        n = weight.dim() - 2
        dilation = _each(dilation, n)
        if padding == "same":
            both = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(p % 2 for p in both):
                return None
            padding = tuple(p // 2 for p in both)
        padding = 0 if padding == "valid" else padding
        return ConvolutionArgs(_each(stride, n), _each(padding, n), dilation, False, (0,) * n, groups)


@rule_for(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
class TransposedConvolution(Convolution):
    @staticmethod
    def _geometry(
        weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> ConvolutionArgs:  # fmt: skip
        n = weight.dim() - 2
        return ConvolutionArgs(
            *(_each(x, n) for x in (stride, padding, dilation)), True, _each(output_padding, n), groups
        )


def _each(x: int | tuple[int, ...], n: int) -> tuple[int, ...]:
    return (x,) * n if isinstance(x, int) else tuple(x) * (n if len(x) == 1 else 1)


@rule_for(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
class Dropout(Rule):
    """Dropout with a mask of its own at every step: the record is the mean over time of the very masks drawn."""

    def serves(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
        return training

    def spike(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[Tensor, Tensor]:
        mask = self.original(torch.ones_like(x), p)  # 0 or 1 / (1 - p), of x's layout, by which draws are ordered
        return x.mul_(mask) if inplace else x * mask, self.mean(mask)

    def rate(self, x: Tensor, mask: Tensor, *args, **kwargs) -> Tensor:
        return x * mask.to(x.dtype)
