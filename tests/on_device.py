"""pytest --device: the tests draw on the CPU, so that a network and a batch are the same on any device."""

import torch
from torch.overrides import TorchFunctionMode

_DRAW = (torch.rand, torch.randn, torch.randint, torch.randperm)


class DrawnOnTheCPU(TorchFunctionMode):
    """What is drawn from a generator is drawn on the CPU and moved to the default device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in _DRAW or kwargs.get("generator") is None or "device" in kwargs:
            return function(*args, **kwargs)
        return function(*args, **kwargs, device="cpu").to(torch.get_default_device())
