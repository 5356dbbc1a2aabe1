"""Dropout in the two passes: the rate pass repeats the masks of the spike pass."""

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

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

    def spike(self, x: Tensor, record: list | None) -> tuple[Tensor, list]:
        draw = (random_state(x.device), torch.empty_like(x, device="meta"))
        return self.original_forward(x), [*(record or []), draw]

    def rate(self, x: Tensor, record: list, one_step: bool) -> Tensor:
        if one_step:
            masks = [self._mask(x.device, *draw).unflatten(0, (self.setting.steps_per_call, -1)) for draw in record]
            mask = sum(mask.mean(0) for mask in masks) / len(record)
        else:
            mask = self._mask(x.device, *record[0])
        return x.mul_(mask) if self.module.inplace else x * mask

    def probe(self, x: Tensor) -> Tensor:
        return x

    def _mask(self, device: torch.device, state: Tensor, layout: Tensor) -> Tensor:
        """0 or 1 / (1 - p), as drawn in the spike pass; the order of the draws follows the layout in memory."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
            return self.original_forward(torch.ones_like(layout, device=device))


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that layers on ``device`` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
