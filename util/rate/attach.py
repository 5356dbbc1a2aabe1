"""Rate-based backpropagation for a SpikingJelly network: attach the hooks, run the two passes, take the hooks off.

    rate_model_setting(net, time_step=4, step_mode="m")     # your training loop stays as it is
    ...
    bptt_model_setting(net, time_step=4, step_mode="m")     # back to backpropagation through time

Method: Yu et al., "Advancing Training Efficiency of Deep Spiking Neural Networks through Rate-based Backpropagation",
NeurIPS 2024.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .function import SpikeValue
from .probe import find_mixing, open_gates
from .rule import NeuronRule, Rule, StandIn, UnsupportedModuleError, random_state
from .static import StaticTensors
from .support import keeps_steps_apart, refuse_unless_served, rule_for
from .window import Window, as_float, is_float

__all__ = ["UnsupportedModuleError", "bptt_model_setting", "detach", "rate_model_setting"]


def rate_model_setting(
    net: nn.Module,
    time_step: int,
    step_mode: str = "m",
    *,
    time_dim: int = 0,
    compiled: bool = False,
    static_input: bool = False,
) -> nn.Module:
    """Makes ``net`` train with rate-based backpropagation, in place; parameters and state_dict stay what they are.

    With gradients enabled a forward runs the T steps without a graph and records one backward pass through
    time-averaged rates; without, the network runs as ever. Attaching again replaces the earlier setting.

    Args:
        net: SpikingJelly neurons, and layers that keep no state from step to step.
        time_step: T, the number of steps of a forward ('m') or calls of a window ('s').
        step_mode: 'm', net takes [T, B, ...]; 's', net is called T times with [B, ...], and
            ``functional.reset_net(net)`` stands between batches.
        time_dim: the dimension of the network's inputs that is time, in mode 'm'; 1 where they are [B, T, ...] and the
            forward transposes them.
        compiled: run all steps of a neuron layer, and BatchNorm, in fewer passes over memory, by torch.compile.
        static_input: where the input is the same at every step (an image), compute what stands in front of the first
            neurons once. Hand over ``image.expand(T, *image.shape)`` in mode 'm' (with ``time_dim`` 0), the same tensor
            in each of the T calls in mode 's'. The network must not work in place on it or on what its first layers
            put out.

    Returns:
        ``net``.

    Raises:
        ValueError: ``time_step`` or ``step_mode`` out of range, a net without spiking neurons, or part of a network
            that has the hooks on.
        UnsupportedModuleError: a module that the method cannot serve; the net is left as it was.
    """
    _check(time_step, step_mode)
    detach(net)
    for name, module in net.named_modules():
        if isinstance(_stands_in(module), Rule):
            raise ValueError(f"{name!r} is part of a network with hooks of its own: detach that network first")
    RateBackpropagation(net, time_step, step_mode, time_dim, compiled, static_input)
    return net


def bptt_model_setting(net: nn.Module, time_step: int, step_mode: str = "m") -> nn.Module:
    """Makes ``net`` train with BPTT, in place: takes hooks off and sets the step mode. Returns ``net``."""
    _check(time_step, step_mode)
    detach(net)
    functional.set_step_mode(net, step_mode)
    return net


def detach(net: nn.Module) -> nn.Module:
    """Takes off the hooks of ``net`` and of its submodules, if any: the very same network as before, step modes too."""
    for module in net.modules():
        owner = _stands_in(module)
        if isinstance(owner, RateBackpropagation):
            owner.remove()
    return net


def _stands_in(module: nn.Module) -> Any:
    """Whose method stands in for the module's forward, if any."""
    return getattr(vars(module).get("forward"), "__self__", None)


def _check(time_step: int, step_mode: str) -> None:
    if not isinstance(time_step, int) or time_step < 1:
        raise ValueError(f"time_step must be a whole number of at least 1, not {time_step!r}")
    if step_mode not in ("m", "s"):
        raise ValueError(f"step_mode must be 'm' (multi-step) or 's' (single-step), not {step_mode!r}")


