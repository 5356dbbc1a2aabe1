"""Dropout in the two passes: the rate pass repeats the masks of the spike pass."""

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .draws import Mask, mean_mask
from .registry import rule_for
from .rule import MemoryRule, Rule


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


@rule_for(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
class DropoutRule(Rule):
    """Dropout with a mask of its own at every step: the record is the random state before each draw, and its layout.

    The rate pass multiplies by the mean over time of the very masks of the spike pass.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        return (super().forward if self.module.training else self.original_forward)(*args, **kwargs)

    def spike(self, x: Tensor, record: list[Mask] | None) -> tuple[Tensor, list[Mask]]:
        mask = Mask.before(self.original_forward, x)
        return self.original_forward(x), [*(record or []), mask]

    def rate(self, x: Tensor, record: list[Mask], one_step: bool) -> Tensor:
        mask = mean_mask(record, self.setting.steps_per_call) if one_step else record[0].again()
        return x.mul_(mask) if self.module.inplace else x * mask

    def probe(self, x: Tensor) -> Tensor:
        return x
