"""Terms of the training loss on what happens inside a network: a penalty on rates, self-distillation through them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.branch import branch

from ..errors import UserError
from ..rate.rated import rate_of
from ..rate.sums import in_sum_type
from .loss import Criterion, make_criterion
from .meter import FiringRates
from .recipe import hard_labels

TEMPERATURE = 3.0  # tau of `distillation`


class Term(nn.Module):
    """A term that is added to the loss of each training batch.

    Parameters of its own, of a branch say, are trained with the network's and kept in checkpoints to continue from; the
    weights that a run leaves for use have none of them.
    """

    needs_rates = False  # whether `FiringRates.mean` is to have a graph

    def attach(self, net: nn.Module) -> None:
        """Puts on hooks that look, once the method is attached. `util.util.rate_of` tells a value's rate there."""

    def forward(self, outputs: Tensor, target: Tensor, rates: FiringRates) -> Tensor:
        """After a forward: outputs [T, B, classes], labels [B] or [B, classes], what has fired -> the term.

        Of several processes one may have no sample (B = 0) in a batch: the term is 0 then.
        """
        raise NotImplementedError


class RatePenalty(Term):
    """The mean firing rate of all neurons over the steps of a batch."""

    needs_rates = True

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def forward(self, outputs: Tensor, target: Tensor, rates: FiringRates) -> Tensor:
        return self.weight * rates.mean()


class Distillation(Term):
    """Self-distillation through rates (arXiv 2510.06254, NeurIPS 2025): branches classify by the rates behind stages.

    ``ce`` times the sum of the branches' losses, and ``kl`` times `distillation` of the network's outputs and theirs.
    A branch is an ordinary network of one step's size (`model.branch`). With BPTT it gets the mean over time.
    """

    def __init__(self, net: nn.Module, num_classes: int, criterion: Criterion, ce: float, kl: float):
        """``net``: names its stages, see `model.layer.SpikingClassifier`."""
        super().__init__()
        self.stages, self.criterion, self.ce, self.kl = tuple(net.stages), criterion, ce, kl
        self.branches = nn.ModuleList(branch(channels, num_classes) for channels in net.stages.values())
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self.stages}  # of each call, [B, C, H, W]

    def attach(self, net: nn.Module) -> None:
        for name in self.stages:
            net.get_submodule(name).register_forward_hook(partial(self._look, name))

    def _look(self, name: str, module: nn.Module, args: tuple, y: Tensor) -> None:
        rate = rate_of(y)
        if rate is None and y.requires_grad:  # a step of BPTT, or T; of rate-based calls but the last there is no graph
            rate = y
        if torch.is_grad_enabled() and rate is not None:
            rate = in_sum_type(rate)
            self._seen[name].append(rate.mean(0) if rate.dim() == 5 else rate)

    def forward(self, outputs: Tensor, target: Tensor, rates: FiringRates) -> Tensor:
        logits = [outputs.mean(0)]
        for name, classify in zip(self.stages, self.branches, strict=True):
            seen, self._seen[name] = self._seen[name], []
            logits.append(classify(sum(seen[1:], seen[0]) / len(seen)))
        if not len(target):
            return sum(z.sum() for z in logits)
        ce = sum(self.criterion(z.unsqueeze(0), target) for z in logits[1:])
        return self.ce * ce + self.kl * distillation(logits, hard_labels(target))


def distillation(logits: Sequence[Tensor], target: Tensor, tau: float = TEMPERATURE) -> Tensor:
    """sum_k tau^2 KL(softmax(teacher / tau) || softmax(z_k / tau)), mean over samples; z_k [B, classes], labels [B].

    The teacher of a sample is the mean of those z_k whose largest entry is the label; no gradient goes there. A sample
    that none has right adds nothing.
    """
    z = torch.stack([in_sum_type(z) for z in logits])  # [K, B, classes]
    right = (z.argmax(2) == target).unsqueeze(2)  # [K, B, 1]
    teacher = (z * right).sum(0).div(right.sum(0).clamp_min(1)).detach()  # [B, classes]
    soft = F.log_softmax(teacher / tau, 1).expand_as(z)
    kl = F.kl_div(F.log_softmax(z / tau, 2), soft, reduction="none", log_target=True).sum(2)  # [K, B]
    return tau**2 * (kl * right.any(0).squeeze(1)).sum(0).mean()


def make_terms(options: Any, net: nn.Module, num_classes: int) -> nn.ModuleList:
    """Those that the options ask for. Raises UserError where they do not fit the network."""
    terms: list[Term] = []
    if options.rate_penalty:
        terms.append(RatePenalty(options.rate_penalty))
    if options.distill:
        if not getattr(net, "stages", None):
            raise UserError(f"--distill puts branches behind stages, and {options.arch} names none: use another --arch")
        criterion = make_criterion(options)
        terms.append(Distillation(net, num_classes, criterion, options.distill_ce, options.distill_kl))
    return nn.ModuleList(terms)
