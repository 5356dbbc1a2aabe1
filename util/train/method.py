"""How gradients of T steps are computed: one class a method, which tells the engine all that it has to know of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from model.layer import SpikingClassifier

from ..errors import UserError
from ..rate.attach import bptt_model_setting, rate_model_setting
from ..rate.neurons import computes_in_float32


class Precision:
    """Mixed precision (``amp``: 'off', 'bf16' or 'fp16'). Potentials, and sums over time, are of float32."""

    def __init__(self, amp: str, device: torch.device):
        self.enabled, self.device_type = amp != "off", device.type
        self.dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def attach(self, net: nn.Module) -> None:
        for module in net.modules():
            if self.enabled and isinstance(module, neuron.BaseNode):
                module.register_forward_pre_hook(_in_float32)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)


def _in_float32(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = args
    return (x if computes_in_float32(module, x) else x.float(),)


@dataclass(frozen=True)
class Method:
    """What methods have in common. Fields but the first two are the options of the same name, which act on no other.

    Attributes:
        title: what it is called in messages.
        replayable: whether each training step does the same, so that a CUDA graph of one can be replayed.
        alone: whether it is of one process: it goes backward more often than DistributedDataParallel can follow.
    """

    T: int
    step_mode: str

    title: ClassVar[str]
    replayable: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """In the names of runs."""
        return next(name for name, kind in METHODS.items() if kind is type(self))

    def check(self) -> None:
        """Raises UserError where its options exclude each other."""

    def attach(self, net: nn.Module) -> None:
        bptt_model_setting(net, self.T, self.step_mode)

    def outputs(self, net: nn.Module, x: Tensor) -> Tensor:
        """Images [B, C, H, W], shown at every step, or frames [B, T, C, H, W] -> outputs of each step [T, B, classes].

        A network that averages over time in itself, and is no `SpikingClassifier`, gives [1, B, classes].
        """
        functional.reset_net(net)
        if self.step_mode == "s":
            return torch.stack([net(step) for step in self.steps(x)])
        out = net(self.time_first(x), **{"each_step": True} if isinstance(net, SpikingClassifier) else {})
        return out if out.dim() == 3 else out.unsqueeze(0)

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        """As `outputs`, averaged over time: [B, classes]."""
        return self.outputs(net, x).mean(0)

    def time_first(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or frames [B, T, C, H, W] -> what a multi-step network is shown, [T, B, C, H, W]."""
        return x.expand(self.T, *x.shape) if x.dim() == 4 else x.transpose(0, 1)

    def steps(self, x: Tensor) -> Iterator[Tensor]:
        """Of the same, what a network is shown step by step: T times [B, C, H, W]; of an image the very same tensor."""
        return iter([x] * self.T if x.dim() == 4 else x.unbind(1))

    def learn(
        self,
        model: nn.Module,
        x: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        precision: Precision,
        weight: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of ``weight`` times the loss to those of the parameters.

        Args:
            model: a `OneForward`, perhaps in DistributedDataParallel.
            loss_of: outputs [T, B, classes] -> the loss.

        Returns:
            The loss, and the outputs [T, B, classes].
        """
        with precision.autocast():
            outputs = self.outputs(model.net, x) if isinstance(model, OneForward) else model(x)
            loss = loss_of(outputs)
        self.backward(precision.scaler.scale(loss * weight))
        return loss.detach(), outputs.detach()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@dataclass(frozen=True)
class Bptt(Method):
    """Backpropagation through time: plain autograd, which keeps all T steps."""

    title = "BPTT"


@dataclass(frozen=True)
class Rate(Method):
    """Rate-based backpropagation (Yu et al., 2024): one backward pass through rates, at one step's cost."""

    windows: int = 1  # of rates, each T / windows steps long: 1 as published, T is BPTT
    rate_loss_scale: bool | None = None  # 1/T of the loss's gradient; None: with one window
    compile: bool | None = None  # neurons and BatchNorm in fewer passes; None: on a GPU

    @property
    def title(self) -> str:
        return "rate-based backpropagation" + (f" ({self.windows} windows)" if self.windows > 1 else "")

    @property
    def name(self) -> str:
        return "rate" if self.windows == 1 else f"rate{self.windows}"

    def check(self) -> None:
        if self.T % self.windows:
            raise UserError(f"--windows {self.windows} does not divide --T {self.T}: windows are of equal length")

    def attach(self, net: nn.Module) -> None:
        compiled = next(net.parameters()).is_cuda if self.compile is None else self.compile
        rate_model_setting(net, self.T, self.step_mode, compiled=compiled, static_input=True, windows=self.windows)

    def backward(self, loss: Tensor) -> None:
        """Published results were obtained with 1/T of the loss's gradient (method, Loss scale)."""
        scaled = self.windows == 1 if self.rate_loss_scale is None else self.rate_loss_scale
        (loss / self.T if scaled else loss).backward()


@dataclass(frozen=True)
class Sltt(Method):
    """Spatial learning through time (Meng et al., 2023): gradients go through layers, and through time not at all.

    What neurons keep from step to step is a constant, and each step's loss goes backward at once, so that one step is
    kept at a time. SLTT-K: of K of the T steps, drawn anew for each batch.
    """

    sltt_steps: int | None = None  # K; None: T

    alone = True

    @property
    def chosen(self) -> int:
        """K."""
        return self.sltt_steps or self.T

    @property
    def title(self) -> str:
        return "SLTT" + (f" ({self.chosen} of {self.T} steps)" if self.chosen < self.T else "")

    @property
    def name(self) -> str:
        return "sltt" if self.chosen == self.T else f"sltt{self.chosen}"

    @property
    def replayable(self) -> bool:
        return self.chosen == self.T  # else the steps are drawn by Python

    def check(self) -> None:
        if self.step_mode != "s":
            raise UserError("--method sltt goes through the network step by step: add --step_mode s")
        if self.chosen > self.T:
            raise UserError(f"--sltt_steps {self.sltt_steps} of --T {self.T} steps: use at most {self.T}")

    def learn(
        self,
        model: nn.Module,
        x: Tensor,
        loss_of: Callable[[Tensor], Tensor],
        precision: Precision,
        weight: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        net, losses, outputs = model.net, [], []
        chosen = set(torch.randperm(self.T)[: self.chosen].tolist())
        functional.reset_net(net)
        for t, step in enumerate(self.steps(x)):
            functional.detach_net(net)
            with torch.set_grad_enabled(t in chosen), precision.autocast():
                out = net(step).unsqueeze(0)  # [1, B, classes]
                if t in chosen:
                    loss = loss_of(out) / self.chosen
            if t in chosen:
                self.backward(precision.scaler.scale(loss * weight))
                losses.append(loss.detach())
            outputs.append(out.detach())
        return torch.stack(losses).sum(), torch.cat(outputs)


METHODS: dict[str, type[Method]] = {"bptt": Bptt, "rate": Rate, "sltt": Sltt}


def options_of(kind: type[Method]) -> set[str]:
    """The options that act on this method."""
    return {f.name for f in fields(kind)} - {f.name for f in fields(Method)}


def make_method(options: Any) -> Method:
    kind = METHODS[options.method]
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind)})


class OneForward(nn.Module):
    """All steps of ``net`` as one call: DistributedDataParallel takes each call for a training step of its own."""

    def __init__(self, net: nn.Module, method: Method, terms: nn.ModuleList | None = None):
        """``terms`` of the loss are here for their parameters, whose gradients are averaged with the network's."""
        super().__init__()
        self.net, self.method, self.terms = net, method, terms

    def forward(self, x: Tensor) -> Tensor:
        """As `Method.outputs`."""
        return self.method.outputs(self.net, x)
