"""Optimizers and learning-rate schedules by name, and the parameter groups they work on."""

import warnings
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import nn, optim
from torch.optim import lr_scheduler


def _sgd(groups: list[Any], lr: float, momentum: float = 0.9, **more: Any) -> optim.SGD:
    """SGD whose fused steps may be skipped, the first one too."""
    optimizer = optim.SGD(groups, lr, momentum=momentum, **more)
    if more.get("fused") and momentum:
        optimizer.register_step_pre_hook(_make_momenta)
    return optimizer


def _make_momenta(optimizer: optim.SGD, args: tuple, kwargs: dict) -> None:
    """PyTorch's fused SGD makes its momenta unwritten memory, and a skipped first step, as of a gradient scaler, leaves
    them so. Zeros are the same to the bit: without dampening momentum * 0 + gradient is the first step's momentum.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


OPTIMIZERS = {
    "SGD": _sgd,
    "Adam": lambda groups, lr, **more: optim.Adam(groups, lr, **more),
    "AdamW": lambda groups, lr, **more: optim.AdamW(groups, lr, **more),
}


class _InTurn(lr_scheduler.SequentialLR):
    """One schedule after the other, without torch 2.3's warning of how this class calls the next one."""

    def step(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step", UserWarning)
            super().step()


SCHEDULERS = {
    "cosine": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs),
    "step": lambda optimizer, epochs: lr_scheduler.MultiStepLR(
        optimizer, [-(-epochs // 2), -(-epochs * 3 // 4)], gamma=0.1
    ),
    "constant": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1.0),
}
ENDLESS = ("constant",)  # schedules that are the same whatever the number of epochs


WARMUP_START = 0.01  # of the learning rate


def make_scheduler(name: str, optimizer: optim.Optimizer, epochs: int, warmup: int) -> lr_scheduler.LRScheduler:
    """The schedule called ``name``, stepped after each epoch.

    ``warmup``: so many epochs, less than ``epochs``, begin with `WARMUP_START` of the learning rate, rising linearly;
    the schedule is made for those that are left, as in torchvision's references.
    """
    if not warmup:
        return SCHEDULERS[name](optimizer, epochs)
    rising = lr_scheduler.LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
    return _InTurn(optimizer, [rising, SCHEDULERS[name](optimizer, epochs - warmup)], milestones=[warmup])


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, *filter(None, [getattr(nn, "RMSNorm", None)]))


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weights with ``weight_decay``; biases and the parameters of normalisation layers and neurons without.

    A neuron's are time constants in disguise, for which 0 is no natural value.
    """
    exempt = {id(p) for m in net.modules() if isinstance(m, (*_NORMS, neuron.BaseNode)) for p in m.parameters()}
    exempt |= {id(p) for name, p in net.named_parameters() if name.endswith("bias")}
    return [
        {"params": [p for p in net.parameters() if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in net.parameters() if id(p) in exempt], "weight_decay": 0.0},
    ]


def load_optimizer(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes over a state that may be of another device: fused or not as ``optimizer`` is.

    Raises:
        KeyError, TypeError, ValueError: it is of another kind of optimizer, or of other parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = [
        {**overlaid(mine, group, ("lr", "params")), "fused": mine.get("fused")}
        for mine, group in zip(own, state["param_groups"], strict=True)
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, buffers in state["state"].items():
        for value in buffers.values():
            if value is not None and value.numel() != 1 and value.shape != parameters[index].shape:
                raise ValueError(f"a buffer of shape {list(value.shape)} for parameter {index}")
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def load_scheduler(scheduler: lr_scheduler.LRScheduler, state: dict[str, Any]) -> None:
    """Takes over a state. Raises KeyError or TypeError where it is of another kind of schedule."""
    scheduler.load_state_dict(_like_schedule(scheduler.state_dict(), state))


def _like_schedule(own: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    merged = overlaid(own, state, tuple(name for name in own if not name.startswith("_") and name != "verbose"))
    if "_schedulers" in own:  # in turn
        parts = zip(own["_schedulers"], state["_schedulers"], strict=True)
        merged["_schedulers"] = [_like_schedule(*part) for part in parts]
    return merged


def overlaid(own: dict[str, Any], given: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    """``own`` with the values of ``given``, as far as it has them: other versions of PyTorch know some more or less.

    Raises:
        KeyError: a ``required`` name is missing.
        TypeError: a value is of another kind.
    """
    for name in required:
        given[name]
    for name in own.keys() & given.keys():
        if not _same_kind(own[name], given[name]) and name != "fused":
            raise TypeError(f"{name} is {given[name]!r}, where a value like {own[name]!r} belongs")
    return {name: given.get(name, value) for name, value in own.items()}


def _same_kind(own: Any, given: Any) -> bool:
    if isinstance(own, list | tuple) and isinstance(given, list | tuple):
        return len(own) == len(given) and all(map(_same_kind, own, given))
    if type(own) in (int, float):
        return type(given) in (int, float)
    return type(own) is type(given)
