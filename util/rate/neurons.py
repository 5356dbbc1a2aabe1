"""Spiking neurons: T steps without a graph, of which the rate's derivative by the input is made on the fly.

Stands in for a neuron's step function (``multi_step_forward``, in step mode 's' ``single_step_forward``), so that what
a class derived from it, or a wrapper, does around its steps is ordinary code of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily

from .compiled import lif_kernel, rates_compiled, run_steps_compiled
from .dynamics import Differentiated, NotElementwiseError, dynamics_of, learnable_parameters, memory_names
from .eligibility import Dynamics, LinearCharge, NeuronRecord, NeuronState, rates, run_steps
from .function import Linearised
from .memory import Memory
from .problem import UnsupportedModuleError
from .rated import mean_of_steps, rated, with_rate
from .session import Setting
from .stand_in import StandIn, in_backward, is_looking

LOOP = "where the forward loops over time itself, attach the network inside the loop by itself, in step mode 's'"


@dataclass
class _Progress:
    """Of one layer in step mode 's': the record of the window so far, and the memory that it began and ended with."""

    record: NeuronRecord | None = None
    starts: list[Tensor | float] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)


class Neurons:
    """The stand-in of one neuron layer."""

    def __init__(self, module: base.MemoryModule, path: str, hooks: Any):
        """``hooks``: of the network, which know what is ``running``; there the module is at ``path``."""
        self.module, self.name, self.hooks = module, path, hooks
        self.setting: Setting = hooks.setting
        steps = (self._multi_step, "multi_step_forward"), (self._single_step, "single_step_forward")
        method, name = steps[self.setting.step_mode == "s"]
        self.stand_ins = [
            StandIn.put(module, name, method),
            StandIn.put(module, "reset", self.reset),
            StandIn.put(module, "detach", self.detach),
        ]
        self.checked = False  # that a neuron without a closed form is one that can be differentiated step by step
        self.plain = False  # it is no such neuron, and runs as with BPTT

    @property
    def memory(self) -> Memory:
        if not isinstance(self.module._memories, Memory):
            vars(self.module)["_memories"] = Memory(self.module._memories)
        return self.module._memories

    def remove(self) -> None:
        for stand_in in self.stand_ins:
            stand_in.remove()
        vars(self.module)["_memories"] = dict(self.module._memories)

    def reset(self) -> None:
        self.hooks.restart(self)
        self.memory.forget()
        self.stand_ins[1].original()

    def detach(self) -> None:
        """SpikingJelly's, by which a user says that the next batch goes on from this potential."""
        memory = self.memory
        memory.forget()
        # Other objects, by which a window that has begun knows that what they hold no longer depends on its steps.
        memory.update({name: x.detach() if isinstance(x, Tensor) else x for name, x in memory.items()})

    def check_start(self) -> None:
        """Raises RuntimeError where no batch can begin."""
        if getattr(self.module, "store_v_seq", False):
            raise self.unsupported(f"{STORE_V_SEQ[0]}; {STORE_V_SEQ[1]}")
        if self.memory.is_left():
            raise RuntimeError(
                f"{self.name!r} still holds the potential of the batch before: call functional.reset_net(net) between "
                "batches, or functional.detach_net(net) to go on from it on purpose"
            )

    def unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(self.name, self.module, reason)

    def check_call(self, running: Any, called: set[int]) -> None:
        """Raises UnsupportedModuleError where a call has no right gradient; ``called``: layers in this forward."""
        if not is_looking(running):
            raise self.unsupported(
                "it is called inside a torch.autograd.Function, as by checkpointing and reversible blocks, whose "
                "memory the method saves anyway: leave that out, or train with BPTT"
            )
        if id(self) in called:
            raise self.unsupported(
                "it is called twice in one forward, and the second call would go on with the first one's state: let "
                f"each place have a neuron layer of its own, or {LOOP}"
            )
        called.add(id(self))

    def _original(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.hooks.running is None and self.hooks.attached and in_backward():
            raise self.unsupported(
                "it is run again in backward, where there is nothing to repeat: leave out checkpointing and "
                "reversible blocks, whose memory the method saves anyway, or train with BPTT"
            )
        return self.stand_ins[0].original(x, *args, **kwargs)

    def _multi_step(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[T, B, ...] -> the spikes, with their rate. Stands in for ``multi_step_forward``."""
        running = self.hooks.running
        if running is None or self.plain or args or kwargs:
            return self._original(x, *args, **kwargs)
        running.enter(self, x)
        tag, steps = rated(x), min(len(x), self.setting.time_step // self.setting.windows)
        if len(x) % steps:  # of equal windows, as long as elsewhere
            return self._original(x)
        windows, before = len(x) // steps, self._snapshot()
        with _pop_mode_temporarily():
            fits = tag is not None and tag.dim == 0 and len(tag.rate) == tag.windows == windows
            current = tag.rate if fits else mean_of_steps(x, steps, windows)  # [K, B, ...], with a graph
            starts = self.starts(x[0])
            spikes, all_rates, counts = [], [], []
            currents = (current,) if windows == 1 else current.split(1)
            parts = x.detach().chunk(windows)
            for part, of_window in zip(parts, currents, strict=True):
                try:
                    record, s = self.steps(part, self.record(starts, windows > 1))
                    if not self.checked and part is parts[-1]:
                        self._check(x.detach(), torch.cat([*spikes, s]), before)
                except NotElementwiseError as error:
                    self.plain = str(error)
                    break
                sources = self.sources(of_window, starts, record)
                rate, count = self.rate(record, sources, steps, s.dtype)
                spikes.append(s), all_rates.append(rate), counts.append(count)
                starts = self._leave(record, sources, windows > 1)
            else:
                joined = lambda parts: parts[0] if windows == 1 else torch.cat(parts)  # noqa: E731
                count = None if counts[0] is None else joined(counts)
                return with_rate(joined(spikes), joined(all_rates), 0, windows, count)
        self._put_back(before)
        return self._original(x)

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the steps of a neuron may change."""
        return dict(vars(self.module)), dict(self.memory)

    def _put_back(self, snapshot: tuple[dict[str, Any], dict[str, Any]]) -> None:
        attributes, memory = snapshot
        vars(self.module).clear()
        vars(self.module).update(attributes)
        self.memory.forget()
        self.memory.update(memory)

    @torch.no_grad()
    def _check(self, currents: Tensor, spikes: Tensor, before: tuple) -> None:
        """Raises NotElementwiseError where the module's own steps, all at once, are not its single step repeated."""
        if isinstance(self._dynamics(), Differentiated):
            after = self._snapshot()
            self._put_back(before)
            again = self.stand_ins[0].original(currents)
            if not isinstance(again, Tensor) or not torch.allclose(again.view_as(spikes).to(spikes.dtype), spikes):
                raise NotElementwiseError("its multi-step forward is not its single step repeated, or is random")
            self._put_back(after)
        self.checked = True

    def _single_step(self, x: Tensor, *args, **kwargs) -> Tensor:
        """[B, ...] -> the spikes of this step. Stands in for ``single_step_forward``."""
        running = self.hooks.running
        if running is None or args or kwargs:
            return self._original(x, *args, **kwargs)
        current = running.enter(self, x)
        with _pop_mode_temporarily():
            source, progress = running.deferred.source, running.progress.setdefault(self.name, _Progress())
            if running.opening:
                first = running.window == 0
                self._check_set(() if first else progress.record.state.memory, first)
                starts = self.starts(x) if first else self._go_on(progress)
                record = self.record(starts, not first)
                progress.starts = [source(s) if first and isinstance(s, Tensor) else s for s in starts]
            else:
                self._check_set(progress.record.state.memory)
                record = progress.record._replace(state=_as_it_is(progress.record.state, self._plain_memory()))
            try:
                record, spikes = self.steps(x.detach().unsqueeze(0), record)
            except NotElementwiseError as error:
                raise self.unsupported(f"{error}; use step mode 'm', where it runs as with BPTT") from error
            rate = count = sources = None
            if current is not None:
                sources = self.sources(current, progress.starts, record, source)
                rate, count = self.rate(record, sources, running.steps, spikes.dtype)
                if self.setting.windows > 1:
                    progress.ends = [Linearised.apply((v,), slopes, *sources) for v, slopes in self._slopes(record)]
            progress.record, self.checked = record, True
            for i, (name, (value, slopes)) in enumerate(zip(self.names, self._slopes(record), strict=True)):
                self.memory.leave(name, value, running.reading(self, i, value, slopes, sources))
            return running.put_out(self, spikes[0], rate, count)

    def _check_set(self, left: tuple, first: bool = False) -> None:
        """Raises UnsupportedModuleError where memory was set, since a step ``left`` it, to what needs a gradient."""
        for name, value in zip(self.names, self._plain_memory(), strict=True):
            made = getattr(value, "_mark", None) is not None
            if (
                isinstance(value, Tensor)
                and not any(value is x for x in left)
                and (made or (value.requires_grad and not first))
            ):
                raise self.unsupported(
                    f"its {name} is set between two steps to what needs a gradient, which would not come: set a "
                    "constant, or use step mode 'm'"
                )

    def _go_on(self, progress: "_Progress") -> list[Tensor | float]:
        """The memory that the window before has left, with its graph, or what was set since, a constant."""
        now = zip(self._plain_memory(), progress.record.state.memory, progress.ends, strict=True)
        return [end if value is kept else value.detach() for value, kept, end in now]

    @property
    def names(self) -> list[str]:
        return memory_names(self.module)

    def _plain_memory(self) -> tuple[Any, ...]:
        return tuple(self.memory.plain(name) for name in self.names)

    def starts(self, like: Tensor) -> list[Tensor | float]:
        """The module's state variables before a window, with the graph that a user has given them."""
        self.memory.forget()
        starts = [self.memory[name] for name in self.names]
        for name, value in zip(self.names, starts, strict=True):
            if isinstance(value, Tensor) and value.shape != like.shape:
                raise RuntimeError(
                    f"{self.name!r} holds {name} of shape {list(value.shape)} but gets {list(like.shape)}: "
                    "call functional.reset_net(net) between batches"
                )
        return starts

    def record(self, starts: list[Tensor | float], follow: bool) -> NeuronRecord:
        """Of a window that begins with ``starts``."""
        follow = follow or any(isinstance(x, Tensor) and x.requires_grad for x in starts)
        memory = tuple(x.detach() if isinstance(x, Tensor) else x for x in starts)
        return NeuronRecord(NeuronState.start(memory, len(learnable_parameters(self.module)), follow))

    @torch.no_grad()
    def steps(self, currents: Tensor, record: NeuronRecord) -> tuple[NeuronRecord, Tensor]:
        """Steps [n, B, ...] of a window: its record with them, and the spikes [n, B, ...].

        Raises:
            NotElementwiseError: it is no neuron of whose rate there is an elementwise derivative.
        """
        # Anew each time: a user may change the threshold between batches.
        dynamics = self._dynamics(check=not self.checked)
        with torch.enable_grad():
            constants = {name: getattr(self.module, name, None) for name in ("tau", "v_threshold", "v_reset")}
        for name, value in (constants | vars(self.module)).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and _has_graph(value):
                raise NotElementwiseError(f"its {name} is computed from parameters: make it one of its own")
        record = record._replace(state=_in_tensors(record.state, currents[0], dynamics))
        drawn = None if self.checked else torch.get_rng_state()
        record, spikes = (run_steps_compiled if self.setting.compiled else run_steps)(dynamics, record, currents)
        if drawn is not None and not torch.equal(drawn, torch.get_rng_state()):
            raise NotElementwiseError("its step is random")
        self._put(record.state.memory)
        return record, spikes

    def sources(
        self, current: Tensor, starts: list, record: NeuronRecord, stands_for: Callable[[Tensor], Tensor] = lambda x: x
    ) -> list[Tensor]:
        """What a window's rate, and the memory that it leaves, depend on.

        Args:
            current: the rate of its input, with a graph, [1, B, ...] or [B, ...].
            starts: the memory that it began with.
            stands_for: what stands in the graph for a parameter.
        """
        parameters = [stands_for(owner._parameters[name]) for owner, name in learnable_parameters(self.module)]
        follow = len(record.state.memory_slopes) > 1 + len(parameters)
        memory = [x if isinstance(x, Tensor) else current.new_zeros(()) for x in starts] if follow else []
        return [current, *parameters, *memory]

    def rate(
        self, record: NeuronRecord, sources: list[Tensor], steps: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The rate of a window's spikes, with a graph, and their count; of the shape of the first source."""
        counted = steps <= 255 and isinstance(self._dynamics(), LinearCharge)
        found = (rates_compiled if self.setting.compiled else rates)(record.sums, steps, dtype, counted)
        found = [x.unsqueeze(0) if x.dim() < sources[0].dim() else x for x in found]
        rate = Linearised.apply((found[0],), tuple(found[1 : 1 + len(sources)]), *sources)
        return rate, found[-1] if counted else None

    def _slopes(self, record: NeuronRecord) -> list[tuple[Tensor, tuple[Tensor | float, ...]]]:
        """Each state variable and its derivatives by the sources."""
        return list(zip(record.state.memory, zip(*record.state.memory_slopes, strict=True), strict=True))

    def _leave(self, record: NeuronRecord, sources: list[Tensor], follow: bool) -> list[Tensor]:
        """Puts the memory that a window leaves where it is read, and returns it, for the next window with a graph."""
        ends = []
        for name, (value, slopes) in zip(self.names, self._slopes(record), strict=True):

            def with_graph(value: Tensor, slopes: tuple = slopes) -> Tensor:
                return Linearised.apply((value,), slopes, *sources)

            self.memory.leave(name, value, with_graph)
            ends.append(with_graph(value) if follow else value)
        return ends

    def _dynamics(self, check: bool = False) -> Dynamics:
        replaced = self.stand_ins[0].name == "single_step_forward"
        if self.stand_ins[0].previous is not None:  # another's, on this very module
            return Differentiated(self.module, self.stand_ins[0].original if replaced else None, check)
        return dynamics_of(self.module, self.stand_ins[0].original if replaced else None, check)

    def _put(self, memory: tuple[Any, ...]) -> None:
        for name, value in zip(self.names, memory, strict=True):
            dict.__setitem__(self.module._memories, name, value)


STORE_V_SEQ = (
    "store_v_seq keeps the potentials of all steps, which the method does not",
    "set store_v_seq=False",
)


def _has_graph(x: Tensor) -> bool:
    mark = getattr(x, "_mark", None)
    return x.requires_grad or (mark is not None and mark.graph)


def _in_tensors(state: NeuronState, like: Tensor, dynamics: Dynamics) -> NeuronState:
    """``state``, its memory tensors of one step's shape or, until it has run, numbers where they serve."""
    if isinstance(dynamics, LinearCharge) and dynamics.by_parameter is None:
        return state
    memory = tuple(v if isinstance(v, Tensor) else torch.full_like(like, v) for v in state.memory)
    return state._replace(memory=memory)


def _as_it_is(state: NeuronState, memory: tuple[Tensor | float, ...]) -> NeuronState:
    """``state``, but with what was set since the step: constants, on which no earlier step has an influence."""
    kept = [old is new or not isinstance(old, Tensor) for old, new in zip(state.memory, memory, strict=True)]
    values = [
        old if same else new.detach() if isinstance(new, Tensor) else torch.full_like(old, new)
        for old, new, same in zip(state.memory, memory, kept, strict=True)
    ]
    zero = lambda slope: torch.zeros_like(slope) if isinstance(slope, Tensor) else 0.0  # noqa: E731
    slopes = [
        tuple(slope if same else zero(slope) for slope, same in zip(of_source, kept, strict=True))
        for of_source in state.memory_slopes
    ]
    return state if all(kept) else NeuronState(tuple(values), tuple(slopes))


def computes_in_float32(module: base.MemoryModule, x: Tensor) -> bool:
    """Whether the hooks that are running compute in float32 with an input of half precision as it is."""
    for name in ("multi_step_forward", "single_step_forward"):
        stands_in = getattr(vars(module).get(name), "__self__", None)
        if isinstance(stands_in, Neurons) and stands_in.hooks.running and stands_in.setting.compiled:
            return lif_kernel(stands_in._dynamics(), x if name == "multi_step_forward" else x.unsqueeze(0)) is not None
    return False
