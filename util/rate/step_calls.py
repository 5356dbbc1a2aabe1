"""Step mode 's': the inputs of the T calls of the network that share one backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .sums import in_sum_type


class StepCalls:
    """The inputs of the calls so far, and at the end their mean."""

    def __init__(self, time_step: int, inputs: Any):
        self.steps, self.time_step = 0, time_step
        self.input_sum: list[Any] = []
        self.first_input, self.input_structure = tree_flatten(inputs)

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

    def mean_input(self) -> Any:
        mean = [self._mean(x, total) for x, total in zip(self.first_input, self.input_sum, strict=True)]
        return tree_unflatten(mean, self.input_structure)

    def _mean(self, first: Any, total: Any) -> Any:
        if not isinstance(first, Tensor) or first.requires_grad:  # then it is the same tensor at every step
            return first
        if not first.is_floating_point() and torch.equal(total, as_float(first) * self.time_step):
            return first  # token ids
        return (total / self.time_step).to(as_float(first).dtype)


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def as_float(x: Tensor) -> Tensor:
    """``x``, or a floating-point copy of integers and bools, which have no mean."""
    return x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
