"""Users' forward hooks: those that only look see the T spiking steps and no other pass."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def observed(modules: Iterable[nn.Module], spiking: bool, changing: set[int]) -> Iterator[None]:
    """While a pass runs, forward hooks that return nothing are called only if it is the ``spiking`` one.

    Args:
        changing: the identifiers of hooks that have changed what a module puts out; the spike pass adds to it. They run
            in each pass.
    """

    def noting(number: int, hook: Callable) -> Callable:
        def call(*args, **kwargs) -> Any:
            result = hook(*args, **kwargs)
            if result is not None:
                changing.add(number)
            return result

        return call

    hooked = [(module, module._forward_hooks) for module in modules if module._forward_hooks]
    for module, hooks in hooked:
        numbered = hooks.items()
        module._forward_hooks = OrderedDict(
            [(n, noting(n, hook)) for n, hook in numbered] if spiking else [x for x in numbered if x[0] in changing]
        )
    try:
        yield
    finally:
        for module, hooks in hooked:
            module._forward_hooks = hooks
