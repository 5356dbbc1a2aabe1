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
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .deferred import DeferredGradients
from .filled import Filled, Place
from .forward_state import ForwardState
from .function import SpikeValue, Unreadable
from .inline import Inline, InlineError
from .look import REMEMBERS, Looks, copied
from .neuron_rule import NeuronRule
from .norm_rule import BatchNormRule
from .observers import looked_at, observed
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
            outputs = self._deferred(spiked)
            filled.replace(self._left_deferred(left))
            self._resolve(spiked, left, mean, state)
        else:
            window.deferred = None  # nobody has kept anything of the spike pass
            rated, rates = self._rate_pass(*mean, state)
            self.restart()
            outputs = _map_tensors(self._with_gradient, spiked, rated)
            filled.replace(self._left_with_gradient(left, rates))
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
        outputs = self._deferred(spiked)
        filled.replace(self._left_deferred(left))
        if window.calls.steps == self.setting.time_step:
            self._end(inputs, spiked, left, state)
        return outputs

    def _end(self, inputs: tuple[tuple, dict], spiked: Any, left: dict[Place, Tensor], state: ForwardState) -> None:
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

    def _deferred(self, spiked: Any) -> Any:
        """The spike pass's output, with the gradients that the rate pass is going to have."""
        leaves, structure = tree_flatten(spiked)
        outputs = [self._deferred_output(i, y) if is_float(y) else y for i, y in enumerate(leaves)]
        return tree_unflatten(outputs, structure)

    def _deferred_output(self, i: int, y: Tensor) -> Tensor:
        for rule in self.rules:
            for name, value in rule.module.named_memories() if isinstance(rule, NeuronRule) else ():
                if value is y:
                    return getattr(rule.module, name)
        return self.session.window.deferred.of(("the network", i), y.clone())

    def _left_deferred(self, left: dict[Place, Tensor]) -> dict[Place, Tensor]:
        """What a forward has left behind in the spike pass, as `_deferred`."""
        deferred = self.session.window.deferred
        return {place: deferred.of((*place, "left"), x) for place, x in left.items()}

    def _resolve(
        self, spiked: Any, left: dict[Place, Tensor], mean: tuple[tuple, dict], state: ForwardState
    ) -> dict[Place, Tensor]:
        """The rate pass of a window whose outputs wait for it. Returns what its forward left behind."""
        deferred = self.session.window.deferred
        with deferred.own_parameters():
            rated, rates = self._rate_pass(*deferred.copied(as_given(mean)), state)
        for i, (value, rate) in enumerate(_paired(spiked, rated)):
            if is_float(value):
                self._check_shapes(value, rate)
                deferred.resolve(("the network", i), rate)
        for place in _in_both(left, rates):
            if self._fits(left[place], rates[place]):
                deferred.resolve((*place, "left"), rates[place])
        constant = {(*place, "left") for place, rate in rates.items() if not rate.requires_grad}
        Filled(((), {}), self.left_by).map(lambda x: x.detach() if DeferredGradients.place_of(x) in constant else x)
        deferred.resolved()
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

    def _rate_pass(self, args: tuple, kwargs: dict, state: ForwardState) -> tuple[Any, dict[Place, Tensor]]:
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

    def _with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """``value`` [B, ...] or [T, B, ...], with the gradient of ``rate`` [B, ...] or [1, B, ...]."""
        if not rate.requires_grad:
            return value
        self._check_shapes(value, rate)
        return SpikeValue.apply(rate, (value,))

    def _left_with_gradient(self, left: dict[Place, Tensor], rates: dict[Place, Tensor]) -> dict[Place, Tensor]:
        """What a forward has left behind in the spike pass, with the gradients of the same in the rate pass."""
        shared = _in_both(left, rates)
        return {
            place: self._folded_with_gradient(value, rates[place])
            if place in shared and self._fits(value, rates[place])
            else self._without_gradient(place, value)
            for place, value in left.items()
        }

    def _folded_with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """As `_with_gradient`, also for ``value`` [T * B, ...] and ``rate`` [B, ...]."""
        if value.shape == rate.shape or len(rate) == 1:
            return self._with_gradient(value, rate)
        steps = value.unflatten(0, (self.setting.time_step, len(rate)))
        return self._with_gradient(steps, rate.unsqueeze(0)).flatten(0, 1)

    def _without_gradient(self, place: Place, value: Tensor) -> Tensor:
        """``value``, whose backward raises."""
        error = PassError(
            f"no gradient of {place[0]}: the network's forward does not leave the same there for one step as for "
            f"{self.setting.time_step}; let it treat time as the leading dimension, return it, or train with BPTT"
        )
        return Unreadable.apply(error, (value,), *self.parameters)

    def _fits(self, value: Tensor, rate: Tensor) -> bool:
        """Whether ``value`` is [T * B, ...] or [T, B, ...] to the other's [B, ...] or [1, B, ...]; or the same."""
        if value.shape == rate.shape:
            return True
        return bool(rate.dim()) and value.shape == (self.setting.time_step * len(rate), *rate.shape[1:])

    def _check_shapes(self, value: Tensor, rate: Tensor) -> None:
        if value.shape != rate.shape and value.shape != (self.setting.time_step, *rate.shape[1:]):
            raise PassError(
                f"the network's output is {list(value.shape)} in the spike pass and {list(rate.shape)} in the rate "
                "pass: it does not treat its leading dimension as time"
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


def _map_tensors(function: Callable[[Tensor, Tensor], Tensor], first: Any, second: Any) -> Any:
    """``function`` of the tensors at the same places of two outputs; whatever is no tensor is taken from ``first``."""
    outputs = [function(a, b) if isinstance(a, Tensor) else a for a, b in _paired(first, second)]
    return tree_unflatten(outputs, tree_flatten(first)[1])


def _paired(first: Any, second: Any) -> list[tuple[Any, Any]]:
    """The values at the same places of the two passes' outputs."""
    one, other = tree_flatten(first)[0], tree_flatten(second)[0]
    if len(one) != len(other):
        raise PassError(f"the network puts out {len(one)} values in the spike pass and {len(other)} in the rate pass")
    return list(zip(one, other, strict=True))


def _in_both(left: dict[Place, Tensor], rates: dict[Place, Tensor]) -> set[Place]:
    """The places in which both passes have left something; of what holds more in one of them, none."""
    differ = {holder for holder, _ in left.keys() ^ rates.keys()}
    return {place for place in left.keys() & rates.keys() if place[0] not in differ}


def _is_out_of_memory(error: Exception) -> bool:
    """On a GPU; on a CPU torch raises a plain RuntimeError."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error)
