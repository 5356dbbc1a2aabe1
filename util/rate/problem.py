"""What keeps a module from being served, in words and as an error."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Verdict = Literal["method", "project", "setting"]
VERDICTS: dict[Verdict, str] = {
    "method": "the method cannot do it",
    "project": "this project does not do it yet",
    "setting": "a setting of the module must change",
}


@dataclass(frozen=True)
class Unserved:
    """Why a class of modules, or a module as it is set, cannot be served, and what to do."""

    reason: str
    remedy: str
    verdict: Verdict


@dataclass(frozen=True)
class Problem:
    """A module of a network that cannot be served.

    Attributes:
        name: its path in the network.
        kind: its class's name.
        reason, remedy, verdict: as in `Unserved`; `VERDICTS` says what a verdict means.
    """

    name: str
    kind: str
    reason: str
    remedy: str = ""
    verdict: Verdict | None = None

    def __str__(self) -> str:
        where = self.kind if self.name == self.kind else f"{self.name!r} ({self.kind})"
        remedy = f"; {self.remedy}" if self.remedy else ""
        verdict = f" ({VERDICTS[self.verdict]})" if self.verdict else ""
        return f"{where}: {self.reason}{remedy}{verdict}"


class NotServedError(Exception):
    """Rate-based backpropagation cannot serve a network; the message says why. Its kinds are also Python's own."""


class PassError(NotServedError, RuntimeError):
    """The rate pass met what the spike pass did not; the message names the module."""


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
