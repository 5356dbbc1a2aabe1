"""Which class of module has which rule, and which is refused and why: one table, filled where each rule stands.

    @rule_for(MyConv)
    class MyConvRule(Rule): ...

An exact class goes before its bases. A class that is in no table runs in both passes as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from .problem import Problem, Unserved, Verdict
from .rule import Rule


@dataclass(frozen=True)
class _Entry:
    rule: type[Rule] | None = None
    unserved: Unserved | None = None
    subclasses: bool = False  # whether it holds for classes derived from it, which may compute something else
    when: Callable[[nn.Module], bool] = lambda module: True


_TABLE: dict[type, _Entry] = {}
_RuleClass = TypeVar("_RuleClass", bound=type[Rule])


def rule_for(*classes: type[nn.Module], subclasses: bool = False) -> Callable[[_RuleClass], _RuleClass]:
    """A decorator: modules of ``classes`` are served by the decorated `Rule`.

    Args:
        subclasses: also those derived from them that have no entry of their own.

    Raises:
        ValueError: a class has an entry already.
    """

    def register(rule: _RuleClass) -> _RuleClass:
        _add(classes, _Entry(rule=rule, subclasses=subclasses))
        return rule

    return register


def refuse(
    *classes: type[nn.Module],
    reason: str,
    remedy: str,
    verdict: Verdict,
    when: Callable[[nn.Module], bool] = lambda module: True,
) -> None:
    """Modules of ``classes`` and of classes derived from them are refused, ``when`` that is so. As `rule_for`."""
    _add(classes, _Entry(unserved=Unserved(reason, remedy, verdict), subclasses=True, when=when))


def _add(classes: tuple[type, ...], entry: _Entry) -> None:
    for kind in classes:
        if kind in _TABLE:
            raise ValueError(f"{kind.__module__}.{kind.__qualname__} has an entry already: derive a class of your own")
        _TABLE[kind] = entry


def _entry(module: nn.Module) -> _Entry | None:
    for kind in type(module).__mro__:
        entry = _TABLE.get(kind)
        if entry and (kind is type(module) or entry.subclasses) and entry.when(module):
            return entry
    return None


def find_rule(module: nn.Module) -> type[Rule] | None:
    """The rule for a module that is served; None where it runs in both passes as it is."""
    entry = _entry(module)
    return entry.rule if entry and entry.rule and entry.rule.applies(module) else None


def find_problem(module: nn.Module, name: str) -> Problem | None:
    """What keeps the module from being served, if anything does."""
    entry = _entry(module)
    unserved = entry and (entry.unserved or entry.rule.problem(module))
    return Problem(name, type(module).__name__, *vars(unserved).values()) if unserved else None


def found(place: Any, *names: str) -> tuple[type, ...]:
    """Those of the classes that the installed SpikingJelly has."""
    return tuple(getattr(place, name) for name in names if hasattr(place, name))
