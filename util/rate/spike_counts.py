"""Firing rates as the counts of spikes that they are made of: a byte where the rate takes four."""

from typing import NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class SpikeCounts(NamedTuple):
    """The rate is ``count / steps``."""

    count: Tensor  # uint8, of the rate's shape
    steps: int


class CountsOfRates:
    """The counts of the rates that neurons put out in a rate pass, for linear maps that get one as it left them."""

    def __init__(self):
        self._known = WeakTensorKeyDictionary()

    def add(self, rate: Tensor, counts: SpikeCounts) -> None:
        self._known[rate] = counts, rate._version

    def of(self, x: Tensor) -> SpikeCounts | None:
        """None where ``x`` is no rate, or one that was changed in place since."""
        counts, version = self._known.get(x, (None, None))
        return counts if version == x._version else None
