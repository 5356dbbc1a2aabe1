"""The table of functions that treat steps alike (util/rate/table.py), where a gradient could silently be wrong.

What a function makes of a rate is held against the function itself, called apart from the network: which of its outputs
depend on which steps, and what it puts out where every step is the same. The examples are the same in every run.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tests.rate.method_helpers import assert_same_gradients, lif_node
from util.rate import bptt_model_setting, multi_step, rate_model_setting, table
from util.rate.rated import Rated, rated

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

T = 3


class Around(nn.Module):
    """linear-LIF-linear, the function on values [T, B, *shape], a linear map where there is a dimension for one."""

    def __init__(self, function: Callable[[Tensor], Any], shape: tuple[int, ...]):
        super().__init__()
        torch.manual_seed(0)
        n = torch.Size(shape).numel()
        self.first, self.fire, self.second = layer.Linear(4, n), lif_node(v_threshold=0.5), layer.Linear(n, n)
        nn.init.uniform_(self.second.weight, 0.1, 0.5)
        nn.init.uniform_(self.second.bias, 0.2, 0.9)  # positive values, no two of them the same
        self.function, self.shape = function, shape
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.second(self.fire(self.first(x))).unflatten(-1, self.shape)
        self.tag = rated(x), x.detach().clone()
        outs = [y for y in tree_flatten(self.function(x))[0] if isinstance(y, Tensor)]
        self.outs = [(rated(y), y.detach().clone()) for y in outs]
        return [
            F.linear(y, weights(2, y.shape[-1]).to(y.dtype)) if y.dim() > 1 else y
            for y in outs
            if y.is_floating_point()
        ]


def weights(*shape: int) -> Tensor:
    """Others for every element, also for each step."""
    return torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).view(shape).sin()


class Found(NamedTuple):
    net: Around
    values: list[Tensor]
    grads: dict[str, Tensor]


def trained(net: Around, batch: int, windows: int | None) -> Found:
    """``windows``: None for BPTT."""
    net = copy.deepcopy(net)
    if windows is None:
        bptt_model_setting(net, T)
    else:
        rate_model_setting(net, T, windows=windows)
    x = 2 * torch.rand(T, batch, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outs = net(x)
    sum(2.7**i * (y * weights(*y.shape)).sum() for i, y in enumerate(outs) if y.requires_grad).backward()
    return Found(net, [y for _, y in net.outs], {name: p.grad for name, p in net.named_parameters()})


def check(
    function: Callable[[Tensor], Any],
    shape: tuple[int, ...],
    batch: int = 2,
    linear: bool = False,
    tolerance: float = 1e-9,
) -> list[Rated | None]:
    """Returns the rates of what ``function`` makes of values [T, B, *shape]; ``linear``: it is linear in them."""
    net = Around(function, shape)
    bptt = trained(net, batch, None)
    each, one = (trained(net, batch, windows) for windows in (T, 1))
    for found in (each, one):
        torch.testing.assert_close(found.values, bptt.values, rtol=1e-13, atol=0, equal_nan=True)
    if not all(grad.isfinite().all() for grad in bptt.grads.values()):  # of std where all values are the same
        hypothesis.reject()
    assert_same_gradients(each.grads, bptt.grads, tolerance)

    apart = hold_rates_against_the_function(function, one.net)
    if linear or not apart:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(multi_step, "alike", lambda *args: NotImplemented)
            plain = trained(net, batch, 1)
        names = (
            ["first.weight", "first.bias"] if apart else list(one.grads)
        )  # behind it, plain sees no mean of products
        assert_same_gradients({n: one.grads[n] for n in names}, {n: plain.grads[n] for n in names}, tolerance / 10)
    return [tag for tag, _ in one.net.outs]


def hold_rates_against_the_function(function: Callable[[Tensor], Any], net: Around) -> bool:
    """Each output's rate says of which steps it is made, and is what the function makes of the rate at every step.

    Returns:
        Whether each step has outputs of its own; where not, there is no rate.
    """
    tag, x = net.tag
    outs = lambda x: [y for y in tree_flatten(function(x.clone()))[0] if isinstance(y, Tensor)]  # noqa: E731
    before, same = outs(x), outs(tag.rate.detach().expand_as(x).contiguous())
    depends = [torch.zeros(T, y.numel(), dtype=torch.bool) for y in before]
    for t in range(T):
        for seed in range(2):
            changed = x.clone()
            changed[t] = 3 * torch.rand(x[t].shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            for of, y, z in zip(depends, before, outs(changed), strict=True):
                of[t] |= (y != z).flatten()
    apart = True
    for of, (rate, y), z in zip(depends, net.outs, same, strict=True):
        if (of.sum(0) > 1).any():
            apart = False
            assert rate is None, "the rate of what is made of several steps"
        if rate is None:
            continue
        assert y.shape[rate.dim] == T * rate.rate.shape[rate.dim]
        rows = torch.arange(y.numel()).view(y.shape).unflatten(rate.dim, (T, -1)).unbind(rate.dim)
        for t, row in enumerate(rows):
            assert set(of[t].nonzero().flatten().tolist()) <= set(row.flatten().tolist()), (
                "the rate's dimension is not time's"
            )
            made = z.flatten()[row.flatten()]
            torch.testing.assert_close(made, rate.rate.detach().flatten(), rtol=1e-10, atol=1e-12, equal_nan=True)
    return apart


# Every entry: on values [T, B, 4, 4] where it treats steps alike, and where it touches time.

OTHER, OF_STEPS = weights(4, 4).abs() + 0.1, weights(T, 1, 1, 1).abs() + 0.1
AT = torch.tensor([2, 0])
Application = Callable[[Callable, Tensor], Any]


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)  # [T * B, 4, 4]


def maps(x: Tensor) -> Tensor:
    return rows(x).unsqueeze(1)  # [T * B, 1, 4, 4]


def last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0)  # [B, 4, 4, T]


def calls(names: str, *applications: Application) -> dict[str, tuple[Application, ...]]:
    """The first treats steps alike, others touch time."""
    return dict.fromkeys(names.split(), applications)


CALLS = {
    **calls(
        "neg neg_ __neg__ clone contiguous float double half bfloat16 positive reciprocal square sqrt rsqrt exp log "
        "log1p abs __abs__ sin cos tanh sigmoid erf relu relu_ sign floor ceil round frac square_ abs_ exp_ sigmoid_ "
        "tanh_ relu6 leaky_relu elu selu celu gelu silu mish softplus softsign hardtanh hardswish hardsigmoid "
        "logsigmoid log_sigmoid tanhshrink softshrink hardshrink leaky_relu_ elu_ hardtanh_",
        lambda f, x: f(x),
    ),
    **calls(
        "add sub rsub subtract add_ sub_ __add__ __radd__ __sub__ __rsub__ __iadd__ __isub__ mul div multiply divide "
        "true_divide mul_ div_ __mul__ __rmul__ __imul__ __truediv__ __itruediv__ __idiv__ __rtruediv__ __rdiv__ pow "
        "__pow__ maximum minimum gt ge lt le eq ne __gt__ __ge__ __lt__ __le__ __eq__ __ne__",
        lambda f, x: f(x, OTHER),
        lambda f, x: f(x, OF_STEPS),
    ),
    **calls(
        "softmax log_softmax sum cumsum unbind mean amax amin prod var std logsumexp max min cumprod argmax argmin",
        lambda f, x: f(x, -1),
        lambda f, x: f(x, 0),
    ),
    **calls("flip", lambda f, x: f(x, (-1, 2)), lambda f, x: f(x, (0, 1)), lambda f, x: x.flip(-1, 0)),
    **calls("to type", lambda f, x: f(x, torch.float64)),
    **calls("type_as", lambda f, x: f(x, OTHER)),
    **calls("permute", lambda f, x: f(x, (0, 1, 3, 2)), lambda f, x: f(x, (3, 1, 2, 0))),
    **calls("transpose swapaxes swapdims movedim moveaxis", lambda f, x: f(x, 2, 3), lambda f, x: f(x, 0, 2)),
    **calls("t", lambda f, x: f(x.flatten(1))),
    **calls("stack cat concat", lambda f, x: f([x, 2 * x], -1), lambda f, x: f([x, 2 * x], 0)),
    **calls("select", lambda f, x: f(x, -1, 2), lambda f, x: f(x, 0, 2)),
    **calls("narrow", lambda f, x: f(x, -1, 1, 2), lambda f, x: f(x, 0, 1, 2)),
    **calls("index_select", lambda f, x: f(x, -1, AT), lambda f, x: f(x, 0, AT)),
    **calls("split chunk tensor_split", lambda f, x: f(x, 2, -1), lambda f, x: f(x, 2, 0)),
    **calls("roll", lambda f, x: f(x, 1, -1), lambda f, x: f(x, 1)),
    **calls("clamp clamp_", lambda f, x: f(x, 0.5, 0.8), lambda f, x: f(x, OF_STEPS)),
    **calls("clamp_min clamp_max", lambda f, x: f(x, 0.6), lambda f, x: f(x, OF_STEPS)),
    **calls(
        "where",
        lambda f, x: f(x > 0.5, x, OTHER) if f is torch.where else f(x, x > 0.5, OTHER),
        lambda f, x: f(OF_STEPS > 0.5, x, OTHER) if f is torch.where else f(x, OF_STEPS > 0.5, OTHER),
    ),
    **calls("masked_fill", lambda f, x: f(x, OTHER > 0.5, 0.3), lambda f, x: f(x, OF_STEPS > 0.5, 0.3)),
    **calls("lerp", lambda f, x: f(x, OTHER, 0.3), lambda f, x: f(x, OF_STEPS, 0.3)),
    **calls("addcmul", lambda f, x: f(x, OTHER, OTHER), lambda f, x: f(x, OF_STEPS, OTHER)),
    **calls("threshold _threshold", lambda f, x: f(x, 0.7, 0.1)),
    **calls("normalize", lambda f, x: f(x, 2.0, -1), lambda f, x: f(x, 2.0, 0)),
    **calls(
        "matmul __matmul__",
        lambda f, x: f(x, OTHER),
        lambda f, x: f(x, weights(T, 1, 4, 4)),
        lambda f, x: f(weights(1, T), x.movedim(0, 2)),
        lambda f, x: f(x.movedim(0, -1), weights(T, 1)),
    ),
    **calls("bmm", lambda f, x: f(rows(x), OTHER.expand(6, 4, 4)), lambda f, x: f(rows(x), weights(6, 4, 4))),
    **calls("pad", lambda f, x: f(x, (1, 0, 0, 2)), lambda f, x: f(x, (0, 0, 0, 0, 0, 0, 1, 1))),
    **calls(
        "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d",
        lambda f, x: f(rows(x), 2),
        lambda f, x: f(last(x).flatten(0, 1), 2),
    ),
    **calls(
        "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d",
        lambda f, x: f(maps(x), 2),
        lambda f, x: f(last(x), 2),
        lambda f, x: f(last(x).transpose(2, 3), 2),
    ),
    **calls(
        "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d",
        lambda f, x: f(x.unflatten(-1, (2, 2)), 2),
        lambda f, x: f(last(x).unsqueeze(1), 2),
        lambda f, x: f(x.transpose(0, 1).unsqueeze(1), 2),
    ),
    **calls("lp_pool1d", lambda f, x: f(rows(x), 2.0, 2), lambda f, x: f(last(x).flatten(0, 1), 2.0, 2)),
    **calls("lp_pool2d", lambda f, x: f(maps(x), 2.0, 2), lambda f, x: f(last(x), 2.0, 2)),
    **calls(
        "pixel_shuffle",
        lambda f, x: f(x.unflatten(-1, (2, 2)), 2),
        lambda f, x: f(x.unflatten(-1, (2, 2)).flatten(0, 2), 2),
    ),
    **calls("pixel_unshuffle", lambda f, x: f(x, 2), lambda f, x: f(rows(x).movedim(0, 1), 2)),
    **calls("interpolate upsample", lambda f, x: f(maps(x), scale_factor=2), lambda f, x: f(last(x), scale_factor=2)),
    **calls("unfold", lambda f, x: f(maps(x), 2), lambda f, x: f(last(x), 2)),
    **calls("fold", lambda f, x: f(rows(x), (3, 3), 2), lambda f, x: f(last(x).flatten(1, 2), (2, 4), 2)),
    **calls("instance_norm", lambda f, x: f(maps(x)), lambda f, x: f(last(x))),
    **calls("prelu", lambda f, x: f(-x, weights(1)), lambda f, x: f(-x.transpose(0, 1), weights(T))),
    **calls(
        "batch_norm",
        lambda f, x: f(rows(x), weights(4), weights(4) ** 2),
        lambda f, x: f(x.transpose(0, 1), weights(T), weights(T) ** 2),
    ),
    **calls(
        "scaled_dot_product_attention",
        lambda f, x: f(x, x, 2 * x),
        lambda f, x: f(x.movedim(0, 2), x.movedim(0, 2), 2 * x.movedim(0, 2)),
    ),
    **calls("multi_head_attention_forward", lambda f, x: attend(rows(x).transpose(0, 1)), lambda f, x: attend(x[:, 0])),
    **calls("flatten", lambda f, x: f(x, 2), lambda f, x: f(x, 0, 2)),
    **calls("view reshape", lambda f, x: f(x, (T, -1)), lambda f, x: f(x, (-1, 2, 4))),
    **calls("unflatten", lambda f, x: f(x, -1, (2, 2)), lambda f, x: f(rows(x), 0, (2, T))),
    **calls("unsqueeze unsqueeze_ squeeze squeeze_", lambda f, x: f(x, -1), lambda f, x: f(x, 0)),
    **calls("view_as reshape_as", lambda f, x: f(x, weights(T, 32)), lambda f, x: f(x, weights(2, 48))),
    **calls("ravel", lambda f, x: f(x)),
    **calls("__getitem__", lambda f, x: f(x, (..., AT)), lambda f, x: f(x, AT)),
    **calls("expand", lambda f, x: f(x[:, :1], (T, 5, 4, 4)), lambda f, x: f(x, (2, T, 2, 4, 4))),
}


def attend(x: Tensor) -> Tensor:
    """Attention among [tokens, T * B, 4]."""
    arguments = 4, 2, weights(12, 4), weights(12), None, None, False, 0.0, weights(4, 4), weights(4)
    return F.multi_head_attention_forward(x, x, x, *arguments)


def entries() -> list:
    functions = [f for f in table.KNOWN if callable(f) and getattr(f, "__self__", None) is not torch]
    of = dict.fromkeys(sorted(functions, key=str), False)
    of |= dict.fromkeys([f for f in of if f in table.LINEAR or f in table.SHAPES], True)
    of |= {Tensor.__getitem__: True, Tensor.expand: True}
    return [
        pytest.param(
            f,
            linear,
            i,
            id=f"{getattr(f, '__qualname__', f.__name__)}-{f'touching time {i}' if i else 'without'}",
        )
        for f, linear in of.items()
        for i in range(len(CALLS[f.__name__]))
    ]


@pytest.mark.filterwarnings("ignore:.*upsample. is deprecated")
@pytest.mark.parametrize(("function", "linear", "i"), entries())
def test_each_entry(function, linear, i):
    apply = CALLS[function.__name__][i]
    half = function.__name__ in ("float", "half", "bfloat16")
    tags = check(lambda x: (apply(function, x), x), (4, 4), linear=linear, tolerance=1e-2 if half else 1e-9)
    assert i or tags[0] is not None, "known, but not recognised"


# Drawn: a function, its arguments, and the place of time among the dimensions.

small = st.integers(1, 4)


def broadcastable(draw: st.DrawFn, x: Tensor) -> Tensor:
    """Without a rate: of a shape that broadcasts with the value's, perhaps as long as time where time is."""
    shape = [draw(st.sampled_from([1, n])) for n in x.shape[draw(st.integers(0, x.dim() - 1)) :]]
    return weights(*[draw(small)] * draw(st.integers(0, 1)), *shape).abs() + 0.2


