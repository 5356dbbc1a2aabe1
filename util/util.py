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
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from util.rate_rule import NeuronRule, Rule, StandIn, UnsupportedModuleError
from util.support import refuse_unless_served, rule_for

__all__ = ["UnsupportedModuleError", "bptt_model_setting", "detach", "rate_model_setting"]


def rate_model_setting(net: nn.Module, time_step: int, step_mode: str = "m") -> nn.Module:
    """Makes ``net`` train with rate-based backpropagation, in place; parameters and state_dict stay what they are.

    With gradients enabled a forward runs the T steps without a graph and records one backward pass through
    time-averaged rates; without, the network runs as ever. Attaching again replaces the earlier setting.

    Args:
        net: SpikingJelly neurons, and layers that keep no state from step to step.
        time_step: T, the number of steps of a forward ('m') or calls of a window ('s').
        step_mode: 'm', net takes [T, B, ...]; 's', net is called T times with [B, ...], and
            ``functional.reset_net(net)`` stands between batches.

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
    RateBackpropagation(net, time_step, step_mode)
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

    ``phase`` says which pass is running: 'spike', 'rate', or None outside of both.
    """

    def __init__(self, net: nn.Module, time_step: int, step_mode: str):
        self.net, self.time_step, self.step_mode = net, time_step, step_mode
        self.steps_per_call = time_step if step_mode == "m" else 1
        self.phase: str | None = None
        self.rules: list[Rule] = []
        self.window: _Window | None = None
        self.zeros: tuple[Tensor, ...] = ()
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
        self.net_forward: Callable = net.forward
        self.stand_in = StandIn.put(net, "forward", self._multi_step if step_mode == "m" else self._single_step)

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
        with self._pass("spike"):
            spiked = self.net_forward(*args, **kwargs)
        with self._pass("rate"):
            mean_args, mean_kwargs = tree_map(self._mean_over_time, (args, kwargs))
            rated = self.net_forward(*mean_args, **mean_kwargs)
        self.restart()
        return _map_tensors(self._with_gradient, spiked, rated)

    def _with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """``value`` [B, ...] or [T, B, ...], with the gradient of ``rate`` [B, ...] or [1, B, ...]."""
        if value.shape != rate.shape and value.shape != (self.time_step, *rate.shape[1:]):
            raise RuntimeError(
                f"the network's output is {list(value.shape)} in the spike pass and {list(rate.shape)} in the rate "
                "pass: it does not treat its leading dimension as time"
            )
        # The difference is 0 and carries the gradient; over a [T, ...] output it broadcasts, so T gradients add up.
        return value + (rate - rate.detach())

    def _mean_over_time(self, x: Any) -> Any:
        """[T, B, ...] -> [1, B, ...]: the input of the rate pass, a sequence of length 1."""
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0 or x.shape[0] != self.time_step:
            raise ValueError(f"the network gets an input of shape {list(x.shape)}, not [T = {self.time_step}, B, ...]")
        return x.mean(0, keepdim=True)

    def _single_step(self, *args, **kwargs):
        """[B, ...] of one step -> the network's output of that step; the T-th call of a window runs the rate pass."""
        if not torch.is_grad_enabled() or self.phase is not None:
            return self.net_forward(*args, **kwargs)
        if self.window is None:
            self.restart()
        with self._pass("spike"):
            spiked = self.net_forward(*args, **kwargs)
        if self.window is None:
            self.window = _Window(self, (args, kwargs))
            self.zeros = self.window.zeros_like(spiked)
        window, zeros = self.window, iter(self.zeros)
        window.add_input((args, kwargs))
        if window.steps == self.time_step:
            with self._pass("rate"):
                mean_args, mean_kwargs = window.mean_input()
                window.rated = self.net_forward(*mean_args, **mean_kwargs)
            self.restart()
        return tree_map(lambda y: y + next(zeros) if isinstance(y, Tensor) else y, spiked)


class _Window:
    """Single-step mode: T calls of the network that share one backward pass.

    Every call's output is its spike output plus one and the same zero. Autograd adds up the gradients that arrive at
    the zero from all T outputs and hands them to `_RatePass`, which sends the sum through the rate pass's graph.
    """

    def __init__(self, owner: RateBackpropagation, inputs: Any):
        self.steps = 0
        self.rated: Any = None
        self.time_step = owner.time_step
        self.input_sum: list[Any] = []
        self.first_input, self.input_structure = tree_flatten(inputs)
        self.sources = [p for p in owner.net.parameters() if p.requires_grad]
        self.sources += [x for x in self.first_input if isinstance(x, Tensor) and x.requires_grad]

    def zeros_like(self, output: Any) -> tuple[Tensor, ...]:
        """A zero for each tensor of the output. Not kept here: with the window it would hold itself alive."""
        tensors = [y for y in tree_flatten(output)[0] if isinstance(y, Tensor)]
        return _RatePass.apply(self, tensors, *self.sources)

    def add_input(self, inputs: Any) -> None:
        leaves, _ = tree_flatten(inputs)
        self.steps += 1
        if self.steps == 1:
            self.input_sum = list(leaves)
            return
        for i, (x, first) in enumerate(zip(leaves, self.first_input, strict=True)):
            if not isinstance(x, Tensor):
                continue
            if x.requires_grad and x is not first:
                raise RuntimeError(
                    "step mode 's': an input that needs a gradient must be the same tensor at every step; "
                    "attach the whole network, or use step mode 'm'"
                )
            self.input_sum[i] = self.input_sum[i] + x

    def mean_input(self) -> Any:
        mean = [x / self.time_step if isinstance(x, Tensor) else x for x in self.input_sum]
        return tree_unflatten(mean, self.input_structure)

    def backward(self, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        if self.rated is None:
            raise RuntimeError(
                f"backward after {self.steps} of {self.time_step} steps, or a second time: in step mode 's' one "
                "backward follows the last of the time_step calls"
            )
        rated = [y for y in tree_flatten(self.rated)[0] if isinstance(y, Tensor)]
        self.rated = None
        pairs = [(y, grad) for y, grad in zip(rated, grads, strict=True) if y.requires_grad]
        outputs, output_grads = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, self.sources, output_grads, allow_unused=True)


class _RatePass(Function):
    """Zeros of the outputs' shapes, whose gradient is that of the rate pass with respect to ``sources``."""

    @staticmethod
    def forward(ctx, window: _Window, outputs: list[Tensor], *sources: Tensor):
        ctx.window = window
        return tuple(torch.zeros_like(y) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return None, None, *ctx.window.backward(grads)


def _map_tensors(function: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """``function`` of the tensors at the same places of two outputs; whatever is no tensor is taken from ``first``."""
    leaves, structure = tree_flatten(first)
    pairs = zip(leaves, tree_flatten(second)[0], strict=True)
    return tree_unflatten([function(a, b) if isinstance(a, Tensor) else a for a, b in pairs], structure)