class RateBackpropagation:
    """The two passes over one attached network: stands in for ``net.forward`` and owns the rules of its modules.

    ``phase`` says which pass is running: 'spike', 'rate', 'probe' (see `util.rate.probe`), or None outside of all.
    """

    def __init__(
        self, net: nn.Module, time_step: int, step_mode: str, time_dim: int, compiled: bool, static_input: bool
    ):
        self.net, self.time_step, self.step_mode, self.time_dim = net, time_step, step_mode, time_dim
        self.compiled, self.static_input = compiled, static_input
        self.steps_per_call = time_step if step_mode == "m" else 1
        self.static = StaticTensors(self.steps_per_call)
        self.phase: str | None = None
        self.rules: list[Rule] = []
        self.window: Window | None = None
        self.zeros: tuple[Tensor, ...] = ()
        # Before the rules replace any forward: a user's own replacement may do anything.
        self.checked_steps = time_step == 1 or all(keeps_steps_apart(module) for module in net.modules())
        names = {module: name or type(net).__name__ for name, module in net.named_modules()}
        for module, name in names.items():
            refuse_unless_served(module, name)
        self.previous_step_modes = [(m, m.step_mode) for m in net.modules() if hasattr(m, "step_mode")]
        try:
            functional.set_step_mode(net, step_mode)
            for module, name in names.items():
                rule = rule_for(module, name, self)
                if rule is not None:
                    self.rules.append(rule)
            if not any(isinstance(rule, NeuronRule) for rule in self.rules):
                raise ValueError(f"{type(net).__name__} has no spiking neurons to train through")
        except BaseException:
            self._restore_modules()
            raise
        self.stand_in = StandIn.put(net, "forward", self._multi_step if step_mode == "m" else self._single_step)

    def net_forward(self, *args, **kwargs) -> Any:
        return self.stand_in.original(*args, **kwargs)

    def remove(self) -> None:
        self.stand_in.remove()
        self._restore_modules()

    def _restore_modules(self) -> None:
        for rule in self.rules:
            rule.remove()
        for module, mode in self.previous_step_modes:
            module.step_mode = mode

    def restart(self) -> None:
        """Forgets the current window: the next forward is the first of T steps."""
        self.window, self.zeros = None, ()
        self.static = StaticTensors(self.steps_per_call)
        for rule in self.rules:
            rule.start_window()

    @contextmanager
    def _pass(self, phase: str) -> Iterator[None]:
        """One pass over the network. Ends with no pass running and, if it failed, no window begun."""
        for rule in self.rules:
            rule.start_pass()
        self.phase = phase
        try:
            with torch.set_grad_enabled(phase == "rate"):
                yield
        except BaseException:
            self.restart()
            raise
        finally:
            self.phase = None

    def _multi_step(self, *args, **kwargs):
        """[T, B, ...] -> what the network makes of it, its values the spike pass's, its gradients the rate pass's."""
        if not torch.is_grad_enabled() or self.phase is not None:
            return self.net_forward(*args, **kwargs)
        self.restart()
        mean_args, mean_kwargs = tree_map(self._mean_over_time, (args, kwargs))
        if self.static_input:
            self.static = StaticTensors(self.time_step, (args, kwargs))
        try:
            with self._pass("spike"):
                spiked = self.net_forward(*args, **kwargs)
        except RuntimeError as error:
            if self.static_input and "written-to tensor" in str(error):
                raise RuntimeError(
                    "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                    "without it"
                ) from error
            raise
        rated = self._rate_pass(mean_args, mean_kwargs)
        self.restart()
        if not self.checked_steps:
            self._check_steps((args, kwargs))
        return _map_tensors(self._with_gradient, spiked, rated)

    def _rate_pass(self, args: tuple, kwargs: dict) -> Any:
        """The network's output for the mean inputs, with a graph.

        Raises:
            UnsupportedModuleError: the network does something in it that cannot be done twice.
        """
        state, devices = self._outside_state(), {p.device for p in self.net.parameters()} | {torch.device("cpu")}
        random_before = {device: random_state(device) for device in devices}
        with self._pass("rate"):
            rated = self.net_forward(*args, **kwargs)
        try:
            self._check_rate_pass(state, random_before)
        except UnsupportedModuleError:
            self.restart()
            raise
        return rated

    def _check_rate_pass(self, state: dict[str, tuple[Tensor, int]], random_before: dict[torch.device, Tensor]) -> None:
        for rule in self.rules:
            if rule.calls != len(rule.records):
                raise UnsupportedModuleError(
                    rule.name,
                    rule.module,
                    "it is called in a loop over time; let it take all steps at once, or use step mode 's'",
                )
        now = self._outside_state()
        changed = [name for name, (b, version) in state.items() if now[name][0] is not b or now[name][1] != version]
        if changed:
            owner, buffer = changed[0].rpartition(".")[::2]
            raise UnsupportedModuleError(
                owner,
                self.net.get_submodule(owner),
                f"it changes its buffer {buffer!r} in every forward, also in the rate pass",
            )
        if not all(torch.equal(before, random_state(device)) for device, before in random_before.items()):
            raise self._unsupported(
                "it draws random numbers outside of modules, anew in each pass; use a dropout module"
            )

    def _outside_state(self) -> dict[str, tuple[Tensor, int]]:
        """Each buffer, and how often it has been changed."""
        return {name: (buffer, buffer._version) for name, buffer in self.net.named_buffers()}

    def _with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """``value`` [B, ...] or [T, B, ...], with the gradient of ``rate`` [B, ...] or [1, B, ...]."""
        if not rate.requires_grad:
            return value
        if value.shape != rate.shape and value.shape != (self.time_step, *rate.shape[1:]):
            raise RuntimeError(
                f"the network's output is {list(value.shape)} in the spike pass and {list(rate.shape)} in the rate "
                "pass: it does not treat its leading dimension as time"
            )
        return SpikeValue.apply(rate, (value,))

    def _check_steps(self, inputs: tuple[tuple, dict]) -> None:
        """Raises UnsupportedModuleError where the network's forward lets one time step know of another."""
        ran = {rule.name: rule for rule in self.rules if rule.knows_time and rule.calls}

        def run(inputs: tuple[tuple, dict]) -> dict[str, Tensor]:
            with self._pass("probe"), open_gates(self.net):
                output = self.net_forward(*inputs[0], **inputs[1])
            tensors = [y for y in tree_flatten(output)[0] if isinstance(y, Tensor)]
            reached = {name: rule.probed for name, rule in ran.items() if rule.calls}
            return {**reached, **{f"output {i}": y for i, y in enumerate(tensors)}}

        mixed = find_mixing(run, inputs, self.time_step, self.time_dim)
        self.checked_steps = True
        if mixed in ran:
            reason = (
                "what reaches it at one time step depends on the others, or time is not its leading dimension: the "
                "network's forward mixes time steps, or folds them as [B * T, ...] in place of [T * B, ...]"
            )
            raise ran[mixed]._unsupported(reason)
        if mixed is not None:
            raise self._unsupported(
                "it sums, selects or mixes time steps in its forward; let it return all of them, or their mean"
            )

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(type(self.net).__name__, self.net, reason)

    def _mean_over_time(self, x: Any) -> Any:
        """[T, B, ...] -> [1, B, ...]: the input of the rate pass, a sequence of length 1."""
        if not isinstance(x, Tensor):
            return x
        if x.dim() <= self.time_dim or x.shape[self.time_dim] != self.time_step:
            wanted = ", ".join(["..."] * self.time_dim + [f"T = {self.time_step}", "..."])
            raise ValueError(f"the network gets an input of shape {list(x.shape)}, not [{wanted}]")
        return as_float(x).mean(self.time_dim, keepdim=True)

    def _single_step(self, *args, **kwargs):
        """[B, ...] of one step -> the network's output of that step; the T-th call of a window runs the rate pass."""
        if not torch.is_grad_enabled() or self.phase is not None:
            return self.net_forward(*args, **kwargs)
        if self.window is None:
            self.restart()
            if self.static_input:
                self.static = StaticTensors(1, (args, kwargs))
        window = self.window or Window(self.net, self.time_step, (args, kwargs))
        try:
            window.add_input((args, kwargs))
        except RuntimeError:
            self.restart()
            raise
        with self._pass("spike"):
            spiked = self.net_forward(*args, **kwargs)
        if self.window is None:
            self.window, self.zeros = window, window.zeros_like(spiked)
        zeros = iter(self.zeros)
        if window.steps == self.time_step:
            window.rated = self._rate_pass(*window.mean_input())
            self.restart()
        return tree_map(lambda y: y + next(zeros) if is_float(y) else y, spiked)


def _map_tensors(function: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """``function`` of the tensors at the same places of two outputs; whatever is no tensor is taken from ``first``."""
    leaves, structure = tree_flatten(first)
    pairs = zip(leaves, tree_flatten(second)[0], strict=True)
    return tree_unflatten([function(a, b) if isinstance(a, Tensor) else a for a, b in pairs], structure)
