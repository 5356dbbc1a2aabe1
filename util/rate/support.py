"""Which modules rate-based backpropagation serves, by which rule, and which it refuses and why."""

from typing import TYPE_CHECKING, Any

from spikingjelly.activation_based import base, encoding, layer, neuron, rnn, surrogate
from torch import nn

from .norm_rule import BatchNormRule, SampleNormRule
from .rule import (
    DropoutRule,
    LinearMapRule,
    NeuronRule,
    Rule,
    SharedDropoutRule,
    UnsupportedModuleError,
    explicit_padding,
)

if TYPE_CHECKING:
    from .attach import RateBackpropagation

# Exact classes: a subclass may compute something else, and is then run as any differentiable module, or refused.
_CONVOLUTIONS = {
    getattr(place, f"Conv{kind}{n}d") for place in (nn, layer) for kind in ("", "Transpose") for n in (1, 2, 3)
}
_LINEARS = {nn.Linear, layer.Linear}
_DROPOUTS = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}
_SAMPLE_NORMS = {nn.GroupNorm, layer.GroupNorm, nn.LayerNorm}
_BATCH_NORMS = {getattr(place, f"BatchNorm{n}d") for place in (nn, layer) for n in (1, 2, 3)}


def _classes(place: Any, *names: str) -> tuple[type, ...]:
    """Those of the classes that the installed SpikingJelly has."""
    return tuple(getattr(place, name) for name in names if hasattr(place, name))


# What mixes time steps, carries state or draws noise in a way the rate pass cannot repeat, and why.
_REFUSED: list[tuple[tuple[type, ...], str]] = [
    (
        (nn.RNNBase, nn.RNNCellBase, *_classes(rnn, "SpikingRNNBase", "SpikingRNNCellBase")),
        "a recurrent layer mixes time steps",
    ),
    ((nn.MultiheadAttention, nn.Transformer), "attention may mix time steps"),
    (
        _classes(
            layer,
            "GradwithTrace",
            "OTTTSequential",
            "TemporalWiseAttention",
            "MultiDimensionalAttention",
            "SpikeCountToBinary",
            "TemporalBinSum",
        ),
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
        _classes(
            neuron,
            "NoisyBaseNode",
            "ILCBaseNode",
            "NonSpikingBaseNode",
            "OTTTLIFNode",
            "SLTTLIFNode",
            "MPBNBaseNode",
            "FewSpikeNode",
            "NoisyNonSpikingBaseNode",
            "DSRIFNode",
            "DSRLIFNode",
            "GatedLIFNode",
        ),
        "this neuron's step does not act on each element alone, is random, or has a training rule of its own",
    ),
    ((nn.modules.batchnorm._BatchNorm,), "of the batch normalisations only BatchNorm1d/2d/3d have a rate pass"),
    (
        (nn.modules.dropout._DropoutNd, nn.RReLU, *_classes(encoding, "StatelessEncoder")),
        "it draws random numbers that the rate pass cannot repeat",
    ),
]
_NEURONS = _classes(neuron, "BaseNode", "SimpleBaseNode")
_TIMELESS_MEMORY = (layer.Dropout,)  # Dropout's memory is one mask for all steps of a window; Dropout2d derives from it


def rule_for(module: nn.Module, name: str, owner: "RateBackpropagation") -> Rule | None:
    """Attaches the rule for a module that is served; None where the module runs in both passes as it is."""
    if type(module) in _BATCH_NORMS:
        return BatchNormRule(module, name, owner)
    if type(module) in _SAMPLE_NORMS:
        return SampleNormRule(module, name, owner)
    if type(module) in _LINEARS:
        return LinearMapRule(module, name, owner)
    if type(module) in _CONVOLUTIONS:
        return None if explicit_padding(module) is None else LinearMapRule(module, name, owner)
    if type(module) in _DROPOUTS:
        return DropoutRule(module, name, owner)
    if isinstance(module, _TIMELESS_MEMORY):
        return SharedDropoutRule(module, name, owner)
    return NeuronRule(module, name, owner) if isinstance(module, _NEURONS) else None


def keeps_steps_apart(module: nn.Module) -> bool:
    """Whether the module's own forward is known to run each time step by itself, so that nobody needs to try it out.

    A class says so with an attribute ``keeps_steps_apart = True``, of itself and not of its subclasses.
    """
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return (
        vars(type(module)).get("keeps_steps_apart", False)
        or type(module) in (nn.Sequential, nn.ModuleList, nn.Identity, nn.Linear)
        or type(module).__module__.startswith(tuple(place.__name__ for place in (layer, neuron, surrogate)))
    )


def refuse_unless_served(module: nn.Module, name: str) -> None:
    """Raises UnsupportedModuleError, naming module and reason, where a module keeps the method from being right."""

    def refuse(reason: str) -> None:
        raise UnsupportedModuleError(name, module, reason)

    for classes, reason in _REFUSED:
        if isinstance(module, classes) and type(module) not in _BATCH_NORMS | _DROPOUTS:
            refuse(reason)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
        refuse("its running statistics would be updated in both passes; use track_running_stats=False")
    if isinstance(module, _NEURONS):
        if getattr(module, "store_v_seq", False):
            refuse("store_v_seq keeps the potentials of all steps, which the spike pass does not")
    elif isinstance(module, base.MemoryModule) and not isinstance(module, _TIMELESS_MEMORY):
        refuse("it keeps a state from one time step to the next for which there is no rule")
