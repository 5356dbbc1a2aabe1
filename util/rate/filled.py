"""The dicts and lists among a call's arguments, and the tensors that the network's forward puts into them."""

from torch import Tensor
from torch.utils._pytree import tree_flatten

from .step_calls import is_float


class Filled:
    def __init__(self, inputs: tuple[tuple, dict]):
        """``inputs``: the arguments, before the call."""
        args, kwargs = inputs
        self.containers = [x for x in (*args, *kwargs.values()) if isinstance(x, (dict, list))]
        self.before = tree_flatten(self.containers)[0]

    def tensors(self) -> list[Tensor]:
        """Floating-point tensors that were not there before the call."""
        known = set(map(id, self.before))
        return [x for x in tree_flatten(self.containers)[0] if is_float(x) and id(x) not in known]

    def replace(self, tensors: list[Tensor]) -> None:
        """Puts ``tensors`` in the places of `tensors`, in the user's own containers."""
        places = {id(x): y for x, y in zip(self.tensors(), tensors, strict=True)}
        for container in self.containers if places else ():
            _replace(container, places)


def _replace(container: dict | list, places: dict[int, Tensor]) -> None:
    for key, x in list(container.items() if isinstance(container, dict) else enumerate(container)):
        if isinstance(x, (dict, list)):
            _replace(x, places)
        elif id(x) in places:
            container[key] = places[id(x)]
