"""What a network's forward changes in its modules: the other passes start from where the spike pass started."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_PLAIN = (int, float, str, type(None))


class ForwardState:
    """Buffers, and attributes of modules with a forward of the user's own, as they are before a forward.

    Buffers are copied whether or not the forward has ever changed them: it may do so in training alone, or through
    ``.data``, of which nothing tells.
    """

    def __init__(self, buffered: Iterable[nn.Module], own: Iterable[nn.Module]):
        places = [(m._buffers, name, b) for m in buffered for name, b in m._buffers.items() if b is not None]
        copies = {id(b): b.detach().clone() for _, _, b in places}  # a buffer may be in two places
        self.buffers = [(buffers, name, copies[id(b)]) for buffers, name, b in places]
        self.attributes = [(vars(module), dict(vars(module))) for module in own]

    @contextmanager
    def put_back(self, attributes: bool = False) -> Iterator[None]:
        """For a while all is what it was; then it is, as objects, what it had become.

        Args:
            attributes: also attributes that are no plain numbers; else what is set to them meanwhile stays.
        """
        now = [(buffers, name, buffers.get(name)) for buffers, name, _ in self.buffers]
        copies = {id(b): b.clone() for _, _, b in self.buffers}
        for buffers, name, b in self.buffers:
            buffers[name] = copies[id(b)]
        plain = [
            (held, {k: v for k, v in held.items() if attributes or isinstance(v, _PLAIN)})
            for held, _ in self.attributes
        ]
        for (held, before), (_, values) in zip(self.attributes, plain, strict=True):
            held.update({name: before[name] for name in values if name in before})
        try:
            yield
        finally:
            for buffers, name, b in now:
                buffers[name] = b
            for held, values in plain:
                held.update(values)
                for name in list(held) if attributes else ():
                    if name not in values:
                        del held[name]

    def with_a_graph(self) -> str | None:
        """The name of a buffer that the forward has left with a graph, if any."""
        now = ((name, buffers.get(name)) for buffers, name, _ in self.buffers)
        return next((name for name, b in now if isinstance(b, Tensor) and b.requires_grad), None)