def reshaped(draw: st.DrawFn, x: Tensor) -> tuple[int, ...]:
    """Any shape of as many elements."""
    left, shape = x.numel(), []
    for _ in range(draw(st.integers(0, 3))):
        shape.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= shape[-1]
    return (*shape, left)


def indices(draw: st.DrawFn, x: Tensor) -> Any:
    index, ellipsis = [], False
    for n in x.shape[: draw(st.integers(1, x.dim()))]:
        some = [
            slice(None),
            slice(None),
            0,
            n - 1,
            slice(n // 2),
            slice(None, None, 2),
            torch.arange(n).flip(0),
            None,
            ...,
        ]
        chosen = draw(st.sampled_from(range(len(some))))
        if chosen == len(some) - 1 and ellipsis:
            continue
        ellipsis |= chosen == len(some) - 1
        index.append(some[chosen])
    return index[0] if len(index) == 1 and draw(st.booleans()) else tuple(index)


def dims(draw: st.DrawFn, x: Tensor, least: int = 1) -> tuple[int, ...]:
    """Different ones, counted from either end."""
    some = draw(st.lists(st.sampled_from(range(x.dim())), unique=True, min_size=least, max_size=x.dim()))
    return tuple(d - draw(st.sampled_from([0, x.dim()])) for d in some)


def dim(draw: st.DrawFn, x: Tensor) -> int:
    return dims(draw, x)[0]


def all_dims(draw: st.DrawFn, x: Tensor) -> tuple[int, ...]:
    return dims(draw, x, x.dim())


def number(draw: st.DrawFn, x: Tensor) -> int:
    return draw(small)


def one_of(*some: Any) -> Callable[[st.DrawFn, Tensor], Any]:
    return lambda draw, x: draw(st.sampled_from(some))


Drawn = Callable[[st.DrawFn, Tensor], Callable[[Tensor], Any]]  # of such a value, a function


def drawn(function: Callable, *arguments: Callable[[st.DrawFn, Tensor], Any]) -> Drawn:
    return lambda draw, x: partial(function, *(argument(draw, x) for argument in arguments))


def of_two(name: str, known: Tensor, mirrored: bool, x: Tensor) -> Tensor:
    return getattr(torch, name)(*((known, x) if mirrored else (x, known)))


def joined(name: str, d: int, known: bool, x: Tensor) -> Tensor:
    return getattr(torch, name)([x, 2 * x if known else weights(*x.shape)], d)


LINEAR: dict[str, Drawn] = {
    "along": drawn(
        lambda f, d, x: getattr(x, f)(d), one_of("sum", "cumsum", "unbind", "flip", "unsqueeze", "squeeze"), dim
    ),
    "of two": drawn(of_two, one_of("add", "sub"), broadcastable, one_of(True, False)),
    "sum": drawn(lambda d, keep, x: x.sum(d, keepdim=keep), dims, one_of(True, False)),
    "sum of all": drawn(lambda x: x.sum()),
    "flip": drawn(lambda d, x: x.flip(*d), dims),
    "roll": drawn(lambda n, d, x: x.roll(n, d), number, dim),
    "roll of all": drawn(lambda n, x: x.roll(n), number),
    "select": drawn(lambda d, x: x.select(d, 0), dim),
    "narrow": drawn(lambda d, x: x.narrow(d, 0, 1), dim),
    "index_select": drawn(lambda d, x: x.index_select(d, torch.tensor([0, 0])), dim),
    "permute": drawn(lambda d, x: x.permute(d), all_dims),
    "moved": drawn(lambda f, a, b, x: getattr(x, f)(a, b), one_of("transpose", "movedim"), dim, dim),
    "flatten": drawn(lambda a, b, x: x.flatten(*sorted((a % x.dim(), b % x.dim()))), dim, dim),
    "reshape": drawn(lambda shape, x: x.reshape(shape), reshaped),
    "index": drawn(lambda index, x: x[index], indices),
    "expand": drawn(lambda n, x: x.expand(n, *x.shape), number),
    "parts": drawn(lambda f, n, d, x: getattr(x, f)(n, d), one_of("chunk", "split", "tensor_split"), number, dim),
    "joined": drawn(joined, one_of("cat", "stack"), dim, one_of(True, False)),
}
OTHERS: dict[str, Drawn] = {
    "along": drawn(
        lambda f, d, x: getattr(x, f)(d),
        one_of("softmax", "log_softmax", "mean", "amax", "prod", "max", "logsumexp", "cumprod"),
        dim,
    ),
    "of two": drawn(of_two, one_of("mul", "div", "maximum", "pow"), broadcastable, one_of(True, False)),
    "std": drawn(lambda d, x: x.std(d, correction=0), dims),
    "times its flip": drawn(lambda d, x: x * x.flip(d), dim),
    "where": drawn(lambda other, x: torch.where(other > 1, x, x.square()), broadcastable),
    "normalize": drawn(lambda d, x: F.normalize(x, dim=d), dim),
    "pad": drawn(lambda n, x: F.pad(x, (1, 0) * min(n, x.dim())).sin(), number),
    "pool": drawn(lambda n, x: getattr(F, f"avg_pool{n}d")(x, 2, 1, 1).sin(), one_of(1, 2)),
    "products": drawn(lambda x: x @ x.transpose(-1, -2)),
    "product from the left": drawn(lambda n, x: (weights(n, x.shape[-2]) @ x).sin(), one_of(1, 2)),
    "product from the right": drawn(lambda n, x: (x @ weights(x.shape[-1], n)).sin(), one_of(1, 2)),
    "linear": drawn(lambda x: F.linear(x, weights(2, x.shape[-1])).sin()),
    "attention": drawn(lambda x: F.scaled_dot_product_attention(x, x, 2 * x)),
    "unfold": drawn(lambda x: F.unfold(x, 1).sin()),
    "interpolate": drawn(lambda x: F.interpolate(x, scale_factor=2).sin()),
    "in place": drawn(lambda other, x: (x * 1).mul_(other[-1:]).add_(x), broadcastable),
}


@st.composite
def programs(draw: st.DrawFn, last_ones: dict[str, Drawn]):
    """Values' shape, the batch, and a chain of functions of which ``last_ones`` has the last."""
    shape, batch = tuple(draw(st.lists(small, min_size=1, max_size=3))), draw(st.sampled_from([1, 2, T]))
    x, chain, names = torch.ones(T, batch, *shape, dtype=torch.float64), [], []
    for some in [LINEAR] * draw(st.integers(0, 2)) + [last_ones]:
        names.append(draw(st.sampled_from(sorted(some))))
        hypothesis.assume(x.dim() > 0)
        chain.append(some[names[-1]](draw, x))
        try:
            x = next(y for y in tree_flatten(chain[-1](x))[0])
        except (RuntimeError, ValueError, IndexError, NotImplementedError):
            hypothesis.reject()
        hypothesis.assume(0 < x.numel() <= 500 and 0 < x.dim() < 6)

    def function(x: Tensor) -> Any:
        for apply in chain[:-1]:
            x = next(y for y in tree_flatten(apply(x))[0])
        return chain[-1](x)

    hypothesis.note(f"{T, batch, *shape}: {', '.join(names)}")
    return function, shape, batch


STEADY = settings(
    max_examples=3 * settings.default.max_examples,  # 300 in CI, less in plain pytest: tests/conftest.py
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@STEADY
@given(programs(LINEAR))
def test_linear_functions_have_the_gradient_of_autograd_whether_or_not_they_touch_time(program):
    function, shape, batch = program
    check(lambda x: (function(x), x), shape, batch, linear=True)


@STEADY
@given(programs(OTHERS))
def test_other_functions_have_a_rate_only_where_they_treat_steps_alike(program):
    function, shape, batch = program
    check(lambda x: (function(x), x), shape, batch)
