"""What a network's forward changes in its modules: the other passes start from where the spike pass started."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from .problem import UnsupportedModuleError

_OF_ALL_MODULES = frozenset(vars(nn.Module())) | frozenset(vars(base.MemoryModule()))
_MOST = 1000  # entries of a list or dict in an attribute; larger ones are data that no forward makes
PLAIN = (int, float, str, type(None))


class ForwardState:
    """Buffers, and attributes of modules with a forward of the user's own, as they are before a forward.

    Buffers are copied whether or not the forward has ever changed them: it may do so in training alone, or through
    ``.data``, of which nothing tells.
    """

    def __init__(self, buffered: Iterable[nn.Module], own: Iterable[nn.Module]):
        places = [(m._buffers, name, b) for m in buffered for name, b in m._buffers.items() if b is not None]
        copies = {id(b): b.detach().clone() for _, _, b in places}  # a buffer may be in two places
        self.buffers = [(buffers, name, copies[id(b)]) for buffers, name, b in places]
        self.own = list(own)
        self.attributes = self._attributes_now()

    @staticmethod
    def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
        """Those that a user's forward may have set, by name."""
        for name, value in vars(module).items():
            if name not in _OF_ALL_MODULES and not (type(value) in (list, dict) and len(value) > _MOST):
                yield name, value

    def _attributes_now(self) -> list[tuple[dict[str, Any], list[tuple[Any, Any]]]]:
        """Of each module its attributes, and the lists and dicts among them with what they hold."""
        now = [dict(self.own_attributes(module)) for module in self.own]
        return [(held, [(x, x.copy()) for x in held.values() if type(x) in (list, dict)]) for held in now]

    def _set_attributes(self, attributes: list[tuple[dict[str, Any], list[tuple[Any, Any]]]]) -> None:
        for module, (held, containers) in zip(self.own, attributes, strict=True):
            for name, _ in list(self.own_attributes(module)):
                if name not in held:
                    del vars(module)[name]
            vars(module).update(held)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """For a while all is what it was; then it is, as objects, what it had become.

        Raises UnsupportedModuleError where a tensor in an attribute was changed in place meanwhile.
        """
        now = [(buffers, name, buffers.get(name)) for buffers, name, _ in self.buffers]
        copies = {id(b): b.clone() for _, _, b in self.buffers}
        attributes = self._attributes_now()
        for buffers, name, b in self.buffers:
            buffers[name] = copies[id(b)]
        self._set_attributes(self.attributes)
        versions = [(module, name, x, x._version) for module, name, x in self._tensors()]
        try:
            yield
        finally:
            for buffers, name, b in now:
                buffers[name] = b
            self._set_attributes(attributes)
        for module, name, x, version in versions:
            if x._version != version:
                raise UnsupportedModuleError(
                    type(module).__name__,
                    module,
                    f"its forward works in place on what its attribute {name!r} holds, in the rate pass too: let it "
                    "set a new tensor, or register it as a buffer where it needs no gradient",
                )

    def _tensors(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """In attributes, and in the lists and dicts among them."""
        for module, (held, _) in zip(self.own, self.attributes, strict=True):
            for name, value in held.items():
                values = value.values() if type(value) is dict else value if type(value) is list else (value,)
                yield from ((module, name, x) for x in values if isinstance(x, Tensor))

    def with_attributes_of(self, first: "ForwardState", numbers: bool) -> "ForwardState":
        """This state of a later forward, but a cache is as empty as in ``first``; with ``numbers`` plain ones too."""
        mixed = copy.copy(self)
        mixed.attributes = [
            (before if numbers else {**before, **{n: x for n, x in held.items() if isinstance(x, PLAIN)}}, containers)
            for (before, containers), (held, _) in zip(first.attributes, self.attributes, strict=True)
        ]
        return mixed

    def has_other_buffers_than(self, first: "ForwardState", module: nn.Module) -> bool:
        """Whether buffers of the module were others in the state ``first`` of the same modules."""
        before, now = (
            {n: b for buffers, n, b in state.buffers if buffers is module._buffers} for state in (first, self)
        )
        return any(name not in before or not torch.equal(b, before[name]) for name, b in now.items())

    def with_buffers_of(self, first: "ForwardState", modules: list[nn.Module]) -> "ForwardState":
        """This state of a later forward, but with the buffers of ``modules`` as in ``first``."""
        mixed, theirs = copy.copy(self), {id(module._buffers) for module in modules}
        others = [place for place in self.buffers if id(place[0]) not in theirs]
        mixed.buffers = [*others, *(place for place in first.buffers if id(place[0]) in theirs)]
        return mixed

    def counted(self) -> set[tuple[int, str]]:
        """The plain attributes that the forward itself has changed: the module's number, and the name."""
        return {
            (i, name)
            for i, (module, (before, _)) in enumerate(zip(self.own, self.attributes, strict=True))
            for name, value in self.own_attributes(module)
            if isinstance(value, PLAIN) and value != before.get(name)
        }

    def with_a_graph(self) -> str | None:
        """The name of a buffer that the forward has left with a graph, if any."""
        now = ((name, buffers.get(name)) for buffers, name, _ in self.buffers)
        return next((name for name, b in now if isinstance(b, Tensor) and b.requires_grad), None)
