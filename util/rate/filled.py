"""What a network's forward leaves behind beside its output: tensors in dicts and lists among a call's arguments, and in
attributes of its modules.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .forward_state import ForwardState
from .step_calls import is_float

Place = tuple[str, int]  # what holds the tensor, and its number among those that the call has put there
_HOLDS = Tensor | list | dict | tuple
_ARGUMENT = "an argument of the network"


class Filled:
    def __init__(self, inputs: tuple[tuple, dict], modules: dict[str, nn.Module]):
        """
        Args:
            inputs: the arguments, before the call.
            modules: by name, those whose attributes the forward may set.
        """
        args, kwargs = inputs
        self.modules = modules
        self.containers = [x for x in (*args, *kwargs.values()) if isinstance(x, dict | list)]
        self.before = [x for _, held in self._held() for x in tree_flatten(held)[0] if isinstance(x, Tensor)]

    def _held(self) -> Iterator[tuple[str, Any]]:
        for i, container in enumerate(self.containers):
            yield f"{_ARGUMENT} ({i})", container
        for path, module in self.modules.items():
            for name, value in ForwardState.own_attributes(module):
                if isinstance(value, _HOLDS):
                    yield f"{path}.{name}".lstrip("."), value

    def tensors(self) -> dict[Place, Tensor]:
        """Floating-point tensors that were not there before the call."""
        known = set(map(id, self.before))
        found = {}
        for holder, held in self._held():
            new = [x for x in tree_flatten(held)[0] if is_float(x) and id(x) not in known]
            found |= {(holder, i): x for i, x in enumerate(new)}
        return found

    def replace(self, tensors: dict[Place, Tensor]) -> None:
        """Puts ``tensors`` in the places of `tensors`, in the user's own containers."""
        if tensors:
            places = {id(x): tensors[place] for place, x in self.tensors().items() if place in tensors}
            self.map(lambda x: places.get(id(x), x))

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Puts ``function(x)`` in the place of each tensor x."""
        for container in self.containers:
            _map(container, function)
        for module in self.modules.values():
            for name, value in list(ForwardState.own_attributes(module)):
                if isinstance(value, _HOLDS):
                    vars(module)[name] = _mapped(value, function)


def _map(container: dict | list, function: Callable[[Tensor], Tensor]) -> None:
    for key, x in list(container.items() if isinstance(container, dict) else enumerate(container)):
        container[key] = _mapped(x, function)


def _mapped(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if type(x) in (dict, list):
        _map(x, function)
    elif isinstance(x, Tensor | tuple):
        return tree_map(lambda y: function(y) if isinstance(y, Tensor) else y, x)
    return x
