"""Users' forward hooks: those that only look see the spike pass and no other, with the gradients of the rate pass."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .deferred import DeferredGradients
from .session import Phase
from .step_calls import is_float


def looked_at(modules: Iterable[nn.Module], changing: set[int]) -> bool:
    """Whether a module has a forward hook that may only look; ``changing`` as in `observed`."""
    return any(module._forward_hooks.keys() - changing for module in modules)


@contextmanager
def observed(
    modules: dict[str, nn.Module], phase: Phase, changing: set[int], deferred: DeferredGradients | None
) -> Iterator[None]:
    """While a pass runs, forward hooks that return nothing are called only if it is the spike pass.

    Args:
        modules: by name.
        changing: the identifiers of hooks that have changed what a module puts out; the spike pass adds to it. They run
            in each pass.
        deferred: gives what the others see its gradient.
    """
    calls: Counter[Any] = Counter()
    hooked = [(name, module, module._forward_hooks) for name, module in modules.items() if module._forward_hooks]
    for name, module, hooks in hooked:
        module._forward_hooks = OrderedDict()
        for number, hook in hooks.items():
            if number in changing:
                module._forward_hooks[number] = hook
            elif deferred and phase != "probe":
                kind = {"spike": _Looking, "rate": _Resolving}[phase]
                module._forward_hooks[number] = kind(name, number, hook, changing, deferred, calls)
    try:
        yield
    finally:
        for _, module, hooks in hooked:
            module._forward_hooks = hooks


@dataclass(frozen=True)
class _Hook:
    """What stands for a hook that may only look while a pass runs."""

    name: str  # of its module
    number: int
    hook: Callable
    changing: set[int]
    deferred: DeferredGradients
    calls: Counter

    def at_places(self, seen: tuple, function: Callable[[Any, Tensor], Tensor]) -> Any:
        """``seen`` with ``function(place, x)`` for each floating-point tensor that the hook sees in this call."""
        call = self.calls[self.name, self.number]
        self.calls[self.name, self.number] += 1
        leaves, structure = tree_flatten(seen)
        places = ((self.name, self.number, call, i) for i in range(len(leaves)))
        given = [function(place, x) if is_float(x) else x for place, x in zip(places, leaves, strict=True)]
        return tree_unflatten(given, structure)


class _Looking(_Hook):
    """In the spike pass. A hook that turns out to change what it sees has acted on the true values all the same."""

    def __call__(self, module: nn.Module, *seen: Any) -> Any:
        tensors = [x for x in tree_flatten(seen)[0] if isinstance(x, Tensor)]
        versions = [x._version for x in tensors]
        with torch.enable_grad():
            result = self.hook(module, *self.at_places(seen, self.deferred.of))
        if result is not None or versions != [x._version for x in tensors]:
            self.changing.add(self.number)
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, result)


class _Resolving(_Hook):
    """In its place in the rate pass: notes where the gradients of what it saw belong."""

    def __call__(self, module: nn.Module, *seen: Any) -> None:
        self.at_places(seen, self.note)

    def note(self, place: Any, x: Tensor) -> Tensor:
        if self.deferred.pending(place):
            self.deferred.resolve(place, x)
        return x
