"""Arguments of a network that have no time dimension: conditions, diffusion steps, a dict that its forward fills."""

import inspect
from collections.abc import Callable
from typing import Any


def check_names(forward: Callable, names: tuple[str, ...]) -> None:
    """Raises ValueError where ``forward`` has no argument of one of the names."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    if unknown := [name for name in names if name not in parameters]:
        raise ValueError(f"timeless: forward has no argument {unknown[0]!r}, but {', '.join(map(repr, parameters))}")


def timeless_values(forward: Callable, names: tuple[str, ...], args: tuple, kwargs: dict) -> list[Any]:
    """The arguments of the ``names`` in a call of ``forward``."""
    if not names:
        return []
    positional = zip(inspect.signature(forward).parameters, args, strict=False)
    return [value for name, value in (*positional, *kwargs.items()) if name in names]
