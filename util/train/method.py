"""How a batch goes through a network: BPTT or rate-based, in one precision or two."""

from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

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
    """How gradients are computed: what a training step does differently for BPTT and rate-based backpropagation."""

    rate_based: bool
    time_step: int
    step_mode: str
    scale_loss: bool
    compiled: bool = False  # rate-based: neurons and BatchNorm by torch.compile
    windows: int = 1  # rate-based: of rates

    def attach(self, net: nn.Module) -> None:
        if self.rate_based:
            how = {"compiled": self.compiled, "static_input": True, "windows": self.windows}
            rate_model_setting(net, self.time_step, self.step_mode, **how)
        else:
            bptt_model_setting(net, self.time_step, self.step_mode)

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        """Images [B, C, H, W], shown at every step, or frames [B, T, C, H, W] -> time-averaged outputs [B, classes]."""
        functional.reset_net(net)
        if self.step_mode == "s":
            steps = [x] * self.time_step if x.dim() == 4 else x.unbind(1)  # T times [B, C, H, W]
            outs = (net(step) for step in steps)
            first = next(outs)  # summed in float32 at least: bfloat16 keeps 8 bits
            total = sum(outs, first.to(torch.promote_types(first.dtype, torch.float32)))
            return (total / self.time_step).to(first.dtype)
        return net(self.time_first(x))

    def time_first(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] or frames [B, T, C, H, W] -> what a multi-step network is shown, [T, B, C, H, W]."""
        return x.expand(self.time_step, *x.shape) if x.dim() == 4 else x.transpose(0, 1)

    def backward(self, loss: Tensor) -> None:
        """Rate-based, published results were obtained with 1/T of the loss's gradient (method, Loss scale)."""
        (loss / self.time_step if self.rate_based and self.scale_loss else loss).backward()


class OneForward(nn.Module):
    """All steps of ``net`` as one call: DistributedDataParallel takes each call for a training step of its own."""

    def __init__(self, net: nn.Module, method: Method):
        super().__init__()
        self.net, self.method = net, method

    def forward(self, x: Tensor) -> Tensor:
        """As `Method.forward`."""
        return self.method.forward(self.net, x)
