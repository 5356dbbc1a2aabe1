"""Terms of the training loss on what happens inside a network, by the option that gives their weight."""

from typing import Any

from torch import Tensor, nn

from .meter import FiringRates


class Term(nn.Module):
    """A term that is added to the loss of each training batch.

    Parameters of its own, of a branch say, are trained with the network's and kept in checkpoints to continue from; the
    weights that a run leaves for use have none of them.
    """

    needs_rates = False  # whether `FiringRates.mean` is to have a graph

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight

    def attach(self, net: nn.Module) -> None:
        """Puts on hooks that look, once the method is attached. `util.util.rate_of` tells a value's rate there."""

    def forward(self, outputs: Tensor, target: Tensor, rates: FiringRates) -> Tensor:
        """After a forward: outputs [T, B, classes], labels [B] or [B, classes], what has fired -> the term."""
        raise NotImplementedError


class RatePenalty(Term):
    """The mean firing rate of all neurons over the steps of a batch."""

    needs_rates = True

    def forward(self, outputs: Tensor, target: Tensor, rates: FiringRates) -> Tensor:
        return self.weight * rates.mean()


TERMS: dict[str, type[Term]] = {"rate_penalty": RatePenalty}


def make_terms(options: Any) -> nn.ModuleList:
    """Those whose option is not 0."""
    weights = {name: getattr(options, name) for name in TERMS}
    return nn.ModuleList(TERMS[name](weight) for name, weight in weights.items() if weight)
