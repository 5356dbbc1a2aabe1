"""Spiking neurons in the two passes."""

from typing import Any

import torch
from spikingjelly.activation_based import base, neuron
from torch import Tensor, nn

from .compiled import lif_kernel, rates_compiled, run_steps_compiled
from .eligibility import (
    Differentiated,
    LinearCharge,
    NeuronRecord,
    NeuronState,
    NotElementwiseError,
    RateSums,
    dynamics_of,
    learnable_parameters,
    memory_names,
    rates,
    run_steps,
)
from .function import NeuronRate
from .probe import memoryless
from .problem import NetworkError, Unserved
from .registry import found, rule_for
from .rule import LOOP, MemoryRule, StandIn
from .session import Session
from .spike_counts import SpikeCounts
from .states import States


@rule_for(*found(neuron, "BaseNode", "SimpleBaseNode"), subclasses=True)
class NeuronRule(MemoryRule):
    """Spiking neurons: the record is a `NeuronRecord`, of whose sums the rate pass makes r and its derivatives, and the
    type of the spikes, in which these are.
    """

    rows_are_images = False

    @classmethod
    def problem(cls, module: nn.Module) -> Unserved | None:
        if getattr(module, "store_v_seq", False):
            return Unserved(
                "store_v_seq keeps the potentials of all steps, which the spike pass does not",
                "set store_v_seq=False",
                "setting",
            )
        return None

    def __init__(self, module: base.MemoryModule, name: str, session: Session):
        super().__init__(module, name, session)
        self.stand_ins.append(StandIn.put(module, "detach", self.detach))
        vars(module)["_memories"] = self.states = States(module._memories, self)
        self.checked = False  # that a neuron without a closed form is one that can be differentiated step by step

    def spike(self, x: Tensor, kept: tuple | None) -> tuple[Tensor, tuple[NeuronRecord, torch.dtype]]:
        if self.session.calls[self] > 1:
            raise self._unsupported(
                "it is called twice in one forward, and the second call would go on with the first one's state: let "
                f"each place have a neuron layer of its own, or {LOOP}"
            )
        steps = x if self.setting.step_mode == "m" else x.unsqueeze(0)  # [T or 1, B, ...]
        if len(steps) != self.setting.steps_per_call:
            raise NetworkError(
                f"{self.name!r} gets {len(steps)} time steps where time_step = {self.setting.time_step}: time has to be"
                f" its leading dimension, apart from the batch (not folded, [T * B, ...]); {LOOP}"
            )
        record, _ = kept or (None, None)
        if record is None:
            self.states.forget()
        self.states.after = None  # what the neuron itself reads is plain
        # Anew each time: a user may change the threshold between batches.
        dynamics = dynamics_of(self.module, check=not self.checked)
        names = memory_names(self.module)
        memory = self._memory(dynamics, steps[0])
        if record is None:
            record = NeuronRecord(NeuronState.start(memory, len(learnable_parameters(self.module))))
        else:
            record = record._replace(state=_as_it_is(record.state, memory))
        for name, value in zip(names, record.state.memory, strict=True):
            if isinstance(value, Tensor) and value.shape != steps[0].shape:
                raise RuntimeError(
                    f"{self.name!r} holds {name} of shape {list(value.shape)} but gets {list(steps[0].shape)}: "
                    "call functional.reset_net(net) between batches"
                )
        before = tuple(getattr(self.module, name) for name in names)
        run = run_steps_compiled if self.setting.compiled else run_steps
        try:
            record, spikes = run(dynamics, record, steps)
        except NotElementwiseError as error:
            raise self._unsupported(str(error)) from error
        spikes = spikes if self.setting.step_mode == "m" else spikes[0]
        if isinstance(dynamics, Differentiated) and not self.checked:
            self._remember(before)
            if not torch.allclose(self.original_forward(x).to(spikes.dtype), spikes):
                raise self._unsupported("its multi-step forward is not its single-step forward repeated, or is random")
        self._remember(record.state.memory)
        self.states.ran(record.state, self.session.window.deferred)
        return spikes, (record, spikes.dtype)

    def rate(self, x: Tensor, kept: tuple[NeuronRecord, torch.dtype], one_step: bool) -> Tensor:
        if not one_step:
            raise self._unsupported("it stands behind the network's time average and would take the batch for time")
        self._check_constants()
        self.checked = True
        record, dtype = kept
        steps, sums = self.setting.time_step, record.sums
        if self.setting.step_mode == "m":
            sums = RateSums(sums.spikes.unsqueeze(0), tuple(total.unsqueeze(0) for total in sums.slopes))  # [1, B, ...]
        counted = steps <= 255 and isinstance(dynamics_of(self.module), LinearCharge)
        found = (rates_compiled if self.setting.compiled else rates)(sums, steps, dtype, counted)
        slopes = found[1 : 1 + len(sums.slopes)]
        parameters = [owner._parameters[name] for owner, name in learnable_parameters(self.module)]
        rate, current = NeuronRate.apply(x, found[:1], slopes[0], slopes[1:], *parameters)
        self.states.rated(current, self.session.window.deferred)
        if counted:
            self.session.window.counts.add(rate, SpikeCounts(found[-1], steps))
        return rate

    def probe(self, x: Tensor) -> Tensor:
        return memoryless(x)

    def detach(self) -> None:
        """SpikingJelly's, by which a user says that the next window goes on from this potential."""
        self.states.forget()
        self.stand_ins[2].original()
        # Other objects, by which a window that has begun knows that what they hold no longer depends on its steps.
        values = (getattr(self.module, name) for name in memory_names(self.module))
        self._remember(tuple(value.detach() if isinstance(value, Tensor) else value for value in values))

    def reset(self) -> None:
        if self.session.phase not in ("rate", "probe"):
            self.states.forget()
        super().reset()

    def remove(self) -> None:
        super().remove()
        vars(self.module)["_memories"] = dict(self.states)

    def check_start(self) -> None:
        if unserved := self.problem(self.module):
            raise self._unsupported(f"{unserved.reason}; {unserved.remedy}")
        if self.states.of_last_step():
            raise RuntimeError(
                f"{self.name!r} still holds the potential of the batch before: call functional.reset_net(net) between "
                "batches, or functional.detach_net(net) to go on from it on purpose"
            )

    def _check_constants(self) -> None:
        for name, value in vars(self.module).items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise self._unsupported(
                    f"its {name} is computed from parameters, to which no gradient would come: make it one of its own"
                )

    def refuse_start(self, name: str) -> None:
        raise self._unsupported(
            f"its {name} is set to what needs a gradient, which would not come: set a constant, or train with BPTT"
        )

    def _memory(self, dynamics: LinearCharge | Differentiated, like: Tensor) -> tuple[Tensor | float, ...]:
        """The module's state variables: tensors of one step's shape or, until it has run, numbers where they serve."""
        values = []
        for name in memory_names(self.module):
            value = getattr(self.module, name)
            if isinstance(value, Tensor) and value.requires_grad:
                self.refuse_start(name)
            values.append(value)
        numbers_serve = isinstance(dynamics, LinearCharge) and dynamics.by_parameter is None
        return tuple(
            value if isinstance(value, Tensor) or numbers_serve else torch.full_like(like, value) for value in values
        )

    def _remember(self, memory: tuple[Any, ...]) -> None:
        for name, value in zip(memory_names(self.module), memory, strict=True):
            setattr(self.module, name, value)


