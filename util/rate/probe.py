"""Does a network's forward treat time steps alike and each on its own, as one rate pass for all of them requires?

The hooks see modules, not what ``forward`` does between them. So, once, the network is tried out with every neuron
layer replaced by a map without memory: on steps of other contents put in other orders, and on steps as they are of
which one is changed a little. The first tells of steps that are not treated alike, the second, in which steps may be
as like each other as those of an image, of an influence of one on another. Both are also done with parameters
stirred: weights of each step that start out equal, or a gate that starts closed, hide nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

_SAMPLES = 4096  # values that are compared of each row of what a layer gets
_SAMPLES_OF_IMAGES = 64  # where there may be a row for each image, [T * B, ...]
_TOUCH = 0.1  # by how much of its root mean square a step is changed
_INFLUENCE = 1e-3  # how much of that change may reach other steps

Arrange = Callable[[Tensor, int], Tensor]  # [..., T, ...], the dimension that is time -> the steps of a trial
Run = Callable[[Arrange, bool], dict[str, Tensor]]


def memoryless(x: Tensor) -> Tensor:
    """What stands in for a neuron layer: each step [B, ...] of ``x`` [T, B, ...] divided by its root mean square."""
    rms = x.flatten(1).square().mean(1).sqrt().clamp_min(torch.finfo(x.dtype).tiny)
    return x / rms.view(-1, *[1] * (x.dim() - 1))


def sample(x: Tensor, many_rows: bool) -> Tensor:
    """[T, B, ...] or, with ``many_rows``, perhaps [T * B, ...] -> [the same, n]: some of its values."""
    flat = x.reshape(len(x), -1)
    step = -(-flat.shape[1] // (_SAMPLES_OF_IMAGES if many_rows else _SAMPLES))
    return flat[:, :: max(1, step)].clone()


@contextmanager
def stirred(modules: Iterable[nn.Module]) -> Iterator[None]:
    """For a while each value of each parameter is another, by half to one and a half times; where it was 0, by random.

    Other tensors take the parameters' places, so that these are exactly what they were.
    """
    generator = torch.Generator().manual_seed(0)
    places = [(module._parameters, name, p) for module in modules for name, p in module._parameters.items()]
    other: dict[int, nn.Parameter] = {}
    for _, _, p in places:
        if p is not None and p.is_floating_point() and id(p) not in other:
            noise = (torch.rand(p.shape, generator=generator) + 0.5).to(p.device, p.dtype)  # 0.5 to 1.5
            scale = p.detach().square().mean().sqrt()
            other[id(p)] = nn.Parameter(torch.where(p == 0, (noise - 1) * scale + noise * (scale == 0), p * noise))
    try:
        for parameters, name, p in places:
            parameters[name] = other.get(id(p), p)
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


def find_mixing(run: Run, stir: Callable[[], object], time_step: int) -> str | None:
    """The name of the first result in which a time step knows of others, or None.

    Args:
        run: runs the network on the steps that an `Arrange` makes of its input's, and says whether that is a single
            one; -> its results by name in order of computation, each [T, ...] or averaged over time by the network
            itself. [T * B, ...] is as good.
        stir: a context manager in which parameters are `stirred`.
    """
    last = time_step - 1
    orders = (list(range(time_step)), list(range(last, -1, -1)), [last] * time_step)
    for stirring in (False, True):
        with stir() if stirring else _nothing():
            one = run(partial(_distinct, [last]), True)
            forth, back, same = (run(partial(_distinct, order), False) for order in orders)
            plain, first, final = (run(partial(_touched, step), False) for step in (None, 0, last))
        if stirring and not all(y.isfinite().all() for y in forth.values()):
            continue  # parameters that may not have such values
        for name in forth:
            if not all(name in results for results in (back, same, one, plain, first, final)):
                continue
            if name.startswith("mean") and len(forth[name]) != time_step * len(one[name]):
                continue  # of something else than time
            if not _each_on_its_own(forth[name], back[name], same[name], one[name]):
                return name
            if (
                forth[name].shape != one[name].shape
                and plain[name].is_floating_point()
                and (
                    _influenced(plain[name], first[name], 0, time_step)
                    or _influenced(plain[name], final[name], last, time_step)
                )
            ):
                return name
    return None


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _each_on_its_own(forth: Tensor, back: Tensor, same: Tensor, one: Tensor) -> bool:
    """Results for all steps in order, in reverse, for the last step repeated T times, and for the last step alone."""
    if forth.shape == one.shape:  # behind the network's own time average
        return _close(back, forth) and _close(same, one)
    forth, back, same, one = (x.unflatten(0, (-1, len(one))) for x in (forth, back, same, one))  # [T or 1, B or 1, ...]
    return _close(back, forth.flip(0)) and _close(same, one.expand_as(same)) and _close(one, forth[-1:])


def _close(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, TF32's and bfloat16's included, and NaN in the same places."""
    tolerance = 1e-2 if a.dtype in (torch.float32, torch.float64) else 1e-1
    difference = (a.nan_to_num() - b.nan_to_num()).double().norm()
    return bool((a.isnan() == b.isnan()).all()) and bool(difference <= tolerance * b.nan_to_num().double().norm())


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether of two results, computed in the same way, one shows no influence that the other does not."""
    if a.shape != b.shape:
        return False
    difference, size = ((x.nan_to_num().double()).norm() for x in (a - b, b))
    rounding = 32 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0
    return bool((a.isnan() == b.isnan()).all()) and bool(difference <= max(_INFLUENCE, rounding) * size)


def _influenced(plain: Tensor, touched: Tensor, step: int, time_step: int) -> bool:
    """Whether a change of one step is seen in others. The same shapes throughout: rounding is the same, or nearly."""
    change = (touched.nan_to_num() - plain.nan_to_num()).double().unflatten(0, (time_step, -1)).flatten(1).norm(dim=1)
    size = plain.nan_to_num().double().unflatten(0, (time_step, -1)).flatten(1).norm(dim=1)
    own = change[step].clone()
    change[step] = 0
    rounding = min(32 * torch.finfo(plain.dtype).eps, _TOUCH / 10)
    return bool((change > _INFLUENCE * own + rounding * size).any())


def _distinct(steps: list[int], x: Tensor, dim: int) -> Tensor:
    """Other contents at each step, also of a static image (step t rolled by t), of which ``steps`` are chosen."""
    contents = [x.select(dim, t).detach() for t in range(x.shape[dim])]
    rolled = [step.roll(t, 0).roll(t, -1) if step.dim() else step for t, step in enumerate(contents)]
    return torch.stack([rolled[t] for t in steps], dim)


def _touched(step: int | None, x: Tensor, dim: int) -> Tensor:
    """The contents as they are, but that of one step is changed a little; integers of it are moved."""
    x = x.detach().clone()
    if step is None:
        return x
    own = x.select(dim, step)
    if x.is_floating_point():
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(own.device, own.dtype)
        size = own.square().mean().sqrt()
        own.add_(noise * _TOUCH * torch.where(size > 0, size, 1))
    elif own.dim():
        own.copy_(own.roll(1, 0).roll(1, -1))
    return x
