"""What a rule is: it serves a function, or a module, of which the rate needs to know more than the rate of its input.

    @rule_for(torch.conv2d)            # a function of torch, or a class of modules
    class Convolution(Rule): ...

Whatever treats each step alike needs none (alike.py), and what has none is differentiated over its T steps.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .compiled import mean_over_steps_compiled
from .rated import Rated, mean_of_steps, with_rate
from .session import Setting
from .sums import in_sum_type, mean_over_steps


class Part:
    """A part of a mean over steps, which is added to the others in one pass over memory."""

    def __init__(self, x: Tensor, factor: float):
        self.x, self.factor = x, factor

    def begin(self) -> Tensor:
        return in_sum_type(self.x) * self.factor

    def added_to(self, earlier: Tensor) -> Tensor:
        return earlier.add_(self.x, alpha=self.factor)


class Rule:
    """How one function or module is served: what its steps leave behind, and what it makes of the rate.

    Attributes:
        original: the function, or the module's own forward.
        module: None for a function.
        setting: how the network was attached.
        count: the input's `Rated.count`, where it is of spikes.
        steps, windows: the steps of a window in this call, and how many windows there are.
        repeats: how many steps a step of this call stands for: more than 1 where the input is the same at all of them.
        dtype: in `rate`, that of the value.
    """

    count: Tensor | None
    steps: int
    windows: int
    repeats: int = 1
    dtype: torch.dtype

    def __init__(self, original: Callable, setting: Setting, module: nn.Module | None = None):
        self.original, self.setting, self.module = original, setting, module

    def serves(self, x: Tensor, *args, **kwargs) -> bool:
        """Whether the rule holds for such arguments; else T steps are differentiated. Time leads in ``x``."""
        return True

    def spike(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Any]:
        """The true output, and what the rate needs to know of it: tensors in any nesting. Runs without a graph.

        In step mode 's' records of the steps are added up, so mostly each is a ``self.mean(...)``.

        ``x``: all steps, [T, B, ...] or [T * B, ...], in step mode 's' one, [B, ...]; then come the other arguments.
        """
        raise NotImplementedError

    def rate(self, x: Tensor, record: Any, *args, **kwargs) -> Tensor:
        """The output's rate, with a graph. ``x``: the input's, of one step's size for each window."""
        raise NotImplementedError

    def together(self, earlier: Any, record: Any) -> Any:
        """In step mode 's': the record of the steps of a window so far, None before the first, and of another one."""
        if earlier is None:
            return tree_map(lambda x: x.begin() if isinstance(x, Part) else x, record)
        return tree_map(lambda a, x: x.added_to(a) if isinstance(x, Part) else a + x, earlier, record)

    def again(self, record: Any, x: Tensor, *args, **kwargs) -> None:
        """In step mode 's': a step whose input is that of the step before, in place of `spike`; values stay."""

    def mean(self, x: Tensor) -> "Tensor | Part":
        """For a record: the mean of ``x`` over the steps of each window, in step mode 's' this step's part of it."""
        if self.setting.step_mode == "s":
            return Part(x, 1 / self.steps)
        mean = mean_over_steps_compiled if self.setting.compiled else mean_over_steps
        return mean_of_steps(x, self.steps, self.windows, mean)

    def all_steps(self, x: Tensor, tag: Rated, *args, **kwargs) -> Tensor:
        """Step mode 'm': the value with its rate."""
        self.steps, self.windows, self.count = tag.steps(x), tag.windows, tag.count
        with torch.no_grad():
            y, record = self.spike(x, *args, **kwargs)
        torch.clear_autocast_cache()  # of casts without a graph (torch 2.3)
        self.dtype = y.dtype
        rate = self.rate(tag.rate, record, *args, **kwargs)
        return with_rate(y, rate, 0, tag.windows, changed=x if y is x else None)


_TABLE: dict[Any, type[Rule]] = {}
_RuleClass = TypeVar("_RuleClass", bound=type[Rule])


def rule_for(*places: Callable | type[nn.Module]) -> Callable[[_RuleClass], _RuleClass]:
    """A decorator: functions of torch, and modules of these very classes, are served by the decorated `Rule`.

    Raises:
        ValueError: there is a rule already.
    """

    def register(rule: _RuleClass) -> _RuleClass:
        for place in places:
            if place in _TABLE:
                raise ValueError(f"{place.__name__} has a rule already: derive a class of your own")
            _TABLE[place] = rule
        return rule

    return register


def rule_class(place: Any) -> type[Rule] | None:
    return _TABLE.get(place)


def functions(setting: Setting) -> dict[Callable, Rule]:
    """The rules of functions, for a network that is attached so."""
    return {place: rule(place, setting) for place, rule in _TABLE.items() if not isinstance(place, type)}
