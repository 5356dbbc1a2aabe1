"""What autograd keeps for backward, counted live."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _Saved:
    """A tensor that some node of the graph keeps for its backward; dies with the node."""

    def __init__(self, tensor: Tensor):
        # Detached: with its graph, a node's own output would keep the node alive, and so itself.
        self.tensor = tensor.detach()


@contextmanager
def saved_for_backward(net: nn.Module) -> Iterator[Callable[..., int]]:
    """Yields a function: the bytes now kept for backward, each storage once, parameters left out."""
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    def count() -> int:
        own = {p.untyped_storage().data_ptr() for p in net.parameters()}
        storages = {s.tensor.untyped_storage().data_ptr(): s.tensor.untyped_storage().nbytes() for s in alive}
        return sum(size for place, size in storages.items() if place not in own)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield count
