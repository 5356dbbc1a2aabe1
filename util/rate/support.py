"""Which modules are refused, and why; and all that keeps a network from being served, at once."""

from spikingjelly.activation_based import base, encoding, layer, neuron, rnn, surrogate
from torch import nn

from . import dropout_rule, linear_rule, neuron_rule, norm_rule  # noqa: F401  fill the table of what is served
from .problem import Problem
from .registry import find_problem, found, refuse

refuse(
    nn.RNNBase,
    nn.RNNCellBase,
    *found(rnn, "SpikingRNNBase", "SpikingRNNCellBase"),
    reason="a recurrent layer mixes time steps",
    remedy="use a neuron layer with its own memory in its place, or train with BPTT",
    verdict="method",
)
refuse(
    *found(layer, "GradwithTrace", "OTTTSequential", "TemporalWiseAttention", "MultiDimensionalAttention"),
    *found(layer, "SpikeCountToBinary", "TemporalBinSum"),
    reason="it mixes time steps",
    remedy="leave it out, or train with BPTT",
    verdict="method",
)
refuse(
    *found(layer, "MultiStepContainer", "StepModeContainer", "TLastMultiStepContainer", "TLastSeqToANNContainer"),
    reason="its inner layers run in a step mode of their own",
    remedy="use SpikingJelly's multi-step layers instead",
    verdict="setting",
)
refuse(
    *found(neuron, "PSN", "MaskedPSN", "SlidingPSN"),
    reason="a parallel spiking neuron mixes time steps without a state to follow",
    remedy="use another neuron, or train with BPTT",
    verdict="method",
)
refuse(
    *found(neuron, "NoisyBaseNode", "ILCBaseNode", "NonSpikingBaseNode", "OTTTLIFNode", "SLTTLIFNode"),
    *found(neuron, "MPBNBaseNode", "FewSpikeNode", "NoisyNonSpikingBaseNode", "DSRIFNode", "DSRLIFNode"),
    *found(neuron, "GatedLIFNode"),
    reason="this neuron's step does not act on each element alone, is random, or has a training rule of its own",
    remedy="use a neuron such as LIFNode or ParametricLIFNode",
    verdict="method",
)
refuse(
    nn.modules.batchnorm._BatchNorm,
    reason="of the batch normalisations only BatchNorm1d/2d/3d have a rate pass",
    remedy="use one of them",
    verdict="project",
)
refuse(
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    *found(encoding, "StatelessEncoder"),
    reason="it draws random numbers that the rate pass cannot repeat",
    remedy="use nn.Dropout or layer.Dropout; encode before the network",
    verdict="project",
)
refuse(
    base.MemoryModule,
    reason="it keeps a state from one time step to the next for which there is no rule",
    remedy="give it one with rule_for, or take it out of the network",
    verdict="project",
)


def problems(net: nn.Module) -> list[Problem]:
    """Every module of ``net`` that keeps it from being served, in the network's order; ``net`` is not touched.

    What only running the network can tell (a forward that mixes time steps) is found by `check.check_network`.
    """
    named = [(name or type(net).__name__, module) for name, module in net.named_modules()]
    return [problem for name, module in named if (problem := find_problem(module, name))]


# Classes, not those derived from them, whose forward runs each time step by itself.
_APART = (
    *(nn.Sequential, nn.ModuleList, nn.Identity, nn.Linear),
    *(getattr(layer, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose", "BatchNorm") for n in (1, 2, 3)),
    *(getattr(layer, f"{kind}Pool{n}d") for kind in ("Avg", "Max", "AdaptiveAvg") for n in (1, 2, 3)),
    *found(layer, "Linear", "GroupNorm", "Dropout", "Dropout2d", "Flatten", "Upsample", "VotingLayer"),
    *found(layer, "SeqToANNContainer"),
)


def keeps_steps_apart(module: nn.Module) -> bool:
    """Whether the module's own forward is known to run each time step by itself, so that nobody needs to try it out.

    A class says so with an attribute ``keeps_steps_apart = True``, of itself and not of its subclasses.
    """
    kind = type(module)
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    own = any(vars(place).get(kind.__name__) is kind for place in (neuron, surrogate))  # run by the neurons' rule
    return own or kind in _APART or vars(kind).get("keeps_steps_apart", False)
