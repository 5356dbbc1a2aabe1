"""The hooks on one network: what stands in for its forward, its neurons and the modules that have a rule."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import _pop_mode_temporarily

from .multi_step import watching
from .neurons import LOOP, Neurons
from .neurons_multi_step import MultiStepNeurons
from .neurons_single_step import SingleStepNeurons
from .problem import NetworkError, UnsupportedModuleError
from .rule import Rule, functions, rule_class
from .session import Setting
from .single_step import Run
from .stand_in import StandIn
from .static import StaticLayers
from .support import problems, served_neuron
from .timeless import check_names, timeless_values


class Hooks:
    """Stands in for ``net.forward``. ``running`` is the mode that a forward runs in, None outside of all."""

    _HANDLE = "_rate_backpropagation"  # where an attached network keeps this; a copy of it keeps a copy

    def __init__(self, net: nn.Module, setting: Setting):
        self.net, self.setting = net, setting
        self.attached = True
        self.running: Any = None
        self.run: Run | None = None  # of step mode 's', from its first call on
        self.counted: Callable | None = None  # looks at what functions without a rate keep (check.py)
        self.stand_ins: list[StandIn] = []
        self.neurons: list[Neurons] = []
        self.previous_step_modes = [(m, m.step_mode) for m in net.modules() if hasattr(m, "step_mode")]
        try:
            functional.set_step_mode(net, setting.step_mode)
            self.step_modes = {m: m.step_mode for m, _ in self.previous_step_modes}
            stand_in = MultiStepNeurons if setting.step_mode == "m" else SingleStepNeurons
            for name, module in net.named_modules():
                name = name or type(net).__name__
                if served_neuron(module):
                    self.neurons.append(stand_in(module, name, self))
                elif rule := rule_class(type(module)):
                    self.stand_ins.append(StandIn.put(module, "forward", ModuleRule(module, rule, self)))
            if not self.neurons and not any(p.is_neuron for p in problems(net, setting.step_mode)):
                raise NetworkError(f"{type(net).__name__} has no spiking neurons to train through")
        except BaseException:
            self._restore()
            raise
        if setting.static_input and setting.step_mode == "m":
            self.stand_ins += StaticLayers(self).stand_ins
        self.known = dict(net.named_modules())
        self.stand_ins.append(StandIn.put(net, "_replicate_for_data_parallel", self.refuse_replicas))
        self.forward_stand_in = StandIn.put(net, "forward", self.forward)
        vars(net)[self._HANDLE] = self

    @classmethod
    def check(cls, net: nn.Module, setting: Setting) -> None:
        """Raises an error where hooks cannot be put on; looks at the network alone."""
        if refused := [p for p in problems(net, setting.step_mode) if p.refused]:
            raise UnsupportedModuleError.of(refused)
        attached = cls.of(net)
        check_names(attached.forward_stand_in.original if attached else net.forward, setting.timeless)
        if lazy := [name for name, p in net.named_parameters() if isinstance(p, UninitializedParameter)]:
            raise ValueError(f"{lazy[0]!r} has no shape yet: run the network once before the hooks are put on")

    @classmethod
    def of(cls, net: nn.Module) -> "Hooks | None":
        """Those of a network which has them on."""
        return vars(net).get(cls._HANDLE)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no forward and has begun no run of T calls."""
        return {**vars(self), "running": None, "run": None}

    def remove(self) -> None:
        self.attached = False
        vars(self.net).pop(self._HANDLE, None)
        self.forward_stand_in.remove()
        self._restore()

    def _restore(self) -> None:
        for part in (*reversed(self.stand_ins), *self.neurons):
            part.remove()
        for module, mode in self.previous_step_modes:
            module.step_mode = mode

    def refuse_replicas(self) -> None:
        """Stands in for what nn.DataParallel copies a module by: the copy's hooks would be the original's."""
        raise self.unsupported(
            "nn.DataParallel runs copies of it in threads of one process; use DistributedDataParallel, a process for "
            "each GPU, or train with BPTT"
        )

    def unsupported(self, reason: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(type(self.net).__name__, self.net, reason)

    def forward(self, *args, **kwargs) -> Any:
        """Stands in for the network's own forward."""
        if not self.attached or not torch.is_grad_enabled() or self.running is not None:
            return self.net_forward(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise self.unsupported(
                "torch.func's transforms (grad, vmap, ...) see no graph of it: use backward, or BPTT"
            )
        step = type(self)._multi_step if self.setting.step_mode == "m" else type(self)._single_step
        if "torch._dynamo" in sys.modules:
            step = _untraced(step)
        return step(self, args, kwargs)

    def net_forward(self, *args, **kwargs) -> Any:
        return self.forward_stand_in.original(*args, **kwargs)

    def _multi_step(self, args: tuple, kwargs: dict) -> Any:
        """[T, B, ...] -> what the network makes of it."""
        self._check_start()
        how = self.setting, functions(self.setting), args, kwargs, self._timeless(args, kwargs), self.counted
        with watching(*how) as self.running:
            try:
                return self.net_forward(*args, **kwargs)
            except (RuntimeError, ValueError, IndexError) as error:
                self._explain(error)
                raise
            finally:
                self.running = None

    def _timeless(self, args: tuple, kwargs: dict) -> list[Any]:
        return timeless_values(self.forward_stand_in.original, self.setting.timeless, args, kwargs)

    def _explain(self, error: Exception) -> None:
        """Raises another error in place of ``error`` where it has a known cause."""
        if "Inference tensors" in str(error):
            raise NetworkError("torch.inference_mode inside forward leaves no rate: use torch.no_grad") from error
        if self.setting.step_mode == "s":
            return
        if self.setting.static_input and "written-to tensor" in str(error):
            raise RuntimeError(
                "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                "without it"
            ) from error
        shapes = [list(x.shape) for x in self.running.inputs]
        if not self.running.with_time and not isinstance(error, NetworkError | UnsupportedModuleError):
            wanted = ", ".join(["..."] * self.setting.time_dim + [f"T = {self.setting.time_step}", "..."])
            raise ValueError(
                f"the network gets inputs of shape {shapes}, none of them [{wanted}] ({str(error).splitlines()[0]}): "
                f"hand over every step, as image.expand({self.setting.time_step}, *image.shape)"
            ) from error

    def _single_step(self, args: tuple, kwargs: dict) -> Any:
        """[B, ...] of one step -> the network's output of that step."""
        if self.run is None:
            self._check_start()
            parameters = [p for p in self.net.parameters() if p.requires_grad]
            self.run = Run(self.setting, parameters, functions(self.setting))
        self.running = run = self.run
        try:
            out = run.call(self.net_forward, args, kwargs, self._timeless(args, kwargs))
        except BaseException as error:
            self._end_run()
            self._explain(error)
            raise
        finally:
            self.running = None
        if run.ended:
            self._end_run()
        return out

    def _end_run(self) -> None:
        if self.run is not None:
            self.run.close()
        self.run = None

    def restart(self, neurons: Neurons) -> None:
        """A neuron layer is reset: the next forward is the first of T steps."""
        if self.running is not None and self.setting.step_mode == "s":
            raise neurons.unsupported(f"the network resets it in every step; use step mode 'm', or {LOOP}")
        self._end_run()

    def _check_start(self) -> None:
        """Raises RuntimeError where the network is no longer the one that the hooks were put on, or not reset."""
        now = dict(self.net.named_modules())
        if list(map(id, now.values())) != list(map(id, self.known.values())):
            known = set(map(id, self.known.values()))
            new = next((name for name, module in now.items() if id(module) not in known), None)
            what = "a module was taken out" if new is None else f"{new!r} is new"
            raise RuntimeError(
                f"the network has changed since the hooks were attached ({what}): call rate_model_setting again"
            )
        for name, module in now.items():
            if module in self.step_modes and module.step_mode != self.step_modes[module]:
                raise RuntimeError(
                    f"{name or type(module).__name__!r} was set to step mode {module.step_mode!r} since the hooks were "
                    f"attached for {self.setting.step_mode!r}: call rate_model_setting with the step mode that you want"
                )
            if self.setting.step_mode == "s" and (module._backward_hooks or module._backward_pre_hooks):
                reason = "its backward hook would see nothing in step mode 's'; use step mode 'm'"
                raise UnsupportedModuleError(name, module, reason)
        for neurons in self.neurons:
            neurons.check_start()


class ModuleRule:
    """Stands in for the forward of a module that has a rule."""

    def __init__(self, module: nn.Module, rule: type[Rule], hooks: Hooks):
        self.module, self.hooks = module, hooks
        self.rule = rule(self.original, hooks.setting, module)

    def original(self, *args, **kwargs) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, x: Tensor, *args, **kwargs) -> Any:
        running = self.hooks.running
        if running is None or not torch.is_grad_enabled():
            return self.original(x, *args, **kwargs)
        with _pop_mode_temporarily():
            if running.serves(self.rule, x, *args, **kwargs):
                return running.module(self.rule, x, *args, **kwargs)
        return self.original(x, *args, **kwargs)


@functools.cache
def _untraced(function: Callable) -> Callable:
    """``function`` as it runs without torch.compile, whose tracer would take for constants what the hooks count."""
    return torch.compiler.disable(function)
