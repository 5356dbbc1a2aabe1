"""How each kind of layer behaves in the two passes of rate-based backpropagation: one rule a kind.

A rule stands in for its module's ``forward``. What a call of the module leaves behind in the spike pass is a record;
the same call in the rate pass, found by its place in the order of calls, uses it up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn

from .compiled import run_steps_compiled
from .eligibility import (
    Differentiated,
    LinearCharge,
    NeuronState,
    NotElementwiseError,
    dynamics_of,
    learnable_parameters,
    memory_names,
    run_steps,
)
from .function import ConvolutionArgs, ConvolutionRate, LinearRate, NeuronRate, SpikeCounts
from .probe import memoryless, sample

if TYPE_CHECKING:
    from .attach import RateBackpropagation


class UnsupportedModuleError(TypeError):
    """Rate-based backpropagation cannot serve a module; the message names it and says why."""

    def __init__(self, name: str, module: nn.Module, reason: str):
        kind = type(module).__name__
        where = kind if name == kind else f"{name!r} ({kind})"
        super().__init__(f"rate-based backpropagation cannot serve {where}: {reason}")


@dataclass(frozen=True)
class StandIn:
    """A method of one module instance, replaced for as long as the hooks are on."""

    module: nn.Module
    name: str
    previous: Callable | None  # what the instance itself had under that name; mostly its class has it alone

    @classmethod
    def put(cls, module: nn.Module, name: str, method: Callable) -> "StandIn":
        stand_in = cls(module, name, vars(module).get(name))
        setattr(module, name, method)
        return stand_in

    @property
    def original(self) -> Callable:
        """The method that was replaced. Not kept bound: unpickling would bind the one that replaces it."""
        return self.previous or getattr(type(self.module), self.name).__get__(self.module)

    def remove(self) -> None:
        delattr(self.module, self.name)
        if self.previous is not None:
            setattr(self.module, self.name, self.previous)


class Rule:
    """What the kinds share: standing in for ``module.forward``, and the records of the current window of T steps."""

    knows_time = True  # whether it takes its input's leading dimension for time, [T, B, ...] or [T * B, ...]

    def __init__(self, module: nn.Module, name: str, owner: "RateBackpropagation"):
        self.module, self.name, self.owner = module, name, owner
        self.records: list[Any] = []
        self.input_shapes: list[torch.Size] = []
        self.calls = 0  # of this module in the current pass
        self.stand_ins = [StandIn.put(module, "forward", self.forward)]

    def original_forward(self, *args, **kwargs) -> Tensor:
        return self.stand_ins[0].original(*args, **kwargs)

    def remove(self) -> None:
        for stand_in in self.stand_ins:
            stand_in.remove()

    def start_window(self) -> None:
        self.records.clear()
        self.input_shapes.clear()

    def start_pass(self) -> None:
        self.calls = 0

    def forward(self, *args, **kwargs) -> Tensor:
        if self.owner.phase is None:
            return self.original_forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        if self.owner.phase == "probe":
            self.calls += 1
            if self.knows_time:
                self.probed = sample(x, many_rows=not isinstance(self, NeuronRule))
            return self.probe(x)
        call, self.calls = self.calls, self.calls + 1
        if self.owner.phase == "spike":
            if call == len(self.records):
                self.records.append(None)
                self.input_shapes.append(x.shape)
            elif x.shape != self.input_shapes[call]:
                raise RuntimeError(
                    f"{self.name!r} got {list(self.input_shapes[call])} earlier in this window, now {list(x.shape)}: "
                    "call functional.reset_net(net) between batches"
                )
            y, self.records[call] = self.spike(x, self.records[call])
            return y
        if call >= len(self.records):
            raise RuntimeError(f"{self.name!r} is called more often in the rate pass than in the spike pass")
        record, self.records[call] = self.records[call], None
        return self.rate(x, record, self._is_one_step(x, self.input_shapes[call]))

    def _is_one_step(self, x: Tensor, spike_shape: torch.Size) -> bool:
        """Whether ``x`` is one step of the spike pass's input; False behind the network's own time average."""
        leading, *rest = spike_shape
        if list(x.shape) == [leading // self.owner.steps_per_call, *rest]:
            return True
        if x.shape == spike_shape:
            return False
        raise RuntimeError(
            f"{self.name!r} gets {list(spike_shape)} in the spike pass but {list(x.shape)} in the rate pass: the "
            "network does not treat its leading dimension as time"
        )

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(self.name, self.module, reason)

    def once(self, x: Tensor, function: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """``function(x)``, computed for one step only where ``x`` is the same at every step."""
        static = self.owner.static
        return static.once((self, self.calls), x, function) if static.holds(x) else function(x)

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
        """What stands in for the module while `util.rate.probe` looks at what lies between the modules."""
        return self.original_forward(x)


class MemoryRule(Rule):
    """A module with a state that ``functional.reset_net`` resets."""

    def __init__(self, module: base.MemoryModule, name: str, owner: "RateBackpropagation"):
        super().__init__(module, name, owner)
        self.stand_ins.append(StandIn.put(module, "reset", self.reset))

    def reset(self) -> None:
        """SpikingJelly's reset of the module, which also ends the window; a forward may begin with it in mode 'm'."""
        if self.owner.phase in ("rate", "probe"):
            return  # the neuron's state is the spike pass's
        if self.owner.phase == "spike" and self.owner.step_mode == "s":
            raise self._unsupported("the network resets it in every step; use step mode 'm'")
        self.stand_ins[1].original()
        if self.owner.phase is None:
            self.owner.restart()


