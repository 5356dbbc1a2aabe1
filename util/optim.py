"""Optimizers and learning-rate schedules by name, and the parameter groups they work on."""

from typing import Any

from torch import nn, optim
from torch.optim import lr_scheduler

OPTIMIZERS = {
    "SGD": lambda groups, lr, **more: optim.SGD(groups, lr, momentum=0.9, **more),
    "Adam": lambda groups, lr, **more: optim.Adam(groups, lr, **more),
    "AdamW": lambda groups, lr, **more: optim.AdamW(groups, lr, **more),
}

SCHEDULERS = {
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    "step": lambda optimizer, epochs: lr_scheduler.MultiStepLR(
        optimizer, [-(-epochs // 2), -(-epochs * 3 // 4)], gamma=0.1
    ),
    "constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1.0),
}


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights with ``weight_decay``; biases and the parameters of normalisation layers without."""
    exempt = {id(p) for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase) for p in m.parameters()}
    exempt |= {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    return [
        {"params": [p for p in net.parameters() if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in net.parameters() if id(p) in exempt], "weight_decay": 0.0},
    ]


def for_device(state: dict[str, Any], optimizer: optim.Optimizer) -> dict[str, Any]:
    """A state of an optimizer that may have run on another device, fused or not as ``optimizer`` is."""
    groups = zip(state["param_groups"], optimizer.param_groups, strict=True)
    return {**state, "param_groups": [{**group, "fused": own.get("fused")} for group, own in groups]}
