"""Random numbers of the spike pass, drawn once more: from the same state of the same generator."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that layers on ``device`` draw from."""
    if device.type == "cpu":
        return torch.get_rng_state()
    backend = getattr(torch, device.type)  # torch.cuda, torch.xpu, torch.mps, of which the last knows one device
    return backend.get_rng_state() if device.type == "mps" else backend.get_rng_state(device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    elif device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        getattr(torch, device.type).set_rng_state(state, device)


@contextmanager
def drawing_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draws on ``device`` start at ``state`` for a while, and leave no trace."""
    before = random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


@dataclass(frozen=True)
class Mask:
    """What a random map of the spike pass multiplied each value of its input by.

    Attributes:
        function: the map, such as dropout; of ones it makes the mask.
        state: the generator's, before it ran.
        layout: its input, without values; the order of the draws follows it in memory.
    """

    function: Callable[[Tensor], Tensor]
    state: Tensor
    layout: Tensor
    device: torch.device

    @classmethod
    def before(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> "Mask":
        """Of the draw that ``function(x)`` is about to make."""
        return cls(function, random_state(x.device), torch.empty_like(x, device="meta"), x.device)

    def again(self) -> Tensor:
        with drawing_from(self.state, self.device), torch.no_grad():
            return self.function(torch.ones_like(self.layout, device=self.device))


def mean_mask(masks: list[Mask], steps_per_call: int) -> Tensor:
    """The mean over time of all calls' masks, [T, B, ...] or [T * B, ...] in step mode 'm'; of one step's size."""
    steps = [mask.again().unflatten(0, (steps_per_call, -1)) for mask in masks]  # [T or 1, 1 or B, ...]
    return sum(mask.mean(0) for mask in steps) / len(masks)
