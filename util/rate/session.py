"""What the two passes and the rules share: the setting, the pass that runs, and the window of T steps."""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from .deferred import DeferredGradients
from .filled import Filled
from .forward_state import ForwardState
from .problem import PassError
from .spike_counts import CountsOfRates
from .static import StaticTensors
from .step_calls import StepCalls

Phase = Literal["spike", "rate", "probe"]


@dataclass(frozen=True)
class Setting:
    """How a network was attached; see `attach.rate_model_setting`."""

    time_step: int
    step_mode: str
    time_dim: int = 0
    compiled: bool = False
    static_input: bool = False
    timeless: tuple[str, ...] = ()

    @property
    def steps_per_call(self) -> int:
        return self.time_step if self.step_mode == "m" else 1


@dataclass
class Record:
    """What a call of a module leaves behind in the spike pass for the rate pass."""

    input_shape: tuple[int, ...]
    value: Any = None


class Records(list):
    """The records of one module within a window, in the order of its calls in a forward."""

    def of(self, call: int, shape: tuple[int, ...], name: str) -> Record:
        """The record of a call in the spike pass, in step mode 's' the one of the steps before."""
        if call == len(self):
            self.append(Record(shape))
        elif shape != self[call].input_shape:
            raise RuntimeError(
                f"{name!r} got {list(self[call].input_shape)} earlier in this window, now {list(shape)}: "
                "call functional.reset_net(net) between batches"
            )
        return self[call]

    def take(self, call: int, name: str) -> Record:
        """The record of a call in the rate pass, for which it is used up."""
        if call >= len(self):
            raise PassError(f"{name!r} is called more often in the rate pass than in the spike pass")
        record, self[call] = self[call], Record(self[call].input_shape)
        return record


class Window:
    """T steps that share one backward pass: what their spike passes leave behind, and the rates of their rate pass."""

    def __init__(
        self,
        setting: Setting,
        static_inputs: Any,
        batch_size: int | None,
        deferred: DeferredGradients | None,
        calls: StepCalls | None,
    ):
        """
        Args:
            static_inputs: of the network's first call, where they are known to be the same at every step.
            batch_size: of the network's input, where it has one.
        """
        self.batch_size = batch_size
        self.static = StaticTensors(setting.steps_per_call, static_inputs)
        self.deferred, self.calls = deferred, calls
        self.before: ForwardState | None = None  # of the network, in step mode 's' before the first call
        self.records: dict[Any, Records] = defaultdict(Records)
        self.counts = CountsOfRates()


class Session:
    """Which pass runs (``phase``; None outside of all), and the window that has begun (None before the first step).

    A copy has begun no window: what a window holds is of the network that began it.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.passes: weakref.ref | None = None  # to the `RateBackpropagation`, of which a part's copy has none
        self.attached = True  # until the hooks are taken off; a wrapper that a user put around a method may stay
        self.phase: Phase | None = None
        self.window: Window | None = None
        self.calls: Counter[Any] = Counter()  # of each rule in the current pass
        self.last = ""  # the module that was called last
        self.filled: Filled | None = None  # of the last pass
        self.probed: dict[str, Tensor] = {}  # what reached each module in a probe pass
        self.watched = False  # whether torch's function mode shows what the network's forward calls

    @contextmanager
    def run(self, phase: Phase) -> Iterator[None]:
        """One pass over the network. Ends with no pass running and, if it failed, no window begun."""
        self.calls.clear()
        self.probed = {}
        self.phase = phase
        try:
            with torch.set_grad_enabled(phase == "rate"):
                yield
        except BaseException:
            self.window = None
            raise
        finally:
            self.phase = None

    def out_of_sight(self) -> AbstractContextManager:
        """For what a rule does itself, which is none of the forward's."""
        return _pop_mode_temporarily() if self.watched else nullcontext()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(Session(self.setting)), "attached": self.attached}

    def count(self, rule: Any) -> int:
        """The number of this call of the rule's module in the pass, from 0."""
        self.calls[rule] += 1
        self.last = rule.name
        return self.calls[rule] - 1
