"""The step rule of each neuron: a closed form for IF and LIF neurons, autograd a step at a time for others."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from spikingjelly.activation_based import base, neuron, surrogate
from torch import Tensor, nn

from .eligibility import Dynamics, Leak, LinearCharge, NeuronState, Slope


class NotElementwiseError(ValueError):
    """A neuron's step does not act on each element alone, so its derivatives have no elementwise form."""


@dataclass(frozen=True)
class Differentiated:
    """Any neuron whose step acts on each element alone: autograd gives the derivatives of one step at a time.

    For such a neuron the gradient of the sum of an output is its elementwise derivative, so one step's graph of one
    layer is all that ever exists. Learnable parameters are expanded to one copy an element, for the same reason; they
    must broadcast to the shape of one step's input.
    """

    module: base.MemoryModule
    forward: Callable[[Tensor], Tensor] | None = None  # its own step, where another stands in for it
    check: bool = False  # whether to make sure that the neuron is such a one

    def __post_init__(self) -> None:
        if self.check:
            _check_submodules(self.module)

    def step(self, state: NeuronState, x: Tensor) -> tuple[NeuronState, Tensor, tuple[Slope, ...]]:
        """As `LinearCharge.step`; leaves the module's own state variables as the step made them.

        Raises:
            NotElementwiseError: with ``check``, where an output depends on another element's input or state, or the
                step keeps a state that SpikingJelly does not know of.
        """
        names = memory_names(self.module)
        parameters = learnable_parameters(self.module)
        before = dict(vars(self.module))
        with torch.enable_grad(), _replaced(parameters, x) as copies:
            sources = [t.detach().requires_grad_() for t in (x, *state.memory)]
            for name, value in zip(names, sources[1:], strict=True):
                setattr(self.module, name, value)
            s = (self.forward or self.module.single_step_forward)(sources[0])
            if not isinstance(s, Tensor):
                raise NotElementwiseError(f"its step returns a {type(s).__name__}, not its spikes alone")
            results = [s, *(getattr(self.module, name) for name in names)]
            partials = [self._partials(result, [*sources, *copies]) for result in results]
            if self.check and _leaves_of(results) - set(map(id, (*sources, *copies))):
                raise NotElementwiseError("its step depends on parameters that are none of its own")
        changed = [name for name, value in vars(self.module).items() if before.get(name, before) is not value]
        if self.check and changed:
            raise NotElementwiseError(f"its step changes {changed[0]!r}, which is no memory (see register_memory)")
        # Of the input and the parameters with respect to each source; the last sources are the memory at the beginning.
        units = torch.eye(len(state.memory_slopes), 1 + len(copies)).tolist()
        slopes = [
            [self._slope(s, partial, (unit[0], *memory_slopes, *unit[1:])) for partial in partials]
            for unit, memory_slopes in zip(units, state.memory_slopes, strict=True)
        ]  # [source][result]
        after = NeuronState(tuple(r.detach() for r in results[1:]), tuple(tuple(slope[1:]) for slope in slopes))
        return after, s.detach(), tuple((slope[0], 1.0) for slope in slopes)

    def _partials(self, result: Tensor, sources: list[Tensor]) -> list[Tensor | None]:
        """The elementwise partial derivatives of one output of the step."""
        if not result.requires_grad:
            return [None] * len(sources)
        partials = torch.autograd.grad(result.sum(), sources, retain_graph=True, allow_unused=True)
        if self.check:  # for an elementwise step, weighting the outputs weights their derivatives alike
            eps = max(torch.finfo(x.dtype).eps for x in (result, *sources))
            weights = torch.linspace(1, 2, result.numel(), dtype=result.dtype, device=result.device).view_as(result)
            weighted = torch.autograd.grad((result * weights).sum(), sources, retain_graph=True, allow_unused=True)
            for partial, other in zip(partials, weighted, strict=True):
                if partial is not None and not _close(partial * weights, other, eps):
                    raise NotElementwiseError("its step does not act on each element alone")
        return list(partials)

    @staticmethod
    def _slope(like: Tensor, partials: list[Tensor | None], slopes: tuple[Tensor | float, ...]) -> Tensor:
        """d output / d source by the chain rule over the step's input, state variables and parameters."""
        total = torch.zeros_like(like)
        for partial, slope in zip(partials, slopes, strict=True):
            if partial is not None:
                total = total + partial * slope
        return total


