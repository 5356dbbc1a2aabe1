"""What functions that treat each step alike (table.py) put out, with its rate: what they make of rates."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .in_place import argument, changed_by, out_of_place
from .leaves import Leaves
from .rated import Rated, mean_of_steps, rated, tagged, with_rate
from .table import LINEAR, NONLINEAR, SHAPES


def alike(function: Callable, args: tuple, kwargs: dict) -> Any:
    """What the function makes of its arguments, with its rate; NotImplemented where it may not treat steps alike."""
    if not args:
        first, *_ = kwargs
        args, kwargs = (kwargs[first],), {name: value for name, value in kwargs.items() if name != first}
    if special := _SPECIAL.get(function):
        return special(function, args, kwargs) if rated(args[0]) else NotImplemented
    linear = function in LINEAR
    condition = LINEAR[function] if linear else NONLINEAR.get(function)
    if condition is None or kwargs.get("out") is not None:
        return NotImplemented
    changed = changed_by(function, args, kwargs)
    if changed is not None and (rated(changed) is None or not torch.is_grad_enabled()):
        return NotImplemented  # without gradients its graph stays what it is
    leaves = Leaves.of(args, kwargs)
    first, tag = next((x, tag) for x in leaves.values if (tag := rated(x)))
    time = tag.dim - first.dim()
    rates = [_aligned_rate(x, first, tag, time) if isinstance(x, Tensor) else x for x in leaves.values]
    if any(x is NotImplemented for x in rates) or not condition(function, args, kwargs, time):
        return NotImplemented
    of_rates, rate_args, rate_kwargs = out_of_place(function, *leaves.arguments(rates))
    with torch.set_grad_enabled(linear and torch.is_grad_enabled()):
        y = function(*args, **kwargs)
    torch.clear_autocast_cache()  # of casts without a graph (torch 2.3)
    if changed is None and any(y is x for x in leaves.values):
        return y
    if isinstance(y, Tensor) and linear and not (y.is_floating_point() or y.is_complex()) and first.is_floating_point():
        return y  # a cast that a rate would not survive
    return _put(y, of_rates(*rate_args, **rate_kwargs), tag, time, linear, changed)


def _aligned_rate(x: Tensor, first: Tensor, tag: Rated, time: int) -> Tensor:
    """The rate of an operand, or what stands for it where it is the same at every step."""
    rows, size = tag.rate.shape[time], first.shape[time]
    if own := rated(x):
        alike_in_time = own.dim - x.dim() == time and x.shape[time] == size and own.windows == tag.windows
        if alike_in_time and own.rate.shape[time] == rows:
            return own.rate
    elif x.dim() < -time or x.shape[time] == 1:
        return x
    elif x.shape[time] == size and x.stride(time) == 0:
        return x.narrow(time, 0, rows)
    elif x.shape[time] == size and getattr(x, "_mask", None) == x._version and time == -first.dim():
        return mean_of_steps(x, tag.steps(first), tag.windows).to(x.dtype)
    return NotImplemented


def _put(y: Any, rate: Any, tag: Rated, time: int, linear: bool, changed: Tensor | None) -> Any:
    """The output, or each of several, with its rate; ``linear``: it has a graph of its own."""
    if isinstance(y, (tuple, list)):
        items = [_put(a, b, tag, time, linear, changed) for a, b in zip(y, rate, strict=True)]
        return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)
    if not isinstance(y, Tensor):
        return y
    longer = [d for d, (a, b) in enumerate(zip(y.shape, rate.shape, strict=True)) if a != b]
    dim = longer[0] if longer else max(0, y.dim() + time)
    if linear or not (y.is_floating_point() or y.is_complex()):
        return tagged(y, rate, dim, tag.windows)
    return with_rate(y, rate, dim, tag.windows, changed=changed)


def _reshaped(function: Callable, args: tuple, kwargs: dict) -> Any:
    """In row-major order a step stays together: time leads in the dimension that has as many values in front of it."""
    x = args[0]
    tag = rated(x)
    outer, of_window, dtype = math.prod(x.shape[: tag.dim]), tag.steps(x), x.dtype
    y = function(*args, **kwargs)
    if y.dtype != dtype:
        return y
    for d in range(y.dim()):
        if math.prod(y.shape[:d]) == outer and y.shape[d] and y.shape[d] % (of_window * tag.windows) == 0:
            shape = [*y.shape[:d], y.shape[d] // of_window, *y.shape[d + 1 :]]
            count = None if tag.count is None else tag.count.reshape(shape)
            return tagged(y, tag.rate.reshape(shape), d, tag.windows, count)
    return y


def _item(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Of an index that takes all of time, and with one tensor at most."""
    x, index = args
    tag, index = rated(x), index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        at = next(n for n, i in enumerate(index) if i is Ellipsis)
        others = sum(_indexed(i) for i in index) - 1
        index = (*index[:at], *[slice(None)] * (x.dim() - others), *index[at + 1 :])
    front = index[: tag.dim + 1]
    chosen = [i for i in index if isinstance(i, (Tensor, list))]
    all_of_time = all(isinstance(i, slice) and i == slice(None) for i in front)
    if any(isinstance(i, bool) for i in index) or not all_of_time or len(chosen) > 1 or any(rated(i) for i in chosen):
        return NotImplemented
    return tagged(x[index], tag.rate[index], tag.dim, tag.windows)


def _indexed(i: Any) -> int:
    """How many dimensions a part of an index takes."""
    if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
        return i.dim()
    return int(i is not None)


def _expanded(function: Callable, args: tuple, kwargs: dict) -> Any:
    x, tag = args[0], rated(args[0])
    y, time = x.expand(*args[1:], **kwargs), tag.dim - x.dim()
    if y.shape[time] != x.shape[time]:
        return y
    shape = list(y.shape)
    shape[time] = tag.rate.shape[time]
    return tagged(y, tag.rate.expand(shape), y.dim() + time, tag.windows)


def _attention(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Among the tokens of a step, [tokens, T * B, features]."""
    tokens, others = args[:3], args[3:]
    tag = rated(tokens[0])
    tags = [rated(x) for x in tokens]
    given = [argument(function, args, kwargs, name) for name in ("key_padding_mask", "bias_k", "static_k")]
    mask, dropout = (argument(function, args, kwargs, name) for name in ("attn_mask", "dropout_p"))
    alike = all(t is not None and t.dim == 1 and x.dim() == 3 for x, t in zip(tokens, tags, strict=True))
    drops = dropout and argument(function, args, kwargs, "training")
    if not alike or drops or any(x is not None for x in given) or (mask is not None and mask.dim() > 2):
        return NotImplemented
    with torch.no_grad():
        y = function(*args, **kwargs)
    return _put(y, function(*(t.rate for t in tags), *others, **kwargs), tag, -2, False, None)


_SPECIAL = {
    **dict.fromkeys(SHAPES, _reshaped),
    Tensor.__getitem__: _item,
    Tensor.expand: _expanded,
    F.multi_head_attention_forward: _attention,
}
