"""What a rule is: it stands in for a module's ``forward`` while the hooks are on, and knows the two passes.

What a call of the module leaves behind in the spike pass is a record; the same call in the rate pass, found by its
place in the order of calls, uses it up. Records live in the session's window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from .probe import sample
from .problem import PassError, Unserved, UnsupportedModuleError
from .session import Session

LOOP = "where the forward loops over time itself, attach the network inside the loop by itself, in step mode 's'"


@dataclass(frozen=True)
class StandIn:
    """A method of one module instance, replaced for as long as the hooks are on."""

    module: nn.Module
    name: str
    method: Callable  # what stands in
    previous: Callable | None  # what the instance itself had under that name; mostly its class has it alone

    @classmethod
    def put(cls, module: nn.Module, name: str, method: Callable) -> "StandIn":
        stand_in = cls(module, name, method, vars(module).get(name))
        setattr(module, name, method)
        return stand_in

    @property
    def original(self) -> Callable:
        """The method that was replaced. Not kept bound: unpickling would bind the one that replaces it."""
        return self.previous or getattr(type(self.module), self.name).__get__(self.module)

    def remove(self) -> None:
        """Puts back what was there; a wrapper that a user has put around the method since stays."""
        if vars(self.module).get(self.name) != self.method:
            return
        delattr(self.module, self.name)
        if self.previous is not None:
            setattr(self.module, self.name, self.previous)


def in_backward() -> bool:
    """Whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1


class Rule:
    """What the kinds share: standing in for ``module.forward``, and finding the record of a call."""

    knows_time = True  # whether it takes its input's leading dimension for time, [T, B, ...] or [T * B, ...]
    rows_are_images = True  # whether that may be [T * B, ...]

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        """Whether the module needs the rule; else it runs in both passes as it is."""
        return True

    @classmethod
    def problem(cls, module: nn.Module) -> Unserved | None:
        """What in the module's setting keeps the rule from being right."""
        return None

    def __init__(self, module: nn.Module, name: str, session: Session):
        self.module, self.name, self.session = module, name, session
        self.stand_ins = [StandIn.put(module, "forward", self.forward)]

    @property
    def setting(self):
        return self.session.setting

    def original_forward(self, *args, **kwargs) -> Tensor:
        return self.stand_ins[0].original(*args, **kwargs)

    def remove(self) -> None:
        for stand_in in self.stand_ins:
            stand_in.remove()

    def forward(self, *args, **kwargs) -> Tensor:
        """The module's call in whatever pass is running; outside of all, the module's own."""
        if self.session.phase is None:
            if self.session.attached and in_backward():
                raise self._unsupported(
                    "it is run again in backward, where there is nothing to repeat: leave out checkpointing and "
                    "reversible blocks, whose memory the rate pass saves anyway, or train with BPTT"
                )
            return self.original_forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        with self.session.out_of_sight():
            return self._in_pass(x)

    def _in_pass(self, x: Tensor) -> Tensor:
        call = self.session.count(self)
        if self.session.phase == "probe":
            if self.knows_time:
                self.session.probed[self.name] = sample(x, self.rows_are_images)
            return self.probe(x)
        records = self.session.window.records[self]
        if self.session.phase == "spike":
            record = records.of(call, x.shape, self.name)
            y, record.value = self.spike(x, record.value)
            return y
        record = records.take(call, self.name)
        return self.rate(x, record.value, self._is_one_step(x, record.input_shape))

    def check_start(self) -> None:
        """Raises RuntimeError where no window can begin."""

    def _is_one_step(self, x: Tensor, spike_shape: tuple[int, ...]) -> bool:
        """Whether ``x`` is one step of the spike pass's input; False behind the network's own time average."""
        leading, *rest = spike_shape
        if [len(x) * self.setting.steps_per_call, *x.shape[1:]] == [leading, *rest]:
            return True
        if x.shape == spike_shape:
            return False
        raise PassError(
            f"{self.name!r} gets {list(spike_shape)} in the spike pass but {list(x.shape)} in the rate pass: the "
            "network does not treat its leading dimension as time"
        )

    def unfold_steps(self, x: Tensor) -> Tensor | None:
        """[T, B, ...] or [T * B, ...] of the spike pass -> [T, 1 or B, ...], in step mode 's' [1, B, ...].

        None where there are no T steps, behind the network's own time average. A batch there may happen to have a
        multiple of T images: what is made of them is a record that is not used, because in the rate pass, which has the
        same batch, `_is_one_step` knows.
        """
        return None if len(x) % self.setting.steps_per_call else x.unflatten(0, (self.setting.steps_per_call, -1))

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(self.name, self.module, reason)

    def once_if_static(self, x: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``function(x)``, computed for one step only where ``x`` is the same at every step."""
        static = self.session.window.static
        if not static.contains(x):
            return function(x)
        return static.computed_once((self, self.session.calls[self]), x, function)

    def spike(self, x: Tensor, record: Any) -> tuple[Tensor, Any]:
        """The module's true output, and the record of this call, made or brought up to date. Runs without a graph.

        ``x`` is [T, B, ...] (or [T * B, ...]) in step mode 'm' and [B, ...] in step mode 's' and behind the network's
        own time average.
        """
        raise NotImplementedError

    def rate(self, x: Tensor, record: Any, one_step: bool) -> Tensor:
        """The output for the mean input ``x``, [1, B, ...] (or [B, ...]), with a graph; see `_is_one_step`."""
        raise NotImplementedError

    def probe(self, x: Tensor) -> Tensor:
        """What stands in for the module while `probe` looks at what lies between the modules."""
        return self.original_forward(x)


class MemoryRule(Rule):
    """A module with a state that ``functional.reset_net`` resets."""

    def __init__(self, module: base.MemoryModule, name: str, session: Session):
        super().__init__(module, name, session)
        self.stand_ins.append(StandIn.put(module, "reset", self.reset))

    def reset(self) -> None:
        """SpikingJelly's reset of the module, which also ends the window; a forward may begin with it in mode 'm'."""
        if self.session.phase in ("rate", "probe"):
            return  # the neuron's state is the spike pass's
        if self.session.phase == "spike" and self.setting.step_mode == "s":
            raise self._unsupported(f"the network resets it in every step; use step mode 'm', or {LOOP}")
        self.stand_ins[1].original()
        if self.session.phase is None:
            self.session.window = None
