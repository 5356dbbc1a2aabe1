"""What stands in front of the first neurons, computed once where the input is the same at every step, in step mode 'm'.

Such an input has stride 0 along time, as ``image.expand(T, *image.shape)``; so has what its layers make of it, which
the network must not change in place.
"""

from typing import Any

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .rated import rated, tagged, with_rate
from .stand_in import StandIn
from .sync_norm import SYNCHRONISED

# Classes, not those derived from them, whose forward in step mode 'm' runs each time step by itself.
_APART = (
    *(getattr(layer, f"{kind}{n}d") for kind in ("Conv", "ConvTranspose", "BatchNorm") for n in (1, 2, 3)),
    *(getattr(layer, f"{kind}Pool{n}d") for kind in ("Avg", "Max", "AdaptiveAvg") for n in (1, 2, 3)),
    *(getattr(layer, name) for name in ("Linear", "GroupNorm", "Upsample") if hasattr(layer, name)),
    *(kind for kind in SYNCHRONISED if issubclass(kind, layer.BatchNorm1d | layer.BatchNorm2d | layer.BatchNorm3d)),
)


class StaticLayers:
    def __init__(self, hooks: Any):
        found = [m for m in hooks.net.modules() if type(m) in _APART and "forward" not in vars(m)]
        self.stand_ins = [StandIn.put(m, "forward", StaticLayer(m, hooks)) for m in found]


class StaticLayer:
    """Stands in for a layer's forward."""

    def __init__(self, module: nn.Module, hooks: Any):
        self.module, self.hooks = module, hooks

    def __call__(self, x: Tensor) -> Tensor:
        forward, running, tag = type(self.module).forward, self.hooks.running, rated(x)
        if running is None or tag is None or tag.dim or not torch.is_grad_enabled() or len(x) == 1 or x.stride(0):
            return forward(self.module, x)
        one = tagged(x[:1], tag.rate[:1], 0, 1)
        running.repeats = len(x)
        try:
            y = forward(self.module, one)
        finally:
            running.repeats = 1
        if (of_y := rated(y)) is None:
            return forward(self.module, x)
        rate = of_y.rate
        with torch.no_grad():
            steps = y.expand(len(x), *y.shape[1:])
        return with_rate(steps, rate.expand(tag.windows, *rate.shape[1:]), 0, tag.windows)
