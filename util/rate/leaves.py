"""The tensors among the arguments of a function, and the arguments with others in their place."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


class Leaves(NamedTuple):
    """A function's arguments, one after another. Lists and tuples are opened where they hold tensors."""

    values: list[Any]
    positional: int
    names: tuple[str, ...]
    nested: TreeSpec | None

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Leaves":
        values = [*args, *kwargs.values()] if kwargs else list(args)
        for x in values:
            if isinstance(x, (list, tuple, dict)) and _holds_tensors(x):
                values, nested = tree_flatten((args, kwargs))
                return cls(values, 0, (), nested)
        return cls(values, len(args), tuple(kwargs), None)

    def arguments(self, values: list[Any]) -> tuple[tuple, dict]:
        """These, in the places of the ones that they were made of."""
        if self.nested is not None:
            return tree_unflatten(values, self.nested)
        return tuple(values[: self.positional]), dict(zip(self.names, values[self.positional :], strict=True))


def _holds_tensors(x: Any) -> bool:
    items = x.values() if isinstance(x, dict) else x
    return any(isinstance(y, Tensor) or (isinstance(y, (list, tuple, dict)) and _holds_tensors(y)) for y in items)
