"""Does a network's forward treat time steps alike and each on its own, as one rate pass for all of them requires?

The hooks see modules, not what ``forward`` does between them. So, once, the network runs on steps put in other orders,
with every neuron layer replaced by a map without memory: then no step may know of another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

_SAMPLES = 4096  # values that are compared of each row of what a layer gets
_SAMPLES_OF_IMAGES = 64  # where there may be a row for each image, [T * B, ...]


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
def open_gates(net: nn.Module) -> Iterator[None]:
    """Parameters that are all 0 are 1 for a while: what stands behind such a gate must not be overlooked."""
    gates = [p.data for p in net.parameters() if not p.any()]
    for gate in gates:
        gate.fill_(1)
    try:
        yield
    finally:
        for gate in gates:
            gate.zero_()


def find_mixing(run: Callable[[Any], dict[str, Tensor]], inputs: Any, time_step: int, time_dim: int) -> str | None:
    """The name of the first result in which a time step knows of others, or None.

    Args:
        run: runs the network; inputs -> its results by name in order of computation, each [T, ...] or averaged over
            time by the network itself. [T * B, ...] is as good.
        inputs: whatever holds the network's input tensors, which have time as dimension ``time_dim``.
    """

    def in_order(steps: list[int]) -> dict[str, Tensor]:
        return run(tree_map(lambda x: _selected(x, time_dim, steps), distinct))

    distinct = tree_map(lambda x: _shifted(x, time_dim), inputs)
    last = time_step - 1
    orders = (list(range(time_step)), list(range(last, -1, -1)), [last] * time_step, [last])
    forth, back, same, one = (in_order(steps) for steps in orders)
    for name in forth:
        if not _each_on_its_own(forth[name], back[name], same[name], one[name]):
            return name
    return None


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


def _shifted(x: Any, time_dim: int) -> Any:
    """Other contents at each step, also of a static image: step t rolled by t in its first and last dimension."""
    if not isinstance(x, Tensor):
        return x
    steps = [step.detach().roll(t, 0) for t, step in enumerate(x.unbind(time_dim))]
    return torch.stack([step.roll(t, -1) for t, step in enumerate(steps)], time_dim)


def _selected(x: Any, time_dim: int, steps: list[int]) -> Any:
    return x.index_select(time_dim, torch.tensor(steps, device=x.device)) if isinstance(x, Tensor) else x
