"""Arguments of a network that have no time dimension: conditions, diffusion steps, a dict that its forward fills."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True, eq=False)
class Timeless:
    """Such an argument among the others, of which it is one leaf whatever it holds."""

    value: Any
    before: Any  # a copy of a dict or list, before forward fills it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Timeless) and self.value is other.value


def check_names(forward: Callable, names: tuple[str, ...]) -> None:
    """Raises ValueError where ``forward`` has no argument of one of the names."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"timeless: forward has no argument {unknown[0]!r}, but {', '.join(map(repr, parameters))}")


def marked(forward: Callable, names: tuple[str, ...], args: tuple, kwargs: dict, tensors: bool) -> tuple[tuple, dict]:
    """The arguments of a call of ``forward``, those of the ``names`` as `Timeless`; tensors only with ``tensors``."""
    if not names:
        return args, kwargs

    def mark(name: str | None, value: Any) -> Any:
        if name not in names or (isinstance(value, Tensor) and not tensors):
            return value
        return Timeless(value, _copied(value))

    positional = dict(enumerate(inspect.signature(forward).parameters))
    args = tuple(mark(positional.get(i), value) for i, value in enumerate(args))
    return args, {name: mark(name, value) for name, value in kwargs.items()}


def as_given(inputs: tuple[tuple, dict], same_containers: bool = False) -> tuple[tuple, dict]:
    """The arguments of a call without marks; of dicts and lists that were marked copies, or the user's own."""

    def given(x: Any) -> Any:
        if not isinstance(x, Timeless):
            return x
        return x.value if same_containers else _copied(x.before)

    args, kwargs = inputs
    return tuple(map(given, args)), {name: given(x) for name, x in kwargs.items()}


def _copied(x: Any) -> Any:
    """Its dicts and lists copied, what they hold the same."""
    return tree_map(lambda y: y, x)
