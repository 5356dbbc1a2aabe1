"""The first look at a network's forward: it is tried out, once for each kind of input, before a pass relies on it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .draws import random_state
from .filled import Place
from .forward_state import PLAIN, ForwardState
from .inline import Inline
from .neuron_rule import NeuronRule
from .probe import Arrange, alike, find_mixing, stirred
from .problem import UnsupportedModuleError
from .rule import Rule
from .session import Session
from .support import keeps_steps_apart

Run = Callable[[str, tuple, dict, Inline], Any]  # one pass: its phase, the network's arguments, what it is watched by
REMEMBERS = (
    "depends on what earlier steps left in its modules' attributes, or on their number: BPTT goes back through such a "
    "memory, the one rate pass of all steps cannot; leave it to neurons, or train with BPTT"
)
CHANGES = (
    "what it makes of a step depends on its buffers, which other steps have changed: BPTT takes each step as it was, "
    "the one rate pass of all steps cannot; use step mode 'm', where they change once a forward, set it to eval(), or "
    "train with BPTT"
)
_TRIALS = 5  # in which the generators must stand still once: another thread may draw from them too
_MOST_LOOKS = 16  # at inputs that differ in numbers alone, as where one of them counts the batches


class Looks:
    """What the forward of one network does between its modules, by kind of input."""

    def __init__(self, net: nn.Module, session: Session):
        """Before the rules replace any forward: a user's own replacement may do anything."""
        self.net, self.session = net, session
        self.forward_is_known = all(keeps_steps_apart(module) for module in net.modules())
        self.seen: dict[Any, dict[Any, Inline]] = {}  # by kind of tensors, then by numbers, names and switches
        self.parameters = list(net.parameters())
        self.counted: set[tuple[int, str]] = set()  # attributes that the forward changes itself

    def look(self, inputs: tuple[tuple, dict], run: Run, rules: list[Rule], state: ForwardState) -> Inline:
        """Runs the network where it gets such inputs for the first time.

        Args:
            inputs: its arguments, whose tensors have time, unless the forward makes steps of them.

        Raises:
            UnsupportedModuleError: the forward draws random numbers that the rate pass cannot repeat.
        """
        if self.forward_is_known:
            return self._first_look(inputs, True, run, rules, state)
        leaves = tree_flatten(inputs)[0]
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        timed = all(map(self.has_time, tensors))
        kind = timed, *((x.dim(), x.dtype) for x in tensors), *(module.training for module in self.net.modules())
        switches = self._switches(inputs, leaves, state)
        of_kind = self.seen.setdefault(kind, {})
        if switches not in of_kind and len(of_kind) < _MOST_LOOKS:
            inline = self._first_look(inputs, timed, run, rules, state)
            of_kind[self._switches(inputs, leaves, state)] = inline  # without what it counts
            return inline
        return of_kind.get(switches, next(reversed(of_kind.values())))

    def _first_look(
        self, inputs: tuple[tuple, dict], timed: bool, run: Run, rules: list[Rule], state: ForwardState
    ) -> Inline:
        dims = [x.dim() for x in tree_flatten(inputs)[0] if isinstance(x, Tensor)]
        inline = Inline(self.session, max(dims, default=0))
        inline.steps_known_apart = self.forward_is_known or self.session.setting.time_step == 1
        if not self.forward_is_known:
            self._try(inputs, run, inline, state)
            if self.session.setting.step_mode == "m" and any(inline.repeated.values()):
                inline.makes_steps = not timed or self._makes_steps(inputs, run, inline, rules, state)
        return inline

    def _switches(self, inputs: tuple[tuple, dict], leaves: list[Any], state: ForwardState) -> tuple:
        """All by which a forward may choose what it does: arguments that are no tensors, the modules' attributes."""
        attributes = (
            (i, name, _switch(value))
            for i, (held, _) in enumerate(state.attributes)
            for name, value in held.items()
            if isinstance(value, PLAIN) and (i, name) not in self.counted
        )
        return *map(_switch, leaves), *inputs[1], *attributes

    def has_time(self, x: Tensor) -> bool:
        dim, setting = self.session.setting.time_dim, self.session.setting
        return x.dim() > dim and x.shape[dim] == setting.time_step

    def _try(self, inputs: tuple[tuple, dict], run: Run, inline: Inline, state: ForwardState) -> bool:
        """A probe pass; whether the network's forward came to its end."""
        for _ in range(_TRIALS):
            before = self.random_states()
            try:
                with state.put_back():
                    run("probe", *tree_map(copied, inputs), inline)
                    self.counted |= state.counted()
            except UnsupportedModuleError:
                raise
            except Exception:  # the spike pass meets it too, and it is for the caller to see it there
                return False
            if not self.have_moved(before):
                return True
        raise self._unsupported(
            "it draws random numbers outside of modules, anew in each pass; use a dropout module, or F.dropout"
        )

    def random_states(self) -> dict[torch.device, Tensor]:
        """Of the generators that the network may draw from; none where its forward is known to draw nothing."""
        if self.forward_is_known:
            return {}
        devices = {torch.device("cpu"), *(p.device for p in self.parameters)}
        return {device: random_state(device) for device in devices}

    @staticmethod
    def have_moved(before: dict[torch.device, Tensor]) -> bool:
        return any(not torch.equal(old, random_state(device)) for device, old in before.items())

    def check_draws(self, inputs: tuple[tuple, dict], run: Run, state: ForwardState) -> None:
        """Raises UnsupportedModuleError where a forward that drew no random numbers does so now.

        Args:
            inputs: those of the rate pass, of one step.
        """
        inline = Inline(self.session)
        inline.short = True
        self._try(inputs, run, inline, state)
        if inline.draws:
            raise self._unsupported(
                "its forward draws random numbers, and drew none when it was first run, perhaps because a rate was 0 "
                "then: call rate_model_setting again after such a change"
            )

    def _makes_steps(
        self, inputs: tuple[tuple, dict], run: Run, inline: Inline, rules: list[Rule], state: ForwardState
    ) -> bool:
        """Whether the forward makes T steps also of one image: then what could be time, being T, is the batch."""
        dim = self.session.setting.time_dim
        first = tree_map(lambda x: x.narrow(dim, 0, 1) if isinstance(x, Tensor) else x, inputs)
        trial = Inline(self.session, inline.input_dim)
        if self.session.setting.time_step == 1 or not self._try(first, run, trial, state):
            return False
        neurons = [rule.name for rule in rules if isinstance(rule, NeuronRule)]
        rows = {len(self.session.probed[name]) for name in neurons if name in self.session.probed}
        if rows == {1}:
            inline.may_shorten = False  # what it repeats is not time
        return rows == {self.session.setting.time_step}

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
            with state.put_back():
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

    def check_memories(
        self,
        inputs: tuple[tuple, dict],
        run: Run,
        inline: Inline,
        rules: list[Rule],
        first: ForwardState,
        last: ForwardState,
    ) -> set[Place]:
        """Raises UnsupportedModuleError where a step knows of earlier ones by attributes or buffers of its modules.

        Args:
            inputs: of the last step of a window in step mode 's'.
            first, last: before the window's first step and before its last one.

        Returns:
            The places of tensors that a step leaves behind and that do.
        """

        def results(state: ForwardState) -> tuple[dict[str, Tensor], dict[Place, Tensor]]:
            with state.put_back():
                output = run("probe", *tree_map(copied, inputs), inline)
                left, self.session.filled = self.session.filled.tensors(), None
            tensors = [y for y in tree_flatten(output)[0] if isinstance(y, Tensor)]
            return {**self.session.probed, **{f"output {i}": y for i, y in enumerate(tensors)}}, left

        places, changed = set(), [m for m in self.net.modules() if last.has_other_buffers_than(first, m)]
        for stirring in (nullcontext(), self._stirred()):
            with stirring:
                (alone, left_alone), (after, left_after) = (
                    results(state) for state in (last.with_attributes_of(first, numbers=True), last)
                )
                if (name := _unlike(alone, after)) is not None:
                    rule = next((rule for rule in rules if rule.name == name), None)
                    unsupported = rule._unsupported if rule else self._unsupported
                    raise unsupported(f"{'what reaches it' if rule else 'what it puts out'} {REMEMBERS}")
                if changed and _unlike(results(last.with_buffers_of(first, changed))[0], after) is not None:
                    module = next(
                        (
                            m
                            for m in changed
                            if _unlike(results(last.with_buffers_of(first, [m]))[0], after) is not None
                        ),
                        changed[0],
                    )
                    name = next(name for name, other in self.net.named_modules() if other is module)
                    raise UnsupportedModuleError(name or type(module).__name__, module, CHANGES)
            shared = left_alone.keys() & left_after.keys()
            places |= {place for place in shared if not alike(left_alone[place], left_after[place])}
        return places

    def _stirred(self) -> AbstractContextManager:
        return stirred(self.net.modules())

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(type(self.net).__name__, self.net, reason)


def _unlike(some: dict[str, Tensor], others: dict[str, Tensor]) -> str | None:
    """The first of the results that are not the same, or not in both."""
    return next(
        (n for n in [*some, *others] if n not in some or n not in others or not alike(some[n], others[n])), None
    )


def _switch(x: Any) -> Any:
    """What of an argument or attribute that is no tensor a forward may choose by."""
    return (type(x), x) if isinstance(x, PLAIN) else type(x)


def copied(x: Any) -> Any:
    """A copy of a tensor, with its graph: the network may work in place on it."""
    return x.clone() if isinstance(x, Tensor) else x


def copied_steps(x: Tensor, dim: int) -> Tensor:
    return x.clone()
