"""Inputs that are the same at every time step, and what stands in front of the first neurons computed once for them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten


class StaticTensors:
    """The tensors of a forward that are the same at every step, as a static image is, and what was made of them.

    In step mode 'm' such a tensor [T, B, ...] has stride 0 along time, in step mode 's' it is the same object in each
    call. The network must not work in place on them, nor on what its convolutions and BatchNorms make of them.
    """

    def __init__(self, steps_per_call: int, inputs: Any = ()):
        """``inputs``: of the network's first call, where they are known to be the same at every step."""
        self.steps_per_call = steps_per_call
        tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.dim()]
        self.tensors = [(x, x._version) for x in tensors if steps_per_call == 1 or x.stride(0) == 0]
        self.computed: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = {}  # place -> (x, results)

    def contains(self, x: Tensor) -> bool:
        """Raises RuntimeError where such a tensor has been changed in place."""
        for known, version in self.tensors:
            if x is known:
                if x._version != version:
                    raise RuntimeError(
                        "static_input: an input, or what the network's first layers put out, was changed in place; "
                        "attach without it"
                    )
                return True
        return False

    def computed_once(
        self, place: Any, x: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """``function(x)`` of an ``x`` that this contains, computed for one step; it then contains the first result too.

        Args:
            place: whose ``function`` it is.

        Raises:
            RuntimeError: in step mode 's', that result has been changed in place. In 'm' torch forbids to change it.
        """
        computed_of, results = self.computed.get(place, (None, ()))
        if computed_of is x:
            self.contains(results[0])
            return results
        results = function(x[:1] if self.steps_per_call > 1 else x)
        if self.steps_per_call > 1:
            results = (results[0].expand(len(x), *results[0].shape[1:]), *results[1:])
        self.computed[place] = x, results
        self.tensors.append((results[0], results[0]._version))
        return results