def computes_in_float32(module: nn.Module, x: Tensor) -> bool:
    """Whether the pass that is running computes in float32 with an input of half precision as it is."""
    rule = getattr(vars(module).get("forward"), "__self__", None)
    if not isinstance(rule, NeuronRule) or rule.session.phase not in ("spike", "rate") or not rule.setting.compiled:
        return False
    steps = x if rule.setting.step_mode == "m" else x.unsqueeze(0)
    return lif_kernel(dynamics_of(module), steps) is not None


def _as_it_is(state: NeuronState, memory: tuple[Tensor | float, ...]) -> NeuronState:
    """``state``, but with what was set since the step: constants, on which no earlier step has an influence."""
    kept = [old is new for old, new in zip(state.memory, memory, strict=True)]
    if all(kept):
        return state
    values = (
        new if isinstance(new, Tensor) else torch.full_like(old, new)
        for old, new in zip(state.memory, memory, strict=True)
    )
    slopes = (
        tuple(slope if same else _zero(slope) for slope, same in zip(of_source, kept, strict=True))
        for of_source in state.memory_slopes
    )
    return NeuronState(tuple(values), tuple(slopes))


def _zero(slope: Tensor | float) -> Tensor | float:
    return torch.zeros_like(slope) if isinstance(slope, Tensor) else 0.0
