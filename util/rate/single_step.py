"""Step mode 's': T calls, each of one step, that share one backward pass.

The calls of a window record what its rates need, and the last of them makes these (pairs.py). What a call hands out or
leaves behind waits for the graph that they have (deferred.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .neurons import Neurons
from .pairs import Pairs
from .places import Mark
from .problem import NetworkError
from .rated import tagged
from .rule import Rule
from .session import Setting
from .stand_in import functions_shown


class Run(Pairs):
    """T calls of the network."""

    def __init__(self, setting: Setting, parameters: list[Tensor], rules: dict[Any, Rule]):
        """``parameters``: those that are trained; ``rules``: of functions."""
        super().__init__(setting, rules)
        for p in parameters:
            self.deferred.source(p)
        self.ended = self.entered = False
        self.inputs: list[Any] = []  # of the first call
        self.versions: list[int] = []
        self.sums: list[_InputSum | None] = []  # of the window's steps so far
        self.called: set[int] = set()  # neuron layers in this call
        self.places_of_inputs: dict[str, Any] = {}  # of neuron layers
        self.progress: dict[str, Any] = {}  # of neuron layers

    def call(self, forward: Callable, args: tuple, kwargs: dict, timeless: list[Any]) -> Any:
        """One step of the network. ``timeless``: those of its arguments that it may fill."""
        self.next_step()
        self.called.clear()
        if self.opening:
            self.sums.clear()
        self._take_inputs(args, kwargs, timeless)
        try:
            with functions_shown(self), self:
                self.entered = True
                out = forward(*args, **kwargs)
        finally:
            self.entered = False
        self.deferred.begin()
        self.deferred.count_step()
        leaves, structure = tree_flatten(out)
        for leaf in leaves:
            held = [] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
            if any(isinstance(x, Tensor) for x in held):
                raise NetworkError(
                    f"the network returns a {type(leaf).__name__}, whose tensors would get no gradient in step mode "
                    "'s'; return a tensor, or a tuple, list or dict of tensors"
                )
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if torch.is_grad_enabled() and self.called and tensors and not any(self.mark(leaf) for leaf in tensors):
            raise NetworkError(
                "step mode 's': what the network returns is made of its neurons' spikes by what no hook sees "
                "(torch.jit, NumPy); use step mode 'm'"
            )
        outputs = [self.handed_out(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        del out, leaves
        for reference in self.made:
            self.expose(reference())
        self._check_handed_out()
        self.ended = self.step == self.setting.time_step
        return tree_unflatten(outputs, structure)

    def close(self) -> None:
        """Forgets what only its calls need: states that are read later hold this."""
        self.progress, self.records, self.static, self.constants, self.inputs = {}, {}, {}, {}, []
        for x in self.marked:
            vars(x).pop("_mark", None), vars(x).pop("_rated", None)

    # Inputs

    def _take_inputs(self, args: tuple, kwargs: dict, timeless: list[Any]) -> None:
        args = tuple(None if any(x is y for y in timeless) else x for x in args)
        kwargs = {name: x for name, x in kwargs.items() if not any(x is y for y in timeless)}
        leaves, structure = tree_flatten((args, kwargs))
        if self.step == 1:
            self.inputs, self.structure = leaves, structure
            self.versions = [x._version if isinstance(x, Tensor) else 0 for x in leaves]
        if structure != self.structure:
            raise RuntimeError(
                "the network's arguments are not those of the first step: call it alike at each step, "
                "and functional.reset_net(net) between batches"
            )
        for i, (x, first) in enumerate(zip(leaves, self.inputs, strict=True)):
            if isinstance(x, Tensor):
                self._take_input(i, x, first)
            elif x != first:
                raise RuntimeError(
                    f"the network got {first!r} at the first of {self.setting.time_step} steps and now {x!r}: what "
                    "differs from step to step must be a tensor, of which there is a mean"
                )
            elif self.opening:
                self.sums.append(None)

    def _take_input(self, i: int, x: Tensor, first: Tensor) -> None:
        if x.requires_grad and x is not first:
            raise RuntimeError(
                "step mode 's': an input that needs a gradient must be the same tensor at every step; "
                "attach the whole network, or use step mode 'm'"
            )
        if x.shape != first.shape:
            raise RuntimeError(
                f"the network got {list(first.shape)} at an earlier step, now {list(x.shape)}: call "
                "functional.reset_net(net) between batches"
            )
        if self.step == 1:
            self.deferred.source(x)
        same = x is first and x._version == self.versions[i]
        if self.opening:
            self.sums.append(_InputSum(x))
        self.sums[i].add(x, same)
        x._mark = Mark(
            self, self.step, (self.window, "input", i), "the input", x.requires_grad, same and self.setting.static_input
        )
        self.marked.append(x)
        if self.closing:
            rate = self.deferred.source(x) if x.requires_grad else self.sums[i].mean(self.steps)
            if rate is not None:
                tagged(x, rate, 0, 1)

    def enter(self, neurons: Neurons, x: Tensor) -> Tensor | None:
        """A neuron layer is about to run on ``x``. Returns the rate of ``x`` in the call that ends a window."""
        neurons.check_call(self, self.called)
        self.check_input(neurons.name, x)
        place = self.place("neurons", [neurons.name, x])
        if self.places_of_inputs.setdefault(neurons.name, place[1]) != place[1]:
            raise self.differs(f"makes the input of {neurons.name!r} in another way")
        return self.in_graph(x) if self.closing else None

    def _check_handed_out(self) -> None:
        """Raises NetworkError where something was handed out in this window of which its last call makes no rate."""
        if self.closing:
            for place in self.deferred.unresolved(self.window):
                raise self.differs(f"does not make again what an earlier step handed out ({self.name_of(place)})")


class _InputSum:
    """Of an input over the steps of a window."""

    def __init__(self, first: Tensor):
        self.first, self.constant, self.total = first, True, None

    def add(self, x: Tensor, same: bool) -> None:
        """``same``: it is the very tensor of the run's first step."""
        wide = x.detach() if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
        integers = not x.is_floating_point() and torch.equal(x, self.first)  # token ids
        self.constant &= same or integers
        self.total = wide.clone() if self.total is None else self.total + wide

    def mean(self, steps: int) -> Tensor | None:
        if self.first.dtype == torch.bool and not self.constant:
            return None  # a mask has no mean
        return self.first.clone() if self.constant else (self.total / steps).to(self.total.dtype)
