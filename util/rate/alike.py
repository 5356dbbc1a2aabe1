"""Functions that treat each step alike: the rate of what they put out is what they make of rates.

Of a nonlinear one that is what the published method takes for the mean. A function that is not here, or that touches
the dimension of time, is differentiated over the T steps: it costs memory, and no gradient is wrong.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .leaves import Leaves
from .rated import Rated, mean_of_steps, rated, tagged, with_rate

# How a function is told to treat steps alike: (function, args, kwargs, time) -> whether it does. ``time``: its
# dimension in the operands that have one, counted from the last.
Condition = Callable[[Callable, tuple, dict, int], bool]


def table(names: str, condition: Condition, *places: Any) -> dict[Callable, Condition]:
    found = (getattr(place, name, None) for name in names.split() for place in places)
    return {function: condition for function in found if function is not None}


def anywhere(function: Callable, args: tuple, kwargs: dict, time: int) -> bool:
    return True


def along(position: int) -> Condition:
    """The dimensions that the function works along, its arguments from ``position`` on, are named and not time's."""

    def condition(function: Callable, args: tuple, kwargs: dict, time: int) -> bool:
        dims = kwargs.get("dim", kwargs.get("dims", args[position] if len(args) > position else None))
        dims = dims if isinstance(dims, (tuple, list)) else [dims]
        if function is Tensor.flip and len(args) > 2:
            dims = args[1:]
        n = (args[0] if isinstance(args[0], Tensor) else args[0][0]).dim()
        return bool(dims) and all(type(d) is int and (d if d < 0 else d - n) != time for d in dims)

    return condition


def in_front_of(count: int | Callable[..., int]) -> Condition:
    """Time is in front of the last dimensions, ``count`` of them (or as the arguments tell)."""

    def condition(function: Callable, args: tuple, kwargs: dict, time: int) -> bool:
        return time < -(count if isinstance(count, int) else count(*args, **kwargs))

    return condition


def leading(function: Callable, args: tuple, kwargs: dict, time: int) -> bool:
    return args[0].dim() == -time


def products(function: Callable, args: tuple, kwargs: dict, time: int) -> bool:
    """Of matrices that differ in time, or a row of one for each step."""
    return time < -2 or (time == -2 and len(args) == 2 and args[0].dim() == 2 and rated(args[1]) is None)


_BOTH = torch, Tensor
# What they put out are sums of their operands' elements, or these in other places: autograd keeps nothing for them.
LINEAR = {
    **table("add sub rsub neg subtract add_ sub_ neg_ __add__ __radd__ __sub__ __rsub__ __iadd__ __isub__ __neg__ "
            "clone contiguous to float double half bfloat16 type type_as positive", anywhere, *_BOTH),
    **table("permute transpose swapaxes swapdims movedim moveaxis t stack", anywhere, *_BOTH),
    **table("sum cumsum unbind select narrow index_select flip cat concat", along(1), *_BOTH),
    **table("split chunk tensor_split roll", along(2), *_BOTH),
}  # fmt: skip
NONLINEAR = {
    **table("mul div multiply divide true_divide mul_ div_ __mul__ __rmul__ __imul__ __truediv__ __itruediv__ "
            "__rtruediv__ reciprocal pow __pow__ square sqrt rsqrt exp log log1p abs __abs__ sin cos tanh sigmoid erf "
            "relu relu_ clamp clamp_ clamp_min clamp_max maximum minimum where masked_fill lerp addcmul sign floor "
            "ceil round frac square_ abs_ exp_ sigmoid_ tanh_ gt ge lt le eq ne __gt__ __ge__ __lt__ __le__ __eq__ "
            "__ne__", anywhere, *_BOTH),
    **table("relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid tanh "
            "logsigmoid threshold sigmoid tanhshrink softshrink hardshrink relu_ leaky_relu_ elu_ hardtanh_",
            anywhere, F),
    **table("softmax log_softmax", along(1), *_BOTH, F),
    **table("mean amax amin prod var std logsumexp max min cumprod argmax argmin", along(1), *_BOTH),
    **table("normalize", along(2), F),
    **table("matmul __matmul__ bmm", products, *_BOTH),
    **table("pad", in_front_of(lambda x, pad, *_, **__: len(pad) // 2), F),
    **table("avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d lp_pool1d", in_front_of(1), F, torch),
    **table("avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d", in_front_of(2), F, torch),
    **table("avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d", in_front_of(3), F, torch),
    **table("pixel_shuffle pixel_unshuffle", in_front_of(3), F, torch),
    **table("interpolate upsample unfold fold instance_norm prelu", leading, F),
    **table("batch_norm", lambda f, a, k, time: leading(f, a, k, time) and not argument(f, a, k, "training"), F),
    **table("scaled_dot_product_attention", lambda f, a, k, time: time < -2 and not (a[4:5] or k.get("dropout_p")), F),
}  # fmt: skip
SHAPES = table(
    "flatten view reshape unflatten unsqueeze squeeze unsqueeze_ squeeze_ view_as reshape_as ravel", anywhere, *_BOTH
)


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
    try:
        rates = [_aligned_rate(x, first, tag, time) if isinstance(x, Tensor) else x for x in leaves.values]
    except _NotAlignedError:
        return NotImplemented
    if not condition(function, args, kwargs, time):
        return NotImplemented
    of_rates, rate_args, rate_kwargs = _out_of_place(function, *leaves.arguments(rates))
    with torch.set_grad_enabled(linear and torch.is_grad_enabled()):
        y = function(*args, **kwargs)
    torch.clear_autocast_cache()  # of casts without a graph (torch 2.3)
    if changed is None and any(y is x for x in leaves.values):
        return y
    if isinstance(y, Tensor) and linear and not (y.is_floating_point() or y.is_complex()) and first.is_floating_point():
        return y  # a cast that a rate would not survive
    return _put(y, of_rates(*rate_args, **rate_kwargs), tag, time, linear, changed)


class _NotAlignedError(Exception):
    pass


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
    raise _NotAlignedError


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


KNOWN = frozenset({*LINEAR, *NONLINEAR, *_SPECIAL})


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
    return args[0] if in_place or (_has_inplace(function) and argument(function, args, kwargs, "inplace")) else None


def _out_of_place(function: Callable, args: tuple, kwargs: dict) -> tuple[Callable, tuple, dict]:
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
