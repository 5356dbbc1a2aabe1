"""Step mode 's', what a forward makes in a call: its mark, its rate, and how gradients come to what is handed out."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from .places import EARLIER, Mark, Place, Places
from .problem import NetworkError
from .rated import rated, tagged
from .session import Setting


class Values(Places):
    """What the calls make: marked, with a rate in those that end a window, and with a graph where it is handed out."""

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.made: list[weakref.ref] = []  # in this call

    def next_step(self) -> None:
        super().next_step()
        self.made.clear()

    def in_graph(self, x: Any) -> Any:
        """What stands for an operand in the graph: its rate, or of what is of no step a copy, lest hooks run twice."""
        if not isinstance(x, Tensor):
            return x
        mark = self.mark(x)
        if mark is not None:
            if (tag := rated(x)) is not None:
                return tag.rate
            why = ", or it was changed in place by what no hook sees"
            raise NetworkError(f"of what {mark.origin} puts out there is no rate{why}; use step mode 'm'")
        if x.requires_grad and not self.deferred.knows(x):
            x, _ = self.constants.get(getattr(x, "_first", None), (x, 0))
            if self.step > 1 and not self.deferred.knows(x):
                raise self.differs(f"uses a tensor of shape {list(x.shape)} that needs a gradient and was not there")
        return self.deferred.source(x)

    def check_in_place(self, name: str, changed: Tensor) -> None:
        """Raises NetworkError or RuntimeError where a function may not change it in place."""
        mark = self.mark(changed)
        if mark is None and (changed._is_view() or isinstance(changed, torch.nn.Parameter)):
            raise NetworkError(
                f"step mode 's': {name} writes into a part of a tensor that is of no step; use step mode 'm'"
            )
        if mark and mark.origin == "__get__":
            raise NetworkError(
                f"step mode 's': {name} changes the .data of a tensor, of which no rate knows; use step mode 'm'"
            )
        if mark and mark.static:
            raise RuntimeError(
                "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                "without it"
            )

    def has_graph(self, operands: list) -> bool:
        if not torch.is_grad_enabled():
            return False
        return any(m.graph if (m := self.mark(x)) else x.requires_grad for x in operands if isinstance(x, Tensor))

    def put_out_all(self, y: Any, place: Place, rate: Any, name: str, graph: bool) -> Any:
        """As `put_out`, of each tensor that a function has made."""
        if isinstance(y, Tensor):
            return self.put_out(y, (*place, 0), rate, name, graph)
        if not isinstance(y, (tuple, list)):
            return y
        rates = rate if self.closing else [None] * len(y)
        items = [
            self.put_out(a, (*place, i), b, name, graph) if isinstance(a, Tensor) else a
            for i, (a, b) in enumerate(zip(y, rates, strict=True))
        ]
        return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)

    def put_out(
        self, y: Tensor, place: Place, rate: Tensor | None, name: str, graph: bool, static: bool = False,
        count: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Marks what a function has made, and gives it its rate."""
        y = y.data if y._is_view() else y
        y._mark = Mark(self, self.step, place, name, graph and (y.is_floating_point() or y.is_complex()), static)
        self.made.append(weakref.ref(y))
        if isinstance(rate, Tensor) and rate.shape == y.shape:
            tagged(y, rate, 0, 1, count)
            if self.deferred.pending(place):
                self.deferred.resolve(place, rate)
        return y

    def handed_out(self, y: Tensor) -> Tensor:
        """An output of the network, with the gradient of its rate."""
        mark = self.mark(y)
        if exactly := getattr(y, "_exactly", None):
            return exactly()
        if mark is None or not mark.graph or mark.step == EARLIER:
            return y
        self._resolve(mark, y)
        return self.deferred.of(mark.place, y)

    def expose(self, x: Any) -> None:
        mark = self.mark(x)
        if mark is None or not mark.graph or mark.step != self.step or x.grad_fn is not None:
            return
        tag = rated(x)
        self._resolve(mark, x)
        self.deferred.of(mark.place, x, in_place=True)
        if tag:
            tagged(x, *tag[:3], tag.count)

    def _resolve(self, mark: Mark, x: Tensor) -> None:
        if self.closing and (tag := rated(x)):
            self.deferred.resolve(mark.place, tag.rate)

    def rate_of(self, rate: Tensor) -> Tensor:
        """A rate as a user gets it: what is made of it is no part of the window's graph."""
        place = (self.window, "rate_of", len(self.made))
        self.deferred.resolve(place, rate)
        with _pop_mode_temporarily():
            self.deferred.begin()
            alias = self.deferred.of(place, rate.detach())
        self.made.append(weakref.ref(alias))
        return alias
