"""The first look at a network's forward: it is tried out, once for each kind of input, before a pass relies on it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .draws import random_state
from .forward_state import ForwardState
from .inline import Inline
from .neuron_rule import NeuronRule
from .probe import Arrange, find_mixing, stirred
from .problem import UnsupportedModuleError
from .rule import Rule
from .session import Session
from .support import keeps_steps_apart

Run = Callable[[str, tuple, dict, Inline], Any]  # one pass: its phase, the network's arguments, what it is watched by
_TRIALS = 5  # in which the generators must stand still once: another thread may draw from them too


class Looks:
    """What the forward of one network does between its modules, by kind of input."""

    def __init__(self, net: nn.Module, session: Session):
        """Before the rules replace any forward: a user's own replacement may do anything."""
        self.net, self.session = net, session
        self.forward_is_known = all(keeps_steps_apart(module) for module in net.modules())
        self.seen: dict[Any, Inline] = {}

    def look(self, inputs: tuple[tuple, dict], run: Run, rules: list[Rule], state: ForwardState) -> Inline:
        """Runs the network where it gets such inputs for the first time.

        Args:
            inputs: its arguments, whose tensors have time, unless the forward makes steps of them.

        Raises:
            UnsupportedModuleError: the forward draws random numbers that the rate pass cannot repeat.
        """
        tensors = [x for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)]
        timed = all(map(self.has_time, tensors))
        kind = timed, *(x.dim() for x in tensors), *(module.training for module in self.net.modules())
        if kind not in self.seen:
            inline = Inline(self.session, max((x.dim() for x in tensors), default=0))
            inline.steps_known_apart = self.forward_is_known or self.session.setting.time_step == 1
            if not self.forward_is_known:
                self._try(inputs, run, inline, state)
                if inline.repeats and self.session.setting.step_mode == "m":
                    inline.makes_steps = not timed or self._makes_steps(inputs, run, inline, rules, state)
            self.seen[kind] = inline
        return self.seen[kind]

    def has_time(self, x: Tensor) -> bool:
        dim, setting = self.session.setting.time_dim, self.session.setting
        return x.dim() > dim and x.shape[dim] == setting.time_step

    def _try(self, inputs: tuple[tuple, dict], run: Run, inline: Inline, state: ForwardState) -> bool:
        """A probe pass; whether the network's forward came to its end."""
        for _ in range(_TRIALS):
            before = self._random_states()
            try:
                with state.put_back(attributes=True):
                    run("probe", *tree_map(copied, inputs), inline)
            except UnsupportedModuleError:
                raise
            except Exception:  # the spike pass meets it too, and it is for the caller to see it there
                return False
            if all(torch.equal(old, random_state(device)) for device, old in before.items()):
                return True
        raise self._unsupported(
            "it draws random numbers outside of modules, anew in each pass; use a dropout module, or F.dropout"
        )

    def _random_states(self) -> dict[torch.device, Tensor]:
        """Of the generators that the network may draw from."""
        devices = {torch.device("cpu"), *(p.device for p in self.net.parameters())}
        return {device: random_state(device) for device in devices}

    def _makes_steps(
        self, inputs: tuple[tuple, dict], run: Run, inline: Inline, rules: list[Rule], state: ForwardState
    ):
        """Whether the forward makes T steps also of one image: then what could be time, being T, is the batch."""
        dim = self.session.setting.time_dim
        first = tree_map(lambda x: x.narrow(dim, 0, 1) if isinstance(x, Tensor) else x, inputs)
        if self.session.setting.time_step == 1 or not self._try(first, run, inline, state):
            return False
        neurons = [rule.name for rule in rules if isinstance(rule, NeuronRule)]
        rows = [len(self.session.probed[name]) for name in neurons if name in self.session.probed]
        return bool(rows) and all(n == self.session.setting.time_step for n in rows)

    def check_steps(
        self, inputs: tuple[tuple, dict], run: Run, inline: Inline, rules: list[Rule], state: ForwardState
    ) -> None:
        """Raises UnsupportedModuleError where the forward lets one time step know of another."""
        setting = self.session.setting

        def results(arrange: Arrange, short: bool) -> dict[str, Tensor]:
            inline.short = short
            if inline.makes_steps:
                inline.arrange, arrange = arrange, copied_steps
            args, kwargs = tree_map(lambda x: arrange(x, setting.time_dim) if isinstance(x, Tensor) else x, inputs)
            with state.put_back(attributes=True):
                output = run("probe", args, kwargs, inline)
            tensors = [y for y in tree_flatten(output)[0] if isinstance(y, Tensor)]
            return {**self.session.probed, **{f"output {i}": y for i, y in enumerate(tensors)}}

        def find() -> str | None:
            return find_mixing(results, self._stirred, setting.time_step)

        try:
            mixed = find()
            if mixed is not None and inline.summed_over_time():
                inline.sums = True
                if (left := find()) is None:
                    mixed = None
                else:
                    inline.sums, mixed = False, mixed if mixed.startswith("output") else left
        finally:
            inline.arrange = None
        if mixed is None:
            inline.steps_known_apart = True
            return
        rule = next((rule for rule in rules if rule.name == mixed), None)
        if rule is not None:
            raise rule._unsupported(
                "what reaches it at one time step depends on the others, or time is not its leading dimension: the "
                "network's forward mixes time steps, has weights of its own for each, or folds them as [B * T, ...] in "
                "place of [T * B, ...]; treat each step alike and by itself, or train with BPTT"
            )
        raise self._unsupported(
            "it sums, selects or mixes time steps in its forward; let it return all of them, their mean or their sum"
        )

    def _stirred(self) -> AbstractContextManager:
        return stirred(self.net.modules())

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(type(self.net).__name__, self.net, reason)


def copied(x: Any) -> Any:
    """A copy of a tensor, with its graph: the network may work in place on it."""
    return x.clone() if isinstance(x, Tensor) else x


def copied_steps(x: Tensor, dim: int) -> Tensor:
    return x.clone()
