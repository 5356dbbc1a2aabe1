"""Buffers that a network's forward changes: the passes beside the spike pass start from what it started from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Buffers:
    """The buffers of some modules as they are before a forward.

    They are copied whether or not the forward has ever changed them: it may do so in training alone, or through
    ``.data``, of which nothing tells.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        places = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        copies = {id(b): b.detach().clone() for _, _, b in places}  # a buffer may be in two places
        self.before = [(buffers, name, copies[id(b)]) for buffers, name, b in places]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """For a while the buffers are what they were; then they are, as objects, what they had become."""
        now = [(buffers, name, buffers.get(name)) for buffers, name, _ in self.before]
        copies = {id(b): b.clone() for _, _, b in self.before}
        for buffers, name, b in self.before:
            buffers[name] = copies[id(b)]
        try:
            yield
        finally:
            for buffers, name, b in now:
                buffers[name] = b

    def with_a_graph(self) -> str | None:
        """The name of one that the forward has left with a graph, if any."""
        now = ((name, buffers.get(name)) for buffers, name, _ in self.before)
        return next((name for name, b in now if isinstance(b, Tensor) and b.requires_grad), None)
