"""The two passes: T steps without a graph, then one through rates, with a graph."""

import functools
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .deferred import DeferredGradients
from .filled import Filled
from .forward_state import ForwardState
from .inline import Inline, InlineError
from .look import REMEMBERS, Looks, copied
from .neuron_rule import NeuronRule
from .norm_rule import BatchNormRule
from .observers import looked_at, observed
from .outputs import Left, Outputs
from .problem import NetworkError, NotServedError, PassError, UnsupportedModuleError
from .registry import find_rule
from .rule import LOOP, Rule, StandIn
from .session import Phase, Session, Setting, Window
from .step_calls import StepCalls, as_float, is_float
from .support import problems
from .timeless import as_given, check_names, marked


class RateBackpropagation:
    """The two passes over one attached network: stands in for ``net.forward`` and holds the rules of its modules."""

    _HANDLE = "_rate_backpropagation"  # where an attached network keeps this; a copy of it keeps a copy

    def __init__(self, net: nn.Module, setting: Setting):
        self.net, self.setting, self.session = net, setting, Session(setting)
        self.session.passes = weakref.ref(self)
        self.rules: list[Rule] = []
        self.changing_hooks: set[int] = set()
        self.inline: Inline | None = None  # what the forward does between its modules in this window
        self.looks = Looks(net, self.session)
        if found := problems(net):
            raise UnsupportedModuleError.of(found)
        self.previous_step_modes = [(m, m.step_mode) for m in net.modules() if hasattr(m, "step_mode")]
        check_names(net.forward, setting.timeless)
        try:
            functional.set_step_mode(net, setting.step_mode)
            for name, module in net.named_modules():
                if rule := find_rule(module):
                    self.rules.append(rule(module, name or type(net).__name__, self.session))
            if not any(isinstance(rule, NeuronRule) for rule in self.rules):
                raise NetworkError(f"{type(net).__name__} has no spiking neurons to train through")
        except BaseException:
            self._restore_modules()
            raise
        self.inner_modules = {name: module for name, module in net.named_modules() if module is not net}
        self.parameters = list(net.parameters())
        by_rule = {rule.module for rule in self.rules if isinstance(rule, BatchNormRule)}  # in the spike pass alone
        self.buffered = [m for m in net.modules() if m._buffers and m not in by_rule]
        self.own = {
            name: m for name, m in net.named_modules() if not type(m).__module__.startswith(("torch.", "spikingjelly."))
        }
        self.left_by = {name: m for name, m in self.own.items() if not isinstance(m, base.MemoryModule)}
        self.outputs = Outputs(setting.time_step, self.parameters, self.rules, self.left_by)
        self.stand_in = StandIn.put(net, "forward", self.forward)
        self.replication = StandIn.put(net, "_replicate_for_data_parallel", self.refuse_replicas)

    @classmethod
    def attach(cls, net: nn.Module, setting: Setting) -> None:
        vars(net)[cls._HANDLE] = cls(net, setting)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.session.passes = weakref.ref(self)

    @classmethod
    def of(cls, net: nn.Module) -> "RateBackpropagation | None":
        """That of a network which has the hooks on."""
        return vars(net).get(cls._HANDLE)

    def refuse_replicas(self) -> None:
        """Stands in for what nn.DataParallel copies a module by: the copy's rules would be the original's."""
        raise self._unsupported(
            "nn.DataParallel runs copies of it in threads of one process; use DistributedDataParallel, a process for "
            "each GPU, or train with BPTT"
        )

    def forward(self, *args, **kwargs) -> Any:
        """Stands in for the network's own forward."""
        if not self.session.attached or not torch.is_grad_enabled() or self.session.phase is not None:
            return self.net_forward(*args, **kwargs)
        multi = self.setting.step_mode == "m"
        args, kwargs = marked(self.stand_in.original, self.setting.timeless, args, kwargs, tensors=multi)
        step = type(self)._multi_step if multi else type(self)._single_step
        if "torch._dynamo" in sys.modules:
            step = _untraced(step)
        return step(self, *args, **kwargs)

    def net_forward(self, *args, **kwargs) -> Any:
        return self.stand_in.original(*args, **kwargs)

    def remove(self) -> None:
        self.session.attached = False
        vars(self.net).pop(self._HANDLE, None)
        self.stand_in.remove()
        self.replication.remove()
        self._restore_modules()

    def _restore_modules(self) -> None:
        for rule in self.rules:
            rule.remove()
        for module, mode in self.previous_step_modes:
            module.step_mode = mode

    def restart(self) -> None:
        """Forgets the current window: the next forward is the first of T steps."""
        self.session.window = None

    def _look(self, inputs: tuple[tuple, dict], state: ForwardState) -> Inline:
        """Before a window: what the forward does with such inputs.

        Raises:
            RuntimeError: the network is no longer the one that the hooks were put on.
        """
        self.restart()
        self._check_modules()
        for rule in self.rules:
            rule.check_start()
        return self.looks.look(inputs, self._run, self.rules, state)

    def _begin(self, inputs: tuple[tuple, dict], sources: tuple[tuple, dict], inline: Inline) -> Window:
        """Begins a window.

        Args:
            inputs: the network's arguments.
            sources: those that may need a gradient.
        """
        self.inline = inline
        setting, steps = self.setting, self.setting.time_step
        deferred = None
        if setting.step_mode == "s" or looked_at(self.inner_modules.values(), self.changing_hooks):
            deferred = DeferredGradients(self.net, as_given(sources), steps)
        calls = StepCalls(steps, inputs) if setting.step_mode == "s" else None
        static = inputs if setting.static_input else ()
        self.session.window = Window(setting, static, self._batch_size(inputs), deferred, calls)
        return self.session.window

    def _batch_size(self, inputs: tuple[tuple, dict]) -> int | None:
        """B of the first input [T, B, ...], or [B, ..., T, ...], in step mode 'm'; in step mode 's' nobody asks."""
        batch_dim = 0 if self.setting.time_dim or self.inline.makes_steps else 1
        sizes = (x.shape[batch_dim] for x in tree_flatten(inputs)[0] if isinstance(x, Tensor) and x.dim() > batch_dim)
        return next(sizes, None)

    def _check_modules(self) -> None:
        _, *now = self.net.modules()
        known = list(self.inner_modules.values())
        if len(now) != len(known) or any(a is not b for a, b in zip(now, known, strict=True)):
            known = set(map(id, [self.net, *known]))
            new = next((name for name, module in self.net.named_modules() if id(module) not in known), None)
            what = "a module was taken out" if new is None else f"{new!r} is new"
            raise RuntimeError(
                f"the network has changed since the hooks were attached ({what}): call rate_model_setting again"
            )
        mode = self.setting.step_mode
        for module, _ in self.previous_step_modes:
            if module.step_mode != mode:
                raise RuntimeError(
                    f"{self._name_of(module)!r} was set to step mode {module.step_mode!r} since the hooks were "
                    f"attached for {mode!r}: call rate_model_setting with the step mode that you want"
                )

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.net.named_modules() if other is module) or type(module).__name__

    def _multi_step(self, *args, **kwargs):
        """[T, B, ...] -> what the network makes of it, its values the spike pass's, its gradients the rate pass's."""
        inputs = tree_map(lambda x: x, (args, kwargs))  # as they are now: forward may fill a dict
        state = ForwardState(self.buffered, self.own.values())
        inline = self._look(inputs, state)
        mean = tree_map(copied if inline.makes_steps else self._mean_over_time, inputs)
        window = self._begin((args, kwargs), mean, inline)
        try:
            spiked = self._run("spike", args, kwargs, inline)
        except RuntimeError as error:
            if self.setting.static_input and "written-to tensor" in str(error):
                raise RuntimeError(
                    "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                    "without it"
                ) from error
            raise
        filled, self.session.filled = self.session.filled, None
        left = filled.tensors()
        if not inline.steps_known_apart:
            self.looks.check_steps(inputs, self._run, inline, self.rules, state)
        if window.deferred and window.deferred.pending():
            outputs = self.outputs.deferred(spiked, window.deferred)
            filled.replace(self.outputs.left_deferred(left, window.deferred))
            self._resolve(spiked, left, mean, state)
        else:
            window.deferred = None  # nobody has kept anything of the spike pass
            rated, rates = self._rate_pass(*mean, state)
            self.restart()
            outputs = self.outputs.joined(spiked, rated)
            filled.replace(self.outputs.left_joined(left, rates))
        return outputs

    def _single_step(self, *args, **kwargs):
        """[B, ...] of one step -> the network's output of that step; the T-th call of a window runs the rate pass."""
        inputs, state = (args, kwargs), ForwardState(self.buffered, self.own.values())
        window = self.session.window or self._begin(inputs, inputs, self._look(inputs, state))
        window.before = window.before or state
        try:
            window.calls.add_input(inputs)
        except BaseException:
            self.restart()
            raise
        spiked = self._run("spike", args, kwargs, self.inline)
        filled, self.session.filled = self.session.filled, None
        left = filled.tensors()
        window.deferred.count_step()
        outputs = self.outputs.deferred(spiked, window.deferred)
        filled.replace(self.outputs.left_deferred(left, window.deferred))
        if window.calls.steps == self.setting.time_step:
            self._end(inputs, spiked, left, state)
        return outputs

    def _end(self, inputs: tuple[tuple, dict], spiked: Any, left: Left, state: ForwardState) -> None:
        """The last step of a window in step mode 's', which began in ``state``."""
        window, inline = self.session.window, self.inline
        memories = set()
        if not inline.steps_known_apart:
            memories = self.looks.check_memories(inputs, self._run, inline, self.rules, window.before, state)
        rates = self._resolve(
            spiked, left, window.calls.mean_input(), state.with_attributes_of(window.before, numbers=False)
        )
        for holder, _ in (place for place in memories & rates.keys() if rates[place].requires_grad):
            raise self._unsupported(f"what its forward leaves in {holder}, {REMEMBERS}")
        inline.steps_known_apart = True

    def _resolve(self, spiked: Any, left: Left, mean: tuple[tuple, dict], state: ForwardState) -> Left:
        """The rate pass of a window whose outputs wait for it. Returns what its forward left behind."""
        deferred = self.session.window.deferred
        with deferred.own_parameters():
            rated, rates = self._rate_pass(*deferred.copied(as_given(mean)), state)
        self.outputs.resolve(deferred, spiked, rated, left, rates)
        self.restart()
        return rates

    def _run(self, phase: Phase, args: tuple, kwargs: dict, inline: Inline) -> Any:
        """One pass over the network. Raises PassError where its forward fails in another than the spike pass."""
        deferred = self.session.window and self.session.window.deferred
        self.session.watched = inline.needed(phase)
        with (
            self.session.run(phase),
            observed(self.inner_modules, phase, self.changing_hooks, deferred),
            inline if self.session.watched else nullcontext(),
        ):
            try:
                args, kwargs = as_given((args, kwargs), same_containers=phase == "spike")
                self.session.filled = Filled((args, kwargs), self.left_by)
                return self.net_forward(*args, **kwargs)
            except InlineError as error:
                raise self._unsupported(str(error)) from error
            except (RuntimeError, ValueError, IndexError) as error:
                if phase == "spike" or isinstance(error, NotServedError) or _is_out_of_memory(error):
                    raise
                place = f"behind {self.session.last!r}" if self.session.last else "before its first layer"
                raise PassError(
                    f"{place} the network's forward cannot take a sequence of another length, as the rate pass, of "
                    f"length 1, is ({str(error).splitlines()[0]}): let it take the number of steps from its input, "
                    "treat each step alike, and name the dimensions that it squeezes"
                ) from error

    def _check_output(self, rated: Any) -> None:
        """Raises UnsupportedModuleError where the output would get no gradient that it has with BPTT."""
        leaves = tree_flatten(rated)[0]
        for leaf in leaves:
            held = [] if isinstance(leaf, Tensor) else getattr(leaf, "__dict__", {}).values()
            if any(isinstance(value, Tensor) for value in held):
                raise self._unsupported(
                    f"it returns a {type(leaf).__name__}, whose tensors would get no gradient; return a tensor, or a "
                    "tuple, list or dict of tensors"
                )
        trained = any(p.requires_grad for p in self.parameters)
        without = [leaf for leaf in leaves if is_float(leaf) and not leaf.requires_grad]
        if trained and without and len(without) == sum(map(is_float, leaves)):
            raise self._unsupported(
                "no output has a gradient in the rate pass; let it put out what layers make of spikes, or train with "
                "BPTT"
            )

    def _rate_pass(self, args: tuple, kwargs: dict, state: ForwardState) -> tuple[Any, Left]:
        """The network's output for the mean inputs, and what its forward left behind, with a graph.

        Nothing of it stays in the modules.

        Raises:
            UnsupportedModuleError: the network does something in it that cannot be done twice.
        """
        # A spike pass under autocast leaves casts of the weights in its cache that have no gradient (torch 2.3).
        torch.clear_autocast_cache()
        self.inline.short = True
        try:
            with state.put_back():
                before = {} if self.inline.draws else self.looks.random_states()
                rated = self._run("rate", args, kwargs, self.inline)
                drawn = self.looks.have_moved(before)
                left, self.session.filled = self.session.filled.tensors(), None
                kept = state.with_a_graph()
            self._check_output(rated)
            self._check_rate_pass(kept)
            if drawn:
                self.looks.check_draws((args, kwargs), self._run, state)
                self.session.filled = None
        except UnsupportedModuleError:
            self.restart()
            raise
        finally:
            self.inline.short = False
        return rated, left

    def _check_rate_pass(self, kept: str | None) -> None:
        for rule in self.rules:
            if self.session.calls[rule] != len(self.session.window.records[rule]):
                raise rule._unsupported(f"it is called in a loop over time; let it take all steps at once, or {LOOP}")
        if kept is not None:
            raise self._unsupported(
                f"its forward leaves a graph in the buffer {kept!r}, through which no gradient of the next forward can "
                "go: change it under torch.no_grad()"
            )

    def _unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(type(self.net).__name__, self.net, reason)

    def _mean_over_time(self, x: Any) -> Any:
        """[T, B, ...] -> [1, B, ...]: the input of the rate pass, a sequence of length 1."""
        if not isinstance(x, Tensor):
            return x
        if not self.looks.has_time(x):
            wanted = ", ".join(["..."] * self.setting.time_dim + [f"T = {self.setting.time_step}", "..."])
            raise ValueError(
                f"the network gets an input of shape {list(x.shape)}, not [{wanted}], and its forward repeats none: "
                f"hand over every step, as image.expand({self.setting.time_step}, *image.shape); if it has no time "
                f"dimension, name its argument in rate_model_setting(..., timeless=[...]); {LOOP}"
            )
        first = x.narrow(self.setting.time_dim, 0, 1)
        if not x.is_floating_point() and not x.is_complex() and torch.equal(first.expand_as(x), x):
            return first  # token ids
        return as_float(x).mean(self.setting.time_dim, keepdim=True)


@functools.cache
def _untraced(function: Callable) -> Callable:
    """``function`` as it runs without torch.compile, whose tracer would take for constants what the passes count."""
    return torch.compiler.disable(function)


def _is_out_of_memory(error: Exception) -> bool:
    """On a GPU; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
