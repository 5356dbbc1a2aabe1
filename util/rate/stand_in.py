"""A method of one module, replaced for as long as the hooks are on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class StandIn:
    module: nn.Module
    name: str
    method: Callable  # what stands in
    previous: Callable | None  # what the instance itself had under that name; mostly its class has it alone

    @classmethod
    def put(cls, module: nn.Module, name: str, method: Callable) -> "StandIn":
        stand_in = cls(module, name, method, vars(module).get(name))
        setattr(module, name, method)
        return stand_in

    @property
    def original(self) -> Callable:
        """The method that was replaced. Not kept bound: unpickling would bind the one that replaces it."""
        return self.previous or getattr(type(self.module), self.name).__get__(self.module)

    def remove(self) -> None:
        """Puts back what was there; a wrapper that a user has put around the method since stays."""
        if vars(self.module).get(self.name) != self.method:
            return
        delattr(self.module, self.name)
        if self.previous is not None:
            setattr(self.module, self.name, self.previous)


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1
