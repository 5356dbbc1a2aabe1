"""Step mode 's': the T calls of the network that share one backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten


class Window:
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

    def zeros_like(self, output: Any) -> tuple[Tensor, ...]:
        """A zero for each tensor of the output. Not kept here: with the window it would hold itself alive."""
        tensors = [y for y in tree_flatten(output)[0] if is_float(y)]
        return _RatePass.apply(self, tensors, *self.sources)

    def add_input(self, inputs: Any) -> None:
        leaves, _ = tree_flatten(inputs)
        if self.steps == 0:
            self.steps = 1
            # A copy, should the network work in place on its input.
            self.input_sum = [as_float(x).clone() if isinstance(x, Tensor) else x for x in leaves]
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

    def mean_input(self) -> Any:
        mean = [x / self.time_step if isinstance(x, Tensor) else x for x in self.input_sum]
        return tree_unflatten(mean, self.input_structure)

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
        outputs, output_grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, self.sources, output_grads, allow_unused=True)


class StaticTensors:
    """The tensors of a forward that are the same at every step, as a static image is, and what was made of them.

    In step mode 'm' such a tensor [T, B, ...] has stride 0 along time, in step mode 's' it is the same object in each
    call. The network must not work in place on what its convolutions and BatchNorms make of it.
    """

    def __init__(self, steps_per_call: int, inputs: Any = ()):
        """``inputs``: of the network's first call, where they are known to be the same at every step."""
        self.steps_per_call = steps_per_call
        tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.dim()]
        self.tensors = [x for x in tensors if steps_per_call == 1 or x.stride(0) == 0]
        self.made: dict[Any, tuple[int, tuple[Tensor, ...]]] = {}

    def holds(self, x: Tensor) -> bool:
        return any(x is known for known in self.tensors)

    def once(self, place: Any, x: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``function(x)``, computed for one step of one call; the first of its results is static too.

        Args:
            place: whose ``function`` it is.

        Raises:
            RuntimeError: in step mode 's', the network has changed that result in place.
        """
        if self.steps_per_call > 1:
            y, *others = function(x[:1])
            results = (y.expand(len(x), *y.shape[1:]), *others)
        elif place in self.made:
            version, results = self.made[place]
            if results[0]._version != version:
                raise RuntimeError("static_input: the network works in place on what its first layers put out")
            return results
        else:
            results = function(x)
            self.made[place] = results[0]._version, results
        self.tensors.append(results[0])
        return results


class _RatePass(Function):
    """Zeros of the outputs' shapes, whose gradient is that of the rate pass with respect to ``sources``."""

    @staticmethod
    def forward(ctx, window: Window, outputs: list[Tensor], *sources: Tensor):
        ctx.window = window
        return tuple(torch.zeros_like(y) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, *ctx.window.backward(grads)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def as_float(x: Tensor) -> Tensor:
    """``x``, or a floating-point copy of integers and bools, which have no mean."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
