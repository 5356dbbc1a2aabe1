"""Step mode 's': what a forward makes is told, from step to step, by how it was made: by which function, of what.

Each step has to make it alike; a step that does otherwise is refused where that would matter.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .deferred import Deferred
from .problem import NetworkError
from .session import Setting

EARLIER = 0  # in place of a step

Place = tuple[Any, ...]


class Mark(NamedTuple):
    """On each tensor that a forward makes.

    Attributes:
        run: of which T calls it is.
        step: of which of them, from 1; `EARLIER` where it is made of what an earlier one has left behind.
        place: how it was made, window included; of its rate in the graph.
        origin: the function that made it.
        graph: whether a gradient goes there.
        static: whether it is the same at every step.
    """

    run: "Places"
    step: int
    place: Place
    origin: str
    graph: bool = False
    static: bool = False


class Places(TorchFunctionMode):
    """What the T calls of a network have in common."""

    def __init__(self, setting: Setting):
        super().__init__()
        self.setting = setting
        self.steps = setting.time_step // setting.windows  # of a window
        self.step = 0  # of the T, from 1
        self.window = 0
        self.opening = self.closing = False  # whether this call begins, or ends, a window
        self.deferred = Deferred(setting.time_step)
        self.occurrences: Counter[tuple] = Counter()  # in this call, of functions on the same operands
        self.numbers: dict[tuple, int] = {}  # of the ways in which something was made
        self.constants: dict[tuple, tuple[Tensor, int]] = {}  # operands that are of no step, at the first
        self.records: dict[Place, Any] = {}  # of the window's steps so far
        self.recorded: Counter[Place] = Counter()  # of how many

    def next_step(self) -> None:
        self.step += 1
        self.window = (self.step - 1) // self.steps
        self.opening, self.closing = (self.step - 1) % self.steps == 0, self.step % self.steps == 0
        self.occurrences.clear()
        if self.opening:
            self.records.clear(), self.recorded.clear()

    def mark(self, x: Any) -> Mark | None:
        mark = getattr(x, "_mark", None)
        return mark if mark is not None and mark.run is self else None

    def place(self, name: str, operands: Any, tensors: Any = None, target: Tensor | None = None) -> Place:
        """Of what the function makes of its ``operands``.

        ``tensors``, by default those, may be of no step; the ``target`` it changes in place.
        """
        of = [mark.place[1:] if (mark := self.mark(x)) else _identity(x) for x in operands]
        if tensors is not None:
            of += [_identity(x) for x in tensors if isinstance(x, Tensor) and not self.mark(x)]
        made = (name, *of)
        self.occurrences[made] += 1
        number = self.numbers.setdefault((made, self.occurrences[made]), len(self.numbers))
        for i, x in enumerate(operands if tensors is None else tensors):
            if isinstance(x, Tensor) and x is not target and not self.mark(x) and (tensors is None or x.requires_grad):
                self._check_constant(name, (number, i), x)
        return self.window, number

    def _check_constant(self, name: str, at: tuple, x: Tensor) -> None:
        """Raises NetworkError where an operand that is of no step is not the first step's."""
        first, version = self.constants.setdefault(at, (x, x._version))
        if self.step == 1:
            self.deferred.source(x)
        if not (x._version == version if x is first else _same(x, first)):
            raise self.differs(f"gives {name} another tensor of shape {list(x.shape)}, which is none of its arguments")
        if x is not first and x.requires_grad:
            x._first = at

    def record(self, place: Place, record: Any, together: Callable) -> None:
        """``together``: as `Rule.together`."""
        self.records[place] = together(self.records.get(place), record)
        self.recorded[place] += 1

    def records_of(self, place: Place) -> Any:
        """Of all steps of the window. Raises NetworkError where one has not done the same."""
        if self.recorded[place] != self.steps:
            raise self.differs(f"calls {self.name_of(place)} on something else")
        return self.records[place]

    def name_of(self, place: Place) -> str:
        """The function that makes it."""
        return next((key[0][0] for key, number in self.numbers.items() if number == place[1]), str(place[1]))

    def differs(self, what: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': at step {self.step} the network's forward {what}, unlike at the first step. One "
            "backward pass serves all steps, so each has to do the same; leave memory to neurons, or use step mode 'm'"
        )


def _identity(x: Any) -> Any:
    """Of an operand that is of no step: of parameters, which they are."""
    if not isinstance(x, Tensor):
        return repr(x)
    return id(x) if isinstance(x, torch.nn.Parameter) else None


def _same(x: Tensor, first: Tensor) -> bool:
    if x is first:
        return True
    recipes = getattr(x, "_recipe", None), getattr(first, "_recipe", None)
    if x.requires_grad and all(recipe is not None for recipe in recipes) and recipes[0] != recipes[1]:
        return False
    return x.layout == torch.strided and x.shape == first.shape and x.dtype == first.dtype and torch.equal(x, first)
