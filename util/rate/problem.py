"""What keeps a module from being served, in words and as an error."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Problem:
    """A module of a network that is refused, or that runs as with BPTT.

    Attributes:
        name: its path in the network.
        kind: its class's name.
        reason, remedy: what is the matter, and what to do.
        refused: whether the hooks refuse it; else its T steps are kept, as with BPTT.
        is_neuron: whether it is a neuron.
    """

    name: str
    kind: str
    reason: str
    remedy: str = ""
    refused: bool = True
    is_neuron: bool = False

    def __str__(self) -> str:
        where = self.kind if self.name == self.kind else f"{self.name!r} ({self.kind})"
        return f"{where}: {self.reason}" + (f"; {self.remedy}" if self.remedy else "")


GRAD = "torch.autograd.grad inside forward would give the derivative of a rate: train with BPTT"


class NotServedError(Exception):
    """Rate-based backpropagation cannot serve a network; the message says why. Its kinds are also Python's own."""


class NetworkError(NotServedError, ValueError):
    """The network does not do with its time steps, or with its neurons, what the method builds on."""


class UnsupportedModuleError(NotServedError, TypeError):
    """Rate-based backpropagation cannot serve a module; the message names it and says why; see ``problems``."""

    def __init__(self, name: str, module: nn.Module, reason: str):
        self._set([Problem(name, type(module).__name__, reason)])

    @classmethod
    def of(cls, problems: list[Problem]) -> "UnsupportedModuleError":
        error = cls.__new__(cls)
        error._set(problems)
        return error

    def _set(self, problems: list[Problem]) -> None:
        self.problems = problems
        text = "\n  ".join(["", *map(str, problems)]) if len(problems) > 1 else str(problems[0])
        self.args = (f"rate-based backpropagation cannot serve {text}",)
