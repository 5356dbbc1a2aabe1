"""Functions that treat each step alike, and on which arguments: of their outputs rates are what they make of rates.

Of a nonlinear one that is what the published method takes for the mean. A function that is not here, or that touches
the dimension of time, is differentiated over the T steps: it costs memory, and no gradient is wrong.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .in_place import argument
from .rated import rated

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
KNOWN = frozenset({*LINEAR, *NONLINEAR, *SHAPES, Tensor.__getitem__, Tensor.expand, F.multi_head_attention_forward})
