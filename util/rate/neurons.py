"""Spiking neurons: steps without a graph, of which the rate's derivative by the input is made on the fly.

What a neuron layer needs in both step modes; neurons_multi_step.py and neurons_single_step.py run its steps. They stand
in for its step function, so that what a class derived from it, or a wrapper, does around that is the network's code.
"""

from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from .compiled import lif_kernel, rates_compiled, run_steps_compiled
from .draws import generator_state, set_generator_state
from .dynamics import Differentiated, NotElementwiseError, dynamics_of, learnable_parameters, memory_names
from .eligibility import Dynamics, LinearCharge, NeuronRecord, NeuronState, rates, run_steps
from .function import Linearised
from .memory import Memory
from .problem import UnsupportedModuleError
from .session import Setting
from .stand_in import StandIn, in_backward, is_looking

LOOP = "where the forward loops over time itself, attach the network inside the loop by itself, in step mode 's'"


class Neurons:
    """The stand-in of one neuron layer."""

    STEP: str  # the function that ``step`` stands in for

    def __init__(self, module: base.MemoryModule, path: str, hooks: Any):
        """``hooks``: of the network, which know what is ``running``; there the module is at ``path``."""
        self.module, self.name, self.hooks = module, path, hooks
        self.setting: Setting = hooks.setting
        stand_ins = {self.STEP: self.step, "reset": self.reset, "detach": self.detach}
        self.stand_ins = [StandIn.put(module, name, method) for name, method in stand_ins.items()]
        # In which training mode a neuron without a closed form has been found to be differentiable step by step.
        self.checked_in: bool | None = None
        self.runs_as_bptt = False  # it is no such neuron

    @property
    def checked(self) -> bool:
        return self.checked_in is self.module.training

    def step(self, *args, **kwargs) -> Tensor:
        """Stands in for the module's step function."""
        raise NotImplementedError

    @property
    def memory(self) -> Memory:
        if not isinstance(self.module._memories, Memory):
            vars(self.module)["_memories"] = Memory(self.module._memories)
        return self.module._memories

    @classmethod
    def in_place_of(cls, method: Any) -> "Neurons | None":
        """What stands there for a module's method, if anything does."""
        found = getattr(method, "__self__", None)
        return found if isinstance(found, cls) else None

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

    def original(self, *args, **kwargs) -> Tensor:
        if self.hooks.running is None and self.hooks.attached and in_backward():
            raise self.unsupported(
                "it is run again in backward, where there is nothing to repeat: leave out checkpointing and "
                "reversible blocks, whose memory the method saves anyway, or train with BPTT"
            )
        return self.stand_ins[0].original(*args, **kwargs)

    @property
    def names(self) -> list[str]:
        return memory_names(self.module)

    def plain_memory(self) -> tuple[Any, ...]:
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
        dynamics = self.dynamics(check=not self.checked)
        drawn = None if self.checked else generator_state([currents])
        with torch.enable_grad():
            constants = {name: getattr(self.module, name, None) for name in ("tau", "v_threshold", "v_reset")}
        for name, value in (constants | vars(self.module)).items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and _has_graph(value):
                raise NotElementwiseError(f"its {name} is computed from parameters: make it one of its own")
        record = record._replace(state=_in_tensors(record.state, currents[0], dynamics))
        record, spikes = (run_steps_compiled if self.setting.compiled else run_steps)(dynamics, record, currents)
        if drawn is not None and not torch.equal(drawn, generator_state([currents])):
            set_generator_state(drawn, [currents])
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
        counted = steps <= 255 and isinstance(self.dynamics(), LinearCharge)
        found = (rates_compiled if self.setting.compiled else rates)(record.sums, steps, dtype, counted)
        found = [x.unsqueeze(0) if x.dim() < sources[0].dim() else x for x in found]
        rate = Linearised.apply((found[0],), tuple(found[1 : 1 + len(sources)]), *sources)
        return rate, found[-1] if counted else None

    def slopes(self, record: NeuronRecord) -> list[tuple[Tensor, tuple[Tensor | float, ...]]]:
        """Each state variable and its derivatives by the sources."""
        return list(zip(record.state.memory, zip(*record.state.memory_slopes, strict=True), strict=True))

    def dynamics(self, check: bool = False) -> Dynamics:
        forward = self.stand_ins[0].original if self.STEP == "single_step_forward" else None
        of = dynamics_of if self.stand_ins[0].previous is None else Differentiated  # another's, on this very module
        return of(self.module, forward, check)

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


def computes_in_float32(module: base.MemoryModule, x: Tensor) -> bool:
    """Whether the hooks that are running compute in float32 with an input of half precision as it is."""
    for name in ("multi_step_forward", "single_step_forward"):
        stands_in = Neurons.in_place_of(vars(module).get(name))
        if stands_in and stands_in.hooks.running and stands_in.setting.compiled:
            return lif_kernel(stands_in.dynamics(), x if name == "multi_step_forward" else x.unsqueeze(0)) is not None
    return False
