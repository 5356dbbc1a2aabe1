"""Dropout in the two passes: the rate pass repeats the masks of the spike pass."""

from typing import NamedTuple

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .registry import rule_for
from .rule import MemoryRule, Rule
from .sums import sum_type


@rule_for(layer.Dropout, subclasses=True)  # Dropout2d derives from it
class SharedDropoutRule(MemoryRule):
    """SpikingJelly's dropout: one mask for all steps, kept by the module until it is reset, and so for both passes."""

    knows_time = False

    def spike(self, x: Tensor, record: None) -> tuple[Tensor, None]:
        return self.original_forward(x), None

    def rate(self, x: Tensor, record: None, one_step: bool) -> Tensor:
        return self.original_forward(x)

    def probe(self, x: Tensor) -> Tensor:
        return x


class Masks(NamedTuple):
    """What a dropout layer has drawn: summed over time, or as a whole where its leading dimension may not be time."""

    sum: Tensor | None
    whole: Tensor | None


@rule_for(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
class DropoutRule(Rule):
    """Dropout with a mask of its own at every step: the record is the sum over time of the masks, one step's size.

    The rate pass multiplies by the mean over time of the very masks of the spike pass. They are drawn once: on a GPU a
    generator in the same state draws another mask for a tensor that lies otherwise in memory.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        return (super().forward if self.module.training else self.original_forward)(*args, **kwargs)

    def spike(self, x: Tensor, record: Masks | None) -> tuple[Tensor, Masks]:
        mask = self.original_forward(torch.ones_like(x))  # 0 or 1 / (1 - p), of x's layout, by which draws are ordered
        y = x.mul_(mask) if self.module.inplace else x * mask
        steps = self.setting.steps_per_call
        if steps > 1 and (len(x) % steps or len(x) == self.session.window.batch_size):
            return y, Masks(None, mask)  # it may stand behind the network's own time average
        mask = mask.unflatten(0, (steps, -1)).sum(0, dtype=sum_type(mask.dtype))
        return y, Masks(mask if record is None else record.sum.add_(mask), None)

    def rate(self, x: Tensor, record: Masks, one_step: bool) -> Tensor:
        total, mask = record
        if one_step and total is None:
            total = mask.unflatten(0, (self.setting.steps_per_call, -1)).sum(0, dtype=sum_type(mask.dtype))
        if one_step:
            mask = (total / self.setting.time_step).to(x.dtype)
        elif mask is None:
            raise self._unsupported(
                "it stands behind the network's time average with a leading dimension that may be time: put it in front"
            )
        return x.mul_(mask) if self.module.inplace else x * mask

    def probe(self, x: Tensor) -> Tensor:
        return x
