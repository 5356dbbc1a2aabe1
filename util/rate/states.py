"""A neuron's state variables as its surroundings read them, the membrane potential above all: with gradients."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .deferred import DeferredGradients
from .eligibility import NeuronState, learnable_parameters, memory_names
from .function import StateValue, Unreadable
from .problem import PassError
from .rule import Rule


@dataclass
class _Sum:
    """Of a state variable over the steps in which the network's forward has read it."""

    step: int  # the last of them
    steps: int
    value: Tensor
    slopes: list[Tensor | float]


class States(dict):
    """Stands in for the dict in which SpikingJelly keeps a neuron's state variables, while the hooks are on.

    Where gradients are recorded, reading one, as in ``net.fire.v``, gives

    - after a step, and in a forward hook: the state after that step, with its derivatives by the neuron's input and
      parameters as the recursion has them (`eligibility.NeuronState`). The input is taken for constant over the
      steps, as everywhere in the method;
    - in the rate pass, which repeats what the network's forward makes of it: in step mode 'm' the state after the last
      step, in step mode 's', where each step's output is made of that step's state, the mean over the steps;
    - where neither can be: a value whose backward raises.
    """

    def __init__(self, values: dict[str, Any], rule: Rule):
        super().__init__(values)
        self.rule = rule
        self.forget()

    def forget(self) -> None:
        """What is there is plain: of no step, or on purpose without a past."""
        self.after: NeuronState | None = None  # the last step that the hooks ran
        self.deferred: DeferredGradients | None = None
        self.current: Tensor | None = None  # the neuron's input in the rate pass, as a place in its graph
        self.sums: dict[str, _Sum] = {}

    def ran(self, after: NeuronState, deferred: DeferredGradients | None) -> None:
        """A step, or all of them, has left the states in ``after``."""
        self.after, self.deferred, self.current = after, deferred, None

    def rated(self, current: Tensor, deferred: DeferredGradients | None) -> None:
        """The rate pass has reached the neuron."""
        self.current, self.deferred = current, deferred
        if deferred:
            deferred.resolve((self.rule.name, "input"), current)

    def of_last_step(self) -> bool:
        """Whether the states are still those that the hooks left."""
        first = memory_names(self.rule.module)[0]
        return self.after is not None and super().__getitem__(first) is self.after.memory[0]

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if not isinstance(value, Tensor) or self.after is None or value is not self.after.memory[self._index(name)]:
            return value
        session = self.rule.session
        if torch.is_grad_enabled():
            return self._in_rate_pass(name, value) if session.phase == "rate" else self._after_step(name, value)
        if session.phase == "spike" and session.window.calls and session.calls[self.rule]:
            self._note(name, value, session.window.calls.steps)
        return value

    def __setitem__(self, name: str, value: Any) -> None:
        rule = vars(self).get("rule")  # none yet while a copy is made
        if rule is None or rule.session.phase not in ("rate", "probe"):
            super().__setitem__(name, value)
        elif isinstance(value, Tensor) and value.requires_grad:
            rule.refuse_start(name)
        # Else the network's forward does in every pass what it has done in the spike pass, whose states stay.

    def _after_step(self, name: str, value: Tensor) -> Tensor:
        if self.deferred:
            shape = value.shape if self.rule.setting.step_mode == "s" else (1, *value.shape)
            current = self.deferred.of((self.rule.name, "input"), value.new_zeros(()).expand(shape))
        elif self.current is not None:
            current = self.current
        else:
            return self._unreadable(name, value, "this is a copy made within a window, of which only the original has")
        return self._with_gradient(current, value, self._slopes(name))

    def _in_rate_pass(self, name: str, value: Tensor) -> Tensor:
        if not self.rule.session.calls[self.rule]:
            return self._unreadable(name, value, "forward reads it before the neuron has run")
        if self.rule.setting.step_mode == "m":
            return self._with_gradient(self.current, value, self._slopes(name))
        total, time_step = self.sums.get(name), self.rule.setting.time_step
        if total is None or total.steps != time_step:
            return self._unreadable(name, value, "forward does not read it in each of the steps")
        return self._with_gradient(self.current, total.value / time_step, [s / time_step for s in total.slopes])

    def _with_gradient(self, current: Tensor, value: Tensor, slopes: list[Tensor | float]) -> Tensor:
        parameters = [owner._parameters[name] for owner, name in learnable_parameters(self.rule.module)]
        return StateValue.apply(current, (value,), tuple(slopes), *parameters)

    def _note(self, name: str, value: Tensor, step: int) -> None:
        """Adds the state to the sum over steps, once a step."""
        total = self.sums.setdefault(name, _Sum(0, 0, torch.zeros_like(value), [0.0] * len(self.after.memory_slopes)))
        if total.step != step:
            total.step, total.steps, total.value = step, total.steps + 1, total.value + value
            total.slopes = [a + b for a, b in zip(total.slopes, self._slopes(name), strict=True)]

    def _slopes(self, name: str) -> list[Tensor | float]:
        """Its derivatives by the neuron's input and by each of its parameters."""
        return [slopes[self._index(name)] for slopes in self.after.memory_slopes]

    def _index(self, name: str) -> int:
        return memory_names(self.rule.module).index(name)

    def _unreadable(self, name: str, value: Tensor, reason: str) -> Tensor:
        error = PassError(
            f"no gradient of {self.rule.name}.{name}: {reason}; read it in each step after the neuron has run, or "
            "after the network's forward, or train with BPTT"
        )
        passes = self.rule.session.passes
        net = passes().net if passes else self.rule.module
        return Unreadable.apply(error, (value,), *net.parameters())

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: values without a graph."""
        return {**vars(self), "deferred": None, "current": None, "sums": {}}