def _check_submodules(module: nn.Module) -> None:
    """Raises NotElementwiseError where a neuron holds layers: they mix elements, or keep what a trial would change."""
    for name, child in module.named_children():
        own = (
            [*child.parameters(), *child.buffers()] if child is not getattr(module, "surrogate_function", None) else []
        )
        if own or isinstance(child, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            raise NotElementwiseError(f"it holds a layer, {name!r} ({type(child).__name__})")


def _leaves_of(results: list[Any]) -> set[int]:
    """The identities of the leaves that need a gradient of which these are made."""
    nodes = [x.grad_fn for x in results if isinstance(x, Tensor) and x.grad_fn is not None]
    seen, leaves = set(), set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves


def _close(a: Tensor, b: Tensor, eps: float) -> bool:
    """Equal but for rounding, of which a single one is ``eps``."""
    return torch.allclose(a.double(), b.double(), rtol=max(1e-3, 8 * eps), atol=max(1e-6, eps))


@contextmanager
def _replaced(parameters: list[tuple[nn.Module, str]], like: Tensor) -> Iterator[list[Tensor]]:
    """The parameters replaced, for a while, by copies of ``like``'s shape, each of which has a gradient of its own."""
    originals = [owner._parameters[name] for owner, name in parameters]
    try:
        copies = []
        for (owner, name), original in zip(parameters, originals, strict=True):
            try:
                copies.append(original.detach().expand_as(like).clone().requires_grad_())
            except RuntimeError as error:
                shapes = f"{list(original.shape)} does not broadcast to one step's {list(like.shape)}"
                raise NotElementwiseError(f"its parameter {name!r} of shape {shapes}") from error
            owner._parameters[name] = copies[-1]
        yield copies
    finally:
        for (owner, name), original in zip(parameters, originals, strict=True):
            owner._parameters[name] = original


def learnable_parameters(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, name) of each parameter of a neuron and its submodules that is being trained."""
    owned = [(owner, name) for owner in module.modules() for name, p in owner._parameters.items() if p is not None]
    return [(owner, name) for owner, name in owned if owner._parameters[name].requires_grad]


def memory_names(module: base.MemoryModule) -> list[str]:
    """The names of a neuron's state variables, the membrane potential v first."""
    return sorted((name for name, _ in module.named_memories()), key=lambda name: name != "v")


# Those whose value is 1 where h >= v_threshold and 0 elsewhere, whatever their derivative.
_STEP_SURROGATES = {
    getattr(surrogate, name)
    for name in (
        "ATan", "Erf", "FakeNumericalGradient", "LeakyKReLU", "LogTailedReLU", "NonzeroSignLogAbs", "PiecewiseExp",
        "PiecewiseLeakyReLU", "PiecewiseQuadratic", "QPseudoSpike", "Rect", "S2NN", "Sigmoid", "SoftSign",
        "SquarewaveFourierSeries", "SuperSpike",
    )
    if hasattr(surrogate, name)
}  # fmt: skip

_FACTOR = "neuronal_charge_no_decay_input_reset0"  # SpikingJelly 0.0.0.0.14 has it, and another expression there

# By (decay_input, v_reset == 0). To the bit SpikingJelly's own expressions: a current that meets the threshold exactly
# must fire in training where it fires in evaluation.
_LIF_CHARGES = {
    (True, True): lambda v, x, tau, v_reset: v + (x - v) / tau,
    (True, False): lambda v, x, tau, v_reset: v + (x - (v - v_reset)) / tau,
    (False, True): (lambda v, x, tau, v_reset: v * (1 - 1 / tau) + x)
    if hasattr(neuron.LIFNode, _FACTOR)
    else (lambda v, x, tau, v_reset: v - v / tau + x),
    (False, False): lambda v, x, tau, v_reset: v - (v - v_reset) / tau + x,
}
_PARAMETRIC_LIF_CHARGES = {
    (True, True): lambda v, x, q, v_reset: v + (x - v) * q,
    (True, False): lambda v, x, q, v_reset: v + (x - (v - v_reset)) * q,
    (False, True): (lambda v, x, q, v_reset: v * (1 - q) + x)
    if hasattr(neuron.LIFNode, _FACTOR)
    else (lambda v, x, q, v_reset: v - v * q + x),
    (False, False): lambda v, x, q, v_reset: v - (v - v_reset) * q + x,
}


_DYNAMICS = ("single_step_forward", "multi_step_forward", "single_step_functional_forward",
             "multi_step_functional_forward", "materialize_states",
             "neuronal_charge", "neuronal_fire", "neuronal_reset")  # fmt: skip


def _has_dynamics_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the neuron is of the ``kind``, or of a class derived from it that leaves its steps alone."""
    steps = ("single_step_forward", "multi_step_forward")  # on the very module these are the hooks' own, perhaps
    return isinstance(module, kind) and all(
        getattr(type(module), name, None) is getattr(kind, name, None) and (name in steps or name not in vars(module))
        for name in _DYNAMICS
    )


def dynamics_of(
    module: base.MemoryModule, forward: Callable[[Tensor], Tensor] | None = None, check: bool = False
) -> Dynamics:
    """The step rule of a neuron. ``forward`` and ``check`` as in `Differentiated`."""
    rule = (module.v_threshold, module.v_reset, module.detach_reset, module.surrogate_function)
    spiking = getattr(module.surrogate_function, "spiking", True)  # else it puts out the surrogate itself, not spikes
    parametric = _has_dynamics_of(module, neuron.ParametricLIFNode)
    own = [(module, "w")] if parametric else []  # what the closed form has a derivative for
    learns = any(parameter not in own for parameter in learnable_parameters(module))
    differs = isinstance(module.v_reset, Tensor)  # from neuron to neuron
    if not spiking or learns or differs or type(module.surrogate_function) not in _STEP_SURROGATES:
        return Differentiated(module, forward, check)
    if _has_dynamics_of(module, neuron.IFNode):
        return LinearCharge(1.0, 1.0, lambda v, x: v + x, *rule, leak=Leak("none"))
    if _has_dynamics_of(module, neuron.LIFNode):
        tau, v_reset = module.tau, module.v_reset or 0.0
        charge = _LIF_CHARGES[module.decay_input, v_reset == 0]
        by_factor = v_reset == 0 and hasattr(neuron.LIFNode, _FACTOR)
        kind = "input too" if module.decay_input else "factor" if by_factor else "potential"
        gain = 1 / tau if module.decay_input else 1.0
        return LinearCharge(1 - 1 / tau, gain, lambda v, x: charge(v, x, tau, v_reset), *rule, leak=Leak(kind, tau))
    return _parametric_lif(module, rule) if parametric else Differentiated(module, forward, check)


def _parametric_lif(module: neuron.ParametricLIFNode, rule: tuple) -> LinearCharge:
    q, v_reset = module.w.detach().sigmoid(), module.v_reset or 0.0
    if module.decay_input:
        gain, slope = q, lambda v, x: x - (v - v_reset)
    else:
        gain, slope = 1.0, lambda v, x: v_reset - v
    charge = _PARAMETRIC_LIF_CHARGES[module.decay_input, v_reset == 0]
    by_w = (lambda v, x: q * (1 - q) * slope(v, x)) if module.w.requires_grad else None
    return LinearCharge(1 - q, gain, lambda v, x: charge(v, x, q, v_reset), *rule, by_w)
