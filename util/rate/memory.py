"""A neuron's state variables as its surroundings read them, the membrane potential above all: with gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Memory(dict):
    """Stands in for the dict in which SpikingJelly keeps a neuron's state variables, while the hooks are on.

    What the hooks leave there has no graph. Read where gradients are recorded, as in ``net.fire.v``, it has the
    gradient that it is `left` with.
    """

    def __init__(self, values: dict[str, Any], left: tuple[str, ...] = ()):
        """``left``: the names of those that the hooks have left, in a network of which this is a copy."""
        super().__init__(values)
        self.forget()
        for name in left:
            self._left[name] = values[name], Tensor.detach

    def forget(self) -> None:
        """What is there is plain: of no step, or on purpose without a past."""
        self._left: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {}

    def leave(self, name: str, value: Tensor, with_graph: Callable[[Tensor], Tensor]) -> None:
        """A step, or all of them, has left the ``value``, a tensor."""
        super().__setitem__(name, value)
        self._left[name] = value, with_graph

    def is_left(self) -> bool:
        """Whether the hooks have left something that is still there."""
        return any(super(Memory, self).__getitem__(name) is value for name, (value, _) in self._left.items())

    def plain(self, name: str) -> Any:
        return super().__getitem__(name)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        left, with_graph = self._left.get(name, (None, None))
        return with_graph(value) if value is left and torch.is_grad_enabled() else value

    def __reduce__(self):
        """Of a copy what is left has no graph."""
        return Memory, (dict(self), tuple(self._left))
