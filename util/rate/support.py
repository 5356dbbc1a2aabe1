"""Which modules are refused, and which run as with BPTT, keeping T steps: all of them, at once."""

from spikingjelly.activation_based import base, layer, neuron
from torch import nn

from .neurons import STORE_V_SEQ
from .problem import Problem


def found(place, *names: str) -> tuple[type, ...]:
    """Those of the classes that the installed SpikingJelly has."""
    return tuple(getattr(place, name) for name in names if hasattr(place, name))


_NEURONS = found(neuron, "BaseNode", "SimpleBaseNode")
# Neurons whose step does not act on each element alone, is random, or has a training rule of its own.
_WITHOUT_A_RULE = found(
    neuron, "NoisyBaseNode", "ILCBaseNode", "OTTTLIFNode", "SLTTLIFNode", "MPBNBaseNode", "FewSpikeNode", "DSRIFNode",
    "DSRLIFNode", "GatedLIFNode", "PSN", "MaskedPSN", "SlidingPSN", "NonSpikingBaseNode", "NoisyNonSpikingBaseNode",
)  # fmt: skip
_SHARED_MASKS = found(layer, "Dropout", "Dropout2d")  # one for all steps


def served_neuron(module: nn.Module) -> bool:
    """Whether the module is a neuron that the method has a rule for."""
    return isinstance(module, _NEURONS) and not isinstance(module, _WITHOUT_A_RULE)


def problems(net: nn.Module, step_mode: str = "m") -> list[Problem]:
    """The modules of ``net`` that are refused, or that run as with BPTT, in the network's order; it is not touched.

    An empty list is no promise: what only running the network can tell is found by `check.check_network`.
    """
    named = [(name or type(net).__name__, module) for name, module in net.named_modules()]
    return [problem for name, module in named if (problem := _problem(name, module, step_mode))]


def _problem(name: str, module: nn.Module, step_mode: str) -> Problem | None:
    kind, is_neuron = type(module).__name__, isinstance(module, (*_NEURONS, *_WITHOUT_A_RULE))
    if getattr(module, "store_v_seq", False):
        return Problem(name, kind, *STORE_V_SEQ, refused=True, is_neuron=is_neuron)
    if isinstance(module, nn.SyncBatchNorm) and step_mode == "s":
        reason = "its statistics are of all processes in a way that no rate tells"
        return Problem(name, kind, reason, "use BatchNorm2d and sync_batch_norm(net)")
    memory = isinstance(module, base.MemoryModule) and not isinstance(module, _SHARED_MASKS)
    if served_neuron(module) or not (memory or is_neuron):
        return None
    reason = "it keeps a state from one time step to the next for which there is no rule"
    if step_mode == "m":
        return Problem(name, kind, reason, "it runs as with BPTT and keeps its T steps", False, is_neuron)
    return Problem(name, kind, reason, "use step mode 'm', where it runs as with BPTT", True, is_neuron)
