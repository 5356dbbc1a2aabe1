"""Which functions change a tensor in place, and what does the same and changes nothing."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def _signature(function: Callable) -> inspect.Signature:
    return inspect.signature(function)


def argument(function: Callable, args: tuple, kwargs: dict, name: str) -> Any:
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments.get(name)


@functools.cache
def _has_inplace(function: Callable) -> bool:
    try:
        return "inplace" in _signature(function).parameters
    except (ValueError, TypeError):
        return False


def changed_by(function: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """The tensor that the function changes in place."""
    name = function.__name__
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
    if in_place or (_has_inplace(function) and argument(function, args, kwargs, "inplace")):
        changed = next(iter((*args, *kwargs.values())), None)
        return changed if isinstance(changed, Tensor) else None
    return None


def out_of_place(function: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
    """What does the same and changes nothing."""
    name = function.__name__
    if name.startswith("__i"):
        return getattr(Tensor, f"__{name[3:]}"), args, kwargs
    if name.endswith("_") and not name.endswith("__"):
        places = (Tensor, torch, F)
        return next(getattr(p, name[:-1]) for p in places if hasattr(p, name[:-1])), args, kwargs
    if _has_inplace(function) and argument(function, args, kwargs, "inplace"):
        bound = _signature(function).bind(*args, **kwargs)
        bound.arguments["inplace"] = False
        return function, bound.args, bound.kwargs
    if function is F.instance_norm:  # the running statistics are the spikes' alone
        bound = _signature(function).bind(*args, **kwargs)
        if bound.arguments.get("use_input_stats", True):
            bound.arguments |= {"running_mean": None, "running_var": None}
        return function, bound.args, bound.kwargs
    return function, args, kwargs
