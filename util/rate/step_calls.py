"""Step mode 's': the T calls of the network that share one backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .sums import in_sum_type, sum_type


class StepCalls:
    """T calls of the network that share one backward pass.

    Every call's output is its spike output plus one and the same zero. Autograd adds up the gradients that arrive at
    the zero from all T outputs and hands them to `_RatePass`, which sends the sum through the rate pass's graph.
    """

    def __init__(self, net: nn.Module, time_step: int, inputs: Any):
        self.steps = 0
        self.rated: Any = None
        self.time_step = time_step
        self.input_sum: list[Any] = []
        self.first_input, self.input_structure = tree_flatten(inputs)
        self.sources = [p for p in net.parameters() if p.requires_grad]
        self.sources += [x for x in self.first_input if isinstance(x, Tensor) and x.requires_grad]
        # What the rate pass is differentiated by, lest hooks of the sources themselves run twice.
        self.copies = {id(source): source.detach().requires_grad_() for source in self.sources}
        self.modules = list(net.modules())

    def zeros_like(self, output: Any) -> tuple[Tensor, ...]:
        """A zero for each tensor of the output. Not kept here: its graph holds these calls."""
        tensors = [y for y in tree_flatten(output)[0] if is_float(y)]
        return _RatePass.apply(self, tensors, *self.sources)

    def add_input(self, inputs: Any) -> None:
        leaves, structure = tree_flatten(inputs)
        if structure != self.input_structure:
            raise RuntimeError(
                "the network's arguments are not those of the first step of this window: call it alike at each step, "
                "and functional.reset_net(net) between batches"
            )
        if self.steps == 0:
            self.steps = 1
            # A copy, should the network work in place on its input.
            self.input_sum = [in_sum_type(as_float(x)).clone() if isinstance(x, Tensor) else x for x in leaves]
            return
        for i, (x, first) in enumerate(zip(leaves, self.first_input, strict=True)):
            if not isinstance(x, Tensor):
                if x != first:
                    raise RuntimeError(
                        f"the network got {first!r} at the first of {self.time_step} steps and now {x!r}: what differs "
                        "from step to step must be a tensor, of which there is a mean"
                    )
                continue
            if x.requires_grad and x is not first:
                raise RuntimeError(
                    "step mode 's': an input that needs a gradient must be the same tensor at every step; "
                    "attach the whole network, or use step mode 'm'"
                )
            if x.shape != first.shape:
                raise RuntimeError(
                    f"the network got {list(first.shape)} earlier in this window, now {list(x.shape)}: call "
                    "functional.reset_net(net) between batches"
                )
            self.input_sum[i] = self.input_sum[i] + x
        self.steps += 1

    @contextmanager
    def own_parameters(self) -> Iterator[None]:
        """The network's parameters replaced, for a while, by the copies that the rate pass is differentiated by."""
        swapped = [
            (module._parameters, name, p)
            for module in self.modules
            for name, p in module._parameters.items()
            if id(p) in self.copies
        ]
        for parameters, name, p in swapped:
            parameters[name] = self.copies[id(p)]
        try:
            yield
        finally:
            for parameters, name, p in swapped:
                parameters[name] = p

    def mean_input(self) -> Any:
        mean = [self._mean(x, total) for x, total in zip(self.first_input, self.input_sum, strict=True)]
        return tree_unflatten(mean, self.input_structure)

    def _mean(self, first: Any, total: Any) -> Any:
        if not isinstance(first, Tensor):
            return first
        if first.requires_grad:
            return self.copies[id(first)]
        if not first.is_floating_point() and torch.equal(total, as_float(first) * self.time_step):
            return first  # token ids
        return (total / self.time_step).to(as_float(first).dtype)

    def backward(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        if self.rated is None:
            raise RuntimeError(
                f"backward after {self.steps} of {self.time_step} steps, or a second time: in step mode 's' one "
                "backward follows the last of the time_step calls"
            )
        rated = [y for y in tree_flatten(self.rated)[0] if is_float(y)]
        self.rated = None
        pairs = [(y, grad) for y, grad in zip(rated, grads, strict=True) if y.requires_grad]
        if not pairs:
            return (None,) * len(self.sources)
        outputs, output_grads = zip(*((y, grad.to(y.dtype)) for y, grad in pairs), strict=True)
        return torch.autograd.grad(outputs, list(self.copies.values()), output_grads, allow_unused=True)


class _RatePass(Function):
    """Zeros of the outputs' shapes, whose gradient is that of the rate pass with respect to ``sources``.

    In float32 at least: they gather the gradients of all steps.
    """

    @staticmethod
    def forward(ctx, calls: StepCalls, outputs: list[Tensor], *sources: Tensor):
        ctx.calls = calls
        return tuple(torch.zeros_like(y, dtype=sum_type(y.dtype)) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, *ctx.calls.backward(grads)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def as_float(x: Tensor) -> Tensor:
    """``x``, or a floating-point copy of integers and bools, which have no mean."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
