"""Gradients of what the spike pass, which has no graph, hands out: deferred until the rate pass has one."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map

from .problem import PassError
from .sums import in_sum_type

Place = tuple[Any, ...]


class DeferredGradients:
    """The one backward pass of a window, for values that were handed out before the rate pass ran.

    `of` gives a value a gradient that is to be sent through the rate pass's graph from a place, whose tensor in the
    rate pass `resolve` makes known. A place is a tuple of the caller's choice that begins with a module's name.
    Autograd runs the node behind all such values (`_RatePass`) once, when every gradient has arrived; it sends their
    sums through the rate pass together.
    """

    def __init__(self, net: nn.Module, inputs: Any, time_step: int):
        self.graph = _Graph(net, inputs, time_step)
        self.anchor = _RatePass.apply(self.graph, *self.graph.sources)
        self.modules = list(net.modules())

    def of(self, place: Place, value: Tensor) -> Tensor:
        """``value``, sharing its memory, with the gradient of the tensor at ``place`` in the rate pass.

        Either has the other's shape, or ``value`` has T times its length: of the T steps the gradients add up.
        """
        return _Deferred.apply(self.anchor, self.graph, place, (value,))

    @staticmethod
    def place_of(value: Tensor) -> Place | None:
        """That of a value which `of` has returned."""
        return getattr(value.grad_fn, "place", None)

    def pending(self, place: Place | None = None) -> bool:
        """Whether a value that was given a gradient (from ``place``) is still in use."""
        return any(self.graph.alive.values()) if place is None else bool(self.graph.alive.get(place))

    def resolve(self, place: Place, tensor: Tensor) -> None:
        """``tensor``: what the rate pass has at ``place``."""
        self.graph.tensors[place] = tensor

    def count_step(self) -> None:
        self.graph.steps += 1

    def resolved(self) -> None:
        """The rate pass is over: backward may come."""
        self.graph.ready = True

    @contextmanager
    def own_parameters(self) -> Iterator[None]:
        """The network's parameters replaced, for a while, by the copies that the rate pass is differentiated by."""
        swapped = [
            (module._parameters, name, p)
            for module in self.modules
            for name, p in module._parameters.items()
            if id(p) in self.graph.copies
        ]
        for parameters, name, p in swapped:
            parameters[name] = self.graph.copies[id(p)]
        try:
            yield
        finally:
            for parameters, name, p in swapped:
                parameters[name] = p

    def copied(self, inputs: Any) -> Any:
        """``inputs`` with those that need a gradient replaced likewise."""
        return tree_map(lambda x: self.graph.copies.get(id(x), x), inputs)


class _Graph:
    """What the nodes of the graph share. They hold it, so it must hold none of them."""

    def __init__(self, net: nn.Module, inputs: Any, time_step: int):
        self.steps, self.time_step = 0, time_step
        self.ready = False
        self.sources = [p for p in net.parameters() if p.requires_grad]
        self.sources += [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.requires_grad]
        # What the rate pass is differentiated by, lest hooks of the sources themselves run twice.
        self.copies = {id(source): source.detach().requires_grad_() for source in self.sources}
        self.alive: dict[Place, WeakSet] = defaultdict(WeakSet)  # of each place, the nodes of values in use
        self.tensors: dict[Place, Tensor] = {}  # of each place, in the rate pass
        self.grads: dict[Place, Tensor] = {}  # that have arrived for each place

    def backward(self) -> tuple[Tensor | None, ...]:
        if not self.ready:
            raise RuntimeError(
                f"backward after {self.steps} of {self.time_step} steps, or a second time: in step mode 's', and where "
                "forward hooks keep what they see, one backward follows the last of the time_step steps"
            )
        grads, tensors = self.grads, self.tensors
        self.ready, self.grads, self.tensors = False, {}, {}
        if lost := grads.keys() - tensors.keys():
            name, *_ = lost.pop()
            raise PassError(
                f"what {name!r} put out got a gradient in the spike pass, but the network's forward does not call it "
                "in the rate pass: let it call the same layers in every step"
            )
        pairs = [(tensors[place], grad) for place, grad in grads.items() if tensors[place].requires_grad]
        if not pairs:
            return (None,) * len(self.sources)
        outputs, output_grads = zip(*((y, self._summed(grad, y)) for y, grad in pairs), strict=True)
        return torch.autograd.grad(outputs, list(self.copies.values()), output_grads, allow_unused=True)

    def _summed(self, grad: Tensor, like: Tensor) -> Tensor:
        """The gradient of [T, B, ...] or [T * B, ...] summed over time, for ``like``, [1, B, ...] or [B, ...]."""
        if grad.shape != like.shape:
            grad = grad.unflatten(0, (self.time_step, len(like))).sum(0)
        return grad.to(like.dtype)


class _RatePass(Function):
    """A number for `_Deferred` values to depend on, whose gradient is that of the rate pass by ``sources``."""

    @staticmethod
    def forward(ctx, graph: _Graph, *sources: Tensor) -> Tensor:
        ctx.graph = graph
        return torch.zeros((), device=sources[0].device if sources else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return None, *ctx.graph.backward()


class _Deferred(Function):
    @staticmethod
    def forward(ctx, anchor: Tensor, graph: _Graph, place: Place, value: tuple[Tensor]) -> Tensor:
        ctx.graph, ctx.place, ctx.of_anchor = graph, place, torch.zeros_like(anchor)
        graph.alive[place].add(ctx)
        return value[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        grads = ctx.graph.grads
        grads[ctx.place] = grads[ctx.place] + grad if ctx.place in grads else in_sum_type(grad)
        return ctx.of_anchor, None, None, None
