"""Losses by name: functions of a network's outputs at each step, [T, B, classes], and of labels.

A label is a class [B] or shares of the classes [B, classes]. What a loss takes besides is the option of that name.
In rate-based training the steps' outputs share one rate, to which the sum of their gradients goes: any loss has one
step's cost. A method that goes backward at each step hands over one step's outputs at a time (T = 1).
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError

Criterion = Callable[[Tensor, Tensor], Tensor]  # outputs [T, B, classes], labels -> mean over the batch


def ce(outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the outputs' mean over time, as published."""
    return F.cross_entropy(outputs.mean(0), target, label_smoothing=label_smoothing)


def tet(outputs: Tensor, target: Tensor, label_smoothing: float = 0.0, tet_weight: float = 0.05) -> Tensor:
    """Temporal efficient training (Deng et al., 2022, eq. 11): the mean of each step's cross-entropy, and with
    ``tet_weight`` of the whole the mean squared distance of the outputs from 1, the threshold.
    """
    each = target.expand(len(outputs), *target.shape).flatten(0, 1)  # [T * B] or [T * B, classes]
    entropy = F.cross_entropy(outputs.flatten(0, 1), each, label_smoothing=label_smoothing)
    return (1 - tet_weight) * entropy + tet_weight * (outputs - 1).square().mean()


def mse(outputs: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean squared distance of the outputs' mean over time from 1 for the label's class and 0 for the others."""
    mean = outputs.mean(0)
    shares = F.one_hot(target, mean.shape[1]).to(mean.dtype) if target.dim() == 1 else target
    return F.mse_loss(mean, shares * (1 - label_smoothing) + label_smoothing / mean.shape[1])


LOSSES: dict[str, Callable[..., Tensor]] = {"ce": ce, "tet": tet, "mse": mse}


def options_of(loss: Callable[..., Tensor]) -> set[str]:
    """The options that a loss takes."""
    return set(list(inspect.signature(loss).parameters)[2:])


def make_criterion(options: Any, training: bool = True) -> Criterion:
    """The loss that is trained with, or that tests report: without label smoothing."""
    loss = LOSSES[options.loss]
    given = {}
    for name in options_of(loss):
        if not hasattr(options, name):
            raise UserError(f"--loss {options.loss} takes {name!r}, of which there is no option: add one of that name")
        given[name] = 0.0 if name == "label_smoothing" and not training else getattr(options, name)
    return partial(loss, **given)