class SharedDropoutRule(MemoryRule):
    """SpikingJelly's dropout: one mask for all steps, kept by the module until it is reset, and so for both passes."""

    knows_time = False

    def spike(self, x: Tensor, record: None) -> tuple[Tensor, None]:
        return self.original_forward(x), None

    def rate(self, x: Tensor, record: None, one_step: bool) -> Tensor:
        return self.original_forward(x)

    def probe(self, x: Tensor) -> Tensor:
        return x


class NeuronRule(MemoryRule):
    """Spiking neurons: the record is a `NeuronState`, of which the rate pass makes r and its derivatives."""

    def __init__(self, module: base.MemoryModule, name: str, owner: "RateBackpropagation"):
        super().__init__(module, name, owner)
        self.checked = False  # that a neuron without a closed form is one that can be differentiated step by step

    def spike(self, x: Tensor, record: NeuronState | None) -> tuple[Tensor, NeuronState]:
        if self.calls > 1:
            raise self._unsupported(
                "it is called twice in one forward, and the second call would go on with the first one's state"
            )
        steps = x if self.owner.step_mode == "m" else x.unsqueeze(0)  # [T or 1, B, ...]
        if len(steps) != self.owner.steps_per_call:
            raise ValueError(f"{self.name!r} gets {len(steps)} time steps where time_step = {self.owner.time_step}")
        # Anew each time: a user may change the threshold between batches.
        dynamics = dynamics_of(self.module, check=not self.checked)
        state = record or NeuronState.start(self._memory(dynamics, steps[0]), len(learnable_parameters(self.module)))
        for name, value in zip(memory_names(self.module), state.memory, strict=True):
            if isinstance(value, Tensor) and value.shape != steps[0].shape:
                raise RuntimeError(
                    f"{self.name!r} holds {name} of shape {list(value.shape)} but gets {list(steps[0].shape)}: "
                    "call functional.reset_net(net) between batches"
                )
        before = tuple(getattr(self.module, name) for name in memory_names(self.module))
        run = run_steps_compiled if self.owner.compiled else run_steps
        try:
            state, spikes = run(dynamics, state, steps)
        except NotElementwiseError as error:
            raise self._unsupported(str(error)) from error
        spikes = spikes if self.owner.step_mode == "m" else spikes[0]
        if isinstance(dynamics, Differentiated) and not self.checked:
            self._remember(before)
            if not torch.allclose(self.original_forward(x).to(spikes.dtype), spikes):
                raise self._unsupported("its multi-step forward is not its single-step forward repeated, or is random")
        self._remember(state.memory)
        return spikes, state

    def rate(self, x: Tensor, record: NeuronState, one_step: bool) -> Tensor:
        if not one_step:
            raise self._unsupported("it stands behind the network's time average and would take the batch for time")
        if not self.checked:
            self._check_constants()
        sums = (record.spike_sum, *record.slope_sums)
        if self.owner.step_mode == "m":
            sums = tuple(total.unsqueeze(0) for total in sums)  # [1, B, ...]
        counts = None
        if self.owner.time_step <= 255 and isinstance(dynamics_of(self.module), LinearCharge):
            counts = SpikeCounts(sums[0].to(torch.uint8), self.owner.time_step)
        r = sums[0] / self.owner.time_step  # not in place: the network may work in place on it, but not on a view
        e, *slopes = (total.div_(self.owner.time_step) for total in sums[1:])
        parameters = [owner._parameters[name] for owner, name in learnable_parameters(self.module)]
        rate = NeuronRate.apply(x, (r,), e, tuple(slopes), *parameters)
        if counts:  # for a linear map that gets the rate as it is
            rate.counts = counts, rate._version
        return rate

    def probe(self, x: Tensor) -> Tensor:
        return memoryless(x)

    def _check_constants(self) -> None:
        for name, value in vars(self.module).items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise self._unsupported(
                    f"its {name} is computed from parameters, to which no gradient would come: make it one of its own"
                )
        self.checked = True

    def _memory(self, dynamics: LinearCharge | Differentiated, like: Tensor) -> tuple[Tensor | float, ...]:
        """The module's state variables: tensors of one step's shape or, until it has run, numbers where they serve."""
        values = [getattr(self.module, name) for name in memory_names(self.module)]
        numbers_serve = isinstance(dynamics, LinearCharge) and dynamics.by_parameter is None
        return tuple(
            value.detach() if isinstance(value, Tensor) else value if numbers_serve else torch.full_like(like, value)
            for value in values
        )

    def _remember(self, memory: tuple[Any, ...]) -> None:
        for name, value in zip(memory_names(self.module), memory, strict=True):
            setattr(self.module, name, value)


