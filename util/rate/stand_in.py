"""What stands in for a method of one module while the hooks are on, and for `Function.apply` while a forward runs."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily


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


@contextmanager
def functions_shown(mode: TorchFunctionMode) -> Iterator[None]:
    """In the ``mode``, calls of users' autograd functions are shown to it, as torch shows it its own functions."""
    apply = vars(Function)["apply"]

    def shown(cls: type[Function], *args, **kwargs) -> Any:
        original = apply.__get__(None, cls)
        if _get_current_function_mode() is not mode:
            return original(*args, **kwargs)
        original = functools.partial(original)
        original.__name__ = cls.__name__
        with _pop_mode_temporarily():
            return mode.__torch_function__(original, (), args, kwargs)

    item = Tensor.__getitem__

    def shown_item(x: Tensor, index: Any) -> Tensor:
        if not isinstance(index, int) or _get_current_function_mode() is not mode:
            return item(x, index)
        with _pop_mode_temporarily():
            return mode.__torch_function__(item, (), (x, index))

    shown_item.stands_for = item  # by which torch names the function of other indices
    Function.apply = classmethod(shown)
    if not _shows_integers():
        Tensor.__getitem__ = shown_item
    try:
        yield
    finally:
        Function.apply = apply
        if "__getitem__" in vars(Tensor):
            del Tensor.__getitem__


@functools.cache
def _shows_integers() -> bool:
    """Whether torch shows a mode that a tensor is indexed by a number, as torch 2.3 does not."""
    seen = []

    class Looking(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.zeros(1)
    with Looking():
        x[0]
    return bool(seen)


def is_looking(mode: TorchFunctionMode) -> bool:
    """Whether functions that are called now are shown to the ``mode``."""
    return _get_current_function_mode() is mode


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1
