"""How each kind of layer behaves in the two passes of rate-based backpropagation: one rule a kind.

A rule stands in for its module's ``forward``. What a call of the module leaves behind in the spike pass is a record;
the same call in the rate pass, found by its place in the order of calls, uses it up.
"""

from typing import TYPE_CHECKING, Any

import torch
from spikingjelly.activation_based import base, layer, neuron
from torch import Tensor, nn

from util.eligibility import NeuronState, dynamics_of, memory_names
from util.rate_function import BatchNormRate, ConvolutionArgs, ConvolutionRate, LinearRate, NeuronRate

if TYPE_CHECKING:
    from util.util import RateBackpropagation


class UnsupportedModuleError(TypeError):
    """Rate-based backpropagation cannot serve a module; the message names it and says why."""


class Rule:
    """What the kinds share: standing in for ``module.forward``, and the records of the current window of T steps."""

    def __init__(self, module: nn.Module, name: str, owner: "RateBackpropagation"):
        self.module, self.name, self.owner = module, name, owner
        self.original_forward = module.forward
        self.records: list[Any] = []
        self.calls = 0  # of this module in the current pass
        module.forward = self.forward

    def remove(self) -> None:
        del self.module.forward

    def start_window(self) -> None:
        self.records.clear()

    def start_pass(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.owner.phase is None:
            return self.original_forward(x, *args, **kwargs)
        call, self.calls = self.calls, self.calls + 1
        if self.owner.phase == "spike":
            first_step = call == len(self.records)
            y, record = self.spike(x, None if first_step else self.records[call], *args, **kwargs)
            self.records[call:] = [record, *self.records[call + 1 :]]
            return y
        if call >= len(self.records):
            raise RuntimeError(f"{self.name!r} is called more often in the rate pass than in the spike pass")
        record, self.records[call] = self.records[call], None
        return self.rate(x, record)

    def spike(self, x: Tensor, record: Any, *args, **kwargs) -> tuple[Tensor, Any]:
        """The module's true output, and the record of this call, made or brought up to date. Runs without a graph.

        ``x`` is [T, B, ...] (or [T * B, ...]) in step mode 'm' and [B, ...] in step mode 's'.
        """
        raise NotImplementedError

    def rate(self, x: Tensor, record: Any) -> Tensor:
        """The output for the mean input ``x``, [1, B, ...] (or [B, ...]), with a graph."""
        raise NotImplementedError

    def expect_shape(self, x: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(x.shape) != expected:
            raise RuntimeError(
                f"{self.name!r} gets {list(x.shape)} in the rate pass, but one step in the spike pass had "
                f"{list(expected)}: the network does not treat its leading dimension as time"
            )


class NeuronRule(Rule):
    """Spiking neurons: the record is a `NeuronState`, in the rate pass r and e."""

    def __init__(self, module: base.MemoryModule, name: str, owner: "RateBackpropagation"):
        super().__init__(module, name, owner)
        self.dynamics = dynamics_of(module)
        module.reset = self.reset

    def remove(self) -> None:
        super().remove()
        del self.module.reset

    def reset(self) -> None:
        """SpikingJelly's reset of the module, which also ends the window."""
        type(self.module).reset(self.module)
        self.owner.restart()

    def spike(self, x: Tensor, record: NeuronState | None) -> tuple[Tensor, NeuronState]:
        steps = x if self.owner.step_mode == "m" else x.unsqueeze(0)  # [T or 1, B, ...]
        if len(steps) != self.owner.steps_per_call:
            raise ValueError(f"{self.name!r} gets {len(steps)} time steps where time_step = {self.owner.time_step}")
        state = record or NeuronState.start(self._memory(steps[0]))
        spikes = torch.empty_like(steps)
        for t, current in enumerate(steps):
            state, spikes[t] = self.dynamics.step(state, current)
        for memory_name, value in zip(memory_names(self.module), state.memory, strict=True):
            setattr(self.module, memory_name, value)
        return (spikes if self.owner.step_mode == "m" else spikes[0]), state

    def rate(self, x: Tensor, record: NeuronState) -> Tensor:
        r, e = record.spike_sum / self.owner.time_step, record.slope_sum / self.owner.time_step
        if self.owner.step_mode == "m":
            r, e = r.unsqueeze(0), e.unsqueeze(0)
        self.expect_shape(x, tuple(r.shape))
        return NeuronRate.apply(x, (r,), e)

    def _memory(self, like: Tensor) -> tuple[Tensor, ...]:
        """The module's state variables as tensors of one step's shape."""
        memory = []
        for memory_name in memory_names(self.module):
            value = getattr(self.module, memory_name)
            if not isinstance(value, Tensor):
                value = torch.full_like(like, value)
            if value.shape != like.shape:
                raise RuntimeError(
                    f"{self.name!r} holds {memory_name} of shape {list(value.shape)} but gets {list(like.shape)}: "
                    "call functional.reset_net(net) between batches"
                )
            memory.append(value.detach())
        return tuple(memory)


class LinearMapRule(Rule):
    """Convolutions and linear layers: the record is the sum over time of the outputs, in the rate pass their value.

    Being linear, the layer's output for the mean input is the mean of its outputs: no forward is computed twice.
    """

    def spike(self, x: Tensor, record: Tensor | None) -> tuple[Tensor, Tensor]:
        y = self.original_forward(x)
        steps = self.owner.split_time(y, self.name)  # [T or 1, ...]
        return y, steps.sum(0) if record is None else record.add_(steps[0])

    def rate(self, x: Tensor, record: Tensor) -> Tensor:
        value = (record.div_(self.owner.time_step),)
        module = self.module
        if isinstance(module, nn.Linear):
            self.expect_shape(x, (*value[0].shape[:-1], module.in_features))
            return LinearRate.apply(x, module.weight, module.bias, value)
        args = ConvolutionArgs(
            module.stride, module.padding, module.dilation, module.transposed, module.output_padding, module.groups
        )
        spatial = 1 + len(module.kernel_size)  # channels and the dimensions of the kernel
        rate = x.flatten(0, -spatial - 1)  # [B, C, ...]
        out = ConvolutionRate.apply(rate, module.weight, module.bias, (value[0].flatten(0, -spatial - 1),), args)
        return out.view(value[0].shape)


class BatchNormRule(Rule):
    """BatchNorm in training: the record holds the sums over steps of mu_t and of 1 / (var_t + eps), and their number.

    Running statistics are updated here alone, as PyTorch's own forward updates them.
    """

    def forward(self, x: Tensor) -> Tensor:
        uses_batch_statistics = self.module.training or self.module.running_mean is None
        return super().forward(x) if uses_batch_statistics else self.original_forward(x)

    def spike(self, x: Tensor, record: tuple | None) -> tuple[Tensor, tuple]:
        module = self.module
        flat = self._flat(x)
        if flat.numel() == flat.shape[1]:
            raise ValueError(
                f"{self.name!r}: BatchNorm needs more than 1 value per channel to train, got {list(x.shape)}"
            )
        momentum = 0.0
        if module.training and module.track_running_stats:
            module.num_batches_tracked.add_(1)
            momentum = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
        running = (module.running_mean, module.running_var) if module.training else (None, None)
        y, mean, invstd = torch.native_batch_norm(
            flat, module.weight, module.bias, *running, True, momentum, module.eps
        )
        mean_sum, precision_sum, count = record or (0.0, 0.0, 0)
        return y.view(x.shape), (mean_sum + mean, precision_sum + invstd.square(), count + 1)

    def rate(self, x: Tensor, record: tuple) -> Tensor:
        mean_sum, precision_sum, count = record
        mean, invstd = mean_sum / count, (precision_sum / count).sqrt()
        return BatchNormRate.apply(self._flat(x), self.module.weight, self.module.bias, mean, invstd).view(x.shape)

    def _flat(self, x: Tensor) -> Tensor:
        """[T, B, C, ...] -> [T * B, C, ...] where the module is one of SpikingJelly's in multi-step mode."""
        return x.flatten(0, 1) if getattr(self.module, "step_mode", "s") == "m" else x


# Exact classes: a subclass may compute something else, and is then run as any differentiable module, or refused.
_CONVOLUTIONS = {
    getattr(place, f"Conv{kind}{n}d") for place in (nn, layer) for kind in ("", "Transpose") for n in (1, 2, 3)
}
_LINEARS = {nn.Linear, layer.Linear}
_BATCH_NORMS = {getattr(place, f"BatchNorm{n}d") for place in (nn, layer) for n in (1, 2, 3)}


def _classes(place: Any, *names: str) -> tuple[type, ...]:
    """Those of the classes that the installed SpikingJelly has."""
    return tuple(getattr(place, name) for name in names if hasattr(place, name))


# What mixes time steps, carries state or draws noise in a way the rate pass cannot repeat, and why.
_REFUSED: list[tuple[tuple[type, ...], str]] = [
    ((nn.RNNBase, nn.RNNCellBase), "a recurrent layer mixes time steps"),
    ((nn.MultiheadAttention, nn.Transformer), "attention may mix time steps"),
    (
        _classes(layer, "TemporalWiseAttention", "MultiDimensionalAttention", "SpikeCountToBinary", "TemporalBinSum"),
        "it mixes time steps",
    ),
    (
        _classes(layer, "MultiStepContainer", "StepModeContainer", "TLastMultiStepContainer", "TLastSeqToANNContainer"),
        "its inner layers run in a step mode of their own; use SpikingJelly's multi-step layers instead",
    ),
    (
        _classes(neuron, "PSN", "MaskedPSN", "SlidingPSN"),
        "a parallel spiking neuron mixes time steps without a state to follow",
    ),
    (
        _classes(neuron, "NoisyBaseNode", "ILCBaseNode", "NonSpikingBaseNode", "OTTTLIFNode", "SLTTLIFNode"),
        "this neuron's step does not act on each element alone, is random, or has a training rule of its own",
    ),
    ((nn.modules.batchnorm._NormBase,), "only BatchNorm1d/2d/3d have a rate pass"),
]
_NEURONS = _classes(neuron, "BaseNode", "SimpleBaseNode")
_TIMELESS_MEMORY = (layer.Dropout,)  # Dropout's memory is one mask for all steps of a window; Dropout2d derives from it


def rule_for(module: nn.Module, name: str, owner: "RateBackpropagation") -> Rule | None:
    """Attaches the rule for a module; None where the module runs in both passes as it is.

    Raises:
        UnsupportedModuleError: the method cannot serve the module.
    """
    if type(module) in _BATCH_NORMS:
        return BatchNormRule(module, name, owner)
    if type(module) in _LINEARS:
        return LinearMapRule(module, name, owner)
    if type(module) in _CONVOLUTIONS:
        plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return LinearMapRule(module, name, owner) if plain else None
    refuse_unless_served(module, name)
    return NeuronRule(module, name, owner) if isinstance(module, _NEURONS) else None


def refuse_unless_served(module: nn.Module, name: str) -> None:
    """Raises UnsupportedModuleError, naming module and reason, where a module keeps the method from being right."""

    def refuse(reason: str) -> None:
        raise UnsupportedModuleError(
            f"rate-based backpropagation cannot serve {name!r} ({type(module).__name__}): {reason}"
        )

    for classes, reason in _REFUSED:
        if isinstance(module, classes):
            refuse(reason)
    if isinstance(module, _NEURONS):
        if next(module.parameters(recurse=False), None) is not None:
            refuse("it has learnable parameters of its own, whose gradient has no rule yet")
    elif isinstance(module, base.MemoryModule) and not isinstance(module, _TIMELESS_MEMORY):
        refuse("it keeps a state from one time step to the next and is no neuron")
