"""Step mode 's': gradients of what calls hand out before the call that ends their window, which has the graph."""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .problem import NetworkError
from .sums import in_sum_type

Place = tuple[Any, ...]


class Deferred:
    """One backward pass for values that are handed out before there is a graph for it.

    `of` gives a value a gradient that is to be sent into the graph from a place, whose tensor there
    `resolve` makes known. Autograd runs the node behind all such values once, when every gradient has arrived; it sends
    their sums through the graph together.
    """

    def __init__(self, steps: int):
        """``steps``: T, after which backward may come."""
        self.graph = _Graph(steps)
        self._anchor: Tensor | None = None

    def source(self, tensor: Tensor) -> Tensor:
        """What stands in the graph for a tensor that needs a gradient, lest its own hooks run twice."""
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in self.graph.copies:
            if self._anchor is not None:
                raise NetworkError(
                    "step mode 's': a tensor that needs a gradient comes up behind a rate_of, or after the first step: "
                    "use it before, or use step mode 'm'"
                )
            self.graph.sources.append(tensor)
            self.graph.copies[id(tensor)] = tensor.detach().requires_grad_()
        return self.graph.copies[id(tensor)]

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self.graph.copies

    def begin(self) -> None:
        """All sources are known."""
        if self._anchor is not None:
            return
        self._anchor = _Backward.apply(self.graph, *self.graph.sources)

    def count_step(self) -> None:
        self.graph.steps += 1

    def of(self, place: Place, value: Tensor, in_place: bool = False) -> Tensor:
        """``value`` with the gradient of the tensor at ``place``: what shares its memory, or ``in_place`` itself."""
        return _Value.apply(value, self._anchor, self.graph, place, in_place)

    def pending(self, place: Place) -> bool:
        """Whether a value that was given the gradient of ``place`` is still in use."""
        return bool(self.graph.alive.get(place))

    def unresolved(self, window: int) -> list[Place]:
        """The places of such values in use that are of the window and not known."""
        return [p for p, nodes in self.graph.alive.items() if p[0] == window and nodes and p not in self.graph.tensors]

    def resolve(self, place: Place, tensor: Tensor) -> None:
        """``tensor``: what the graph has at ``place``."""
        self.graph.tensors[place] = tensor


class _Graph:
    """What autograd's nodes share. They hold it, so it must hold none of them."""

    def __init__(self, time_step: int):
        self.time_step, self.steps = time_step, 0
        self.sources: list[Tensor] = []
        self.copies: dict[int, Tensor] = {}
        self.alive: dict[Place, WeakSet] = {}  # of each place, the nodes of values in use
        self.tensors: dict[Place, Tensor] = {}  # of each place, in the graph
        self.grads: dict[Place, Tensor] = {}  # that have arrived for each place

    def backward(self) -> tuple[Tensor | None, ...]:
        grads, tensors = self.grads, self.tensors
        self.grads = {}
        if self.steps < self.time_step or not tensors:
            raise RuntimeError(
                f"backward after {self.steps} of {self.time_step} steps, or a second time: in step mode 's' one "
                "backward follows the last of the time_step steps"
            )
        self.tensors = {}
        pairs = [(tensors[place], grad) for place, grad in grads.items() if tensors[place].requires_grad]
        if not pairs:
            return (None,) * len(self.sources)
        outputs, output_grads = zip(*((y, grad.to(y.dtype)) for y, grad in pairs), strict=True)
        copies = [self.copies[id(source)] for source in self.sources]
        return torch.autograd.grad(outputs, copies, output_grads, allow_unused=True)


class _Backward(Function):
    """A number for values to depend on, whose gradient is that of the graph by its ``sources``."""

    @staticmethod
    def forward(ctx, graph: _Graph, *sources: Tensor) -> Tensor:
        ctx.graph = graph
        return torch.zeros((), device=sources[0].device if sources else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, *ctx.graph.backward()


class _Value(Function):
    @staticmethod
    def forward(ctx, value: Tensor, anchor: Tensor, graph: _Graph, place: Place, in_place: bool) -> Tensor:
        ctx.graph, ctx.place, ctx.of_anchor = graph, place, torch.zeros_like(anchor)
        graph.alive.setdefault(place, WeakSet()).add(ctx)
        if not in_place:
            return value.data
        ctx.mark_dirty(value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = ctx.graph.grads
        grads[ctx.place] = grads[ctx.place] + grad if ctx.place in grads else in_sum_type(grad)
        return None, ctx.of_anchor, None, None, None