class LinearMapRule(Rule):
    """Convolutions and linear layers: the record is the sum over time of the outputs, in the rate pass their value.

    Being linear, the layer's output for the mean input is the mean of its outputs: no forward is computed twice.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        if len(args) + len(kwargs) > 1:  # a transposed convolution's output_size: run as any differentiable layer
            return self.original_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def spike(self, x: Tensor, record: Tensor | None) -> tuple[Tensor, Tensor | None]:
        (y,) = self.once(x, lambda x: (self.original_forward(x),))
        if y.shape[0] % self.owner.steps_per_call:
            return y, None  # no time steps: the layer stands behind the network's own time average
        steps = y.unflatten(0, (self.owner.steps_per_call, -1))  # [T or 1, 1 or B, ...]
        return y, steps.sum(0) if record is None else record.add_(steps[0])

    def rate(self, x: Tensor, record: Tensor | None, one_step: bool) -> Tensor:
        if not one_step:
            return self.original_forward(x)
        value = record.div_(self.owner.time_step)
        module = self.module
        weight, bias = module.weight.to(value.dtype), None if module.bias is None else module.bias.to(value.dtype)
        counts, version = getattr(x, "counts", (None, None))  # where x comes straight from neurons
        if version != x._version:  # changed in place since
            counts = None
        x = x.to(value.dtype)  # which under autocast is not the parameters'
        if isinstance(module, nn.Linear):
            return LinearRate.apply(x, weight, bias, (value,), counts)
        args = ConvolutionArgs(
            module.stride,
            explicit_padding(module),
            module.dilation,
            module.transposed,
            module.output_padding,
            module.groups,
        )
        return ConvolutionRate.apply(x, weight, bias, (value,), counts, args)


def explicit_padding(module: nn.Module) -> tuple[int, ...] | None:
    """A convolution's zeros on each side of each dimension; None where it pads otherwise, or one side more."""
    if module.padding_mode != "zeros":
        return None
    if module.padding == "same":
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(p % 2 for p in both) else tuple(p // 2 for p in both)
    return (0,) * len(module.kernel_size) if module.padding == "valid" else module.padding


class DropoutRule(Rule):
    """Dropout with a mask of its own at every step: the record is the random state before each draw, and its layout.

    The rate pass multiplies by the mean over time of the very masks of the spike pass.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        return (super().forward if self.module.training else self.original_forward)(*args, **kwargs)

    def spike(self, x: Tensor, record: list | None) -> tuple[Tensor, list]:
        draw = (random_state(x.device), torch.empty_like(x, device="meta"))
        return self.original_forward(x), [*(record or []), draw]

    def rate(self, x: Tensor, record: list, one_step: bool) -> Tensor:
        if one_step:
            masks = [self._mask(x.device, *draw).unflatten(0, (self.owner.steps_per_call, -1)) for draw in record]
            mask = sum(mask.mean(0) for mask in masks) / len(record)
        else:
            mask = self._mask(x.device, *record[0])
        return x.mul_(mask) if self.module.inplace else x * mask

    def probe(self, x: Tensor) -> Tensor:
        return x

    def _mask(self, device: torch.device, state: Tensor, layout: Tensor) -> Tensor:
        """0 or 1 / (1 - p), as drawn in the spike pass; the order of the draws follows the layout in memory."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
            return self.original_forward(torch.ones_like(layout, device=device))


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that layers on ``device`` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
