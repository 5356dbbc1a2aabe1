"""A neuron layer in step mode 's': one step a call, the rate in the call that ends a window."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from .dynamics import NotElementwiseError, learnable_parameters
from .eligibility import NeuronRecord, NeuronState
from .function import Linearised
from .neurons import Neurons
from .places import EARLIER, Mark


@dataclass
class _Progress:
    """Of one layer in step mode 's': the record of the window so far, and the memory that it began and ended with."""

    record: NeuronRecord | None = None
    starts: list[Tensor | float] = field(default_factory=list)
    ends: list[Tensor] = field(default_factory=list)


class SingleStepNeurons(Neurons):
    """The stand-in of one neuron layer's ``single_step_forward``."""

    STEP = "single_step_forward"

    def step(self, *args, **kwargs) -> Tensor:
        """[B, ...] -> the spikes of this step."""
        running, (x, *others) = self.hooks.running, (*args, *kwargs.values())
        if running is None or others:
            return self.original(*args, **kwargs)
        current = running.enter(self, x)
        with _pop_mode_temporarily():
            source, progress = running.deferred.source, running.progress.setdefault(self.name, _Progress())
            if running.opening:
                first = running.window == 0
                self._check_set(() if first else progress.record.state.memory, first)
                starts = self.starts(x) if first else self._go_on(progress)
                record = self.record(starts, not first)
                progress.starts = [source(s) if first and isinstance(s, Tensor) else s for s in starts]
            else:
                self._check_set(progress.record.state.memory)
                record = progress.record._replace(state=_as_it_is(progress.record.state, self.plain_memory()))
            try:
                record, spikes = self.steps(x.detach().unsqueeze(0), record)
            except NotElementwiseError as error:
                raise self.unsupported(f"{error}; use step mode 'm', where it runs as with BPTT") from error
            rate = count = sources = None
            if current is not None:
                sources = self.sources(current, progress.starts, record, source)
                rate, count = self.rate(record, sources, running.steps, spikes.dtype)
                if self.setting.windows > 1:
                    progress.ends = [Linearised.apply((v,), slopes, *sources) for v, slopes in self.slopes(record)]
            progress.record, self.checked_in = record, self.module.training
            for i, (name, (value, slopes)) in enumerate(zip(self.names, self.slopes(record), strict=True)):
                self.memory.leave(name, value, _Reading(self, running, i, value, slopes, sources))
            graph = torch.is_grad_enabled()
            return running.put_out(spikes[0], (running.window, self.name), rate, self.name, graph, count=count)

    def _check_set(self, left: tuple, first: bool = False) -> None:
        """Raises UnsupportedModuleError where memory was set, since a step ``left`` it, to what needs a gradient."""
        for name, value in zip(self.names, self.plain_memory(), strict=True):
            made = getattr(value, "_mark", None) is not None
            if (
                isinstance(value, Tensor)
                and not any(value is x for x in left)
                and (made or (value.requires_grad and not first))
            ):
                raise self.unsupported(
                    f"its {name} is set between two steps to what needs a gradient, which would not come: set a "
                    "constant, or use step mode 'm'"
                )

    def _go_on(self, progress: "_Progress") -> list[Tensor | float]:
        """The memory that the window before has left, with its graph, or what was set since, a constant."""
        now = zip(self.plain_memory(), progress.record.state.memory, progress.ends, strict=True)
        return [end if value is kept else torch.as_tensor(value).detach().expand_as(end) for value, kept, end in now]


def _as_it_is(state: NeuronState, memory: tuple[Tensor | float, ...]) -> NeuronState:
    """``state``, but with what was set since the step: constants, on which no earlier step has an influence."""
    kept = [old is new or not isinstance(old, Tensor) for old, new in zip(state.memory, memory, strict=True)]
    values = [
        old if same else new.detach() if isinstance(new, Tensor) else torch.full_like(old, new)
        for old, new, same in zip(state.memory, memory, kept, strict=True)
    ]
    zero = lambda slope: torch.zeros_like(slope) if isinstance(slope, Tensor) else 0.0  # noqa: E731
    slopes = [
        tuple(slope if same else zero(slope) for slope, same in zip(of_source, kept, strict=True))
        for of_source in state.memory_slopes
    ]
    return state if all(kept) else NeuronState(tuple(values), tuple(slopes))


class _Reading:
    """How a state variable is read after a step, until the next: the value with its gradient.

    In the call the mean over the window's steps, as of any value; afterwards that of this very step.
    """

    def __init__(
        self, neurons: Neurons, run: Any, i: int, value: Tensor, slopes: tuple[Tensor | float, ...],
        sources: list[Tensor] | None,
    ):  # fmt: skip
        """Of the i-th, ``value`` with its ``slopes``; ``sources``: in the graph, in the call that ends the window."""
        self.run, self.step, self.name = run, run.step, f"{neurons.name}.{neurons.names[i]}"
        self.value, self.slopes, self.sources = value, slopes, sources
        parameters = [owner._parameters[name] for owner, name in learnable_parameters(neurons.module)]
        self.shapes = [value, *parameters, *[value] * (len(slopes) - 1 - len(parameters))]
        self.places = [(run.window, neurons.name, "source", j) for j in range(len(slopes))]
        for place, source in zip(self.places, sources or (), strict=False):
            run.deferred.resolve(place, source)

    def __call__(self, value: Tensor) -> Tensor:
        if not self.run.entered:
            return self.exactly()
        with _pop_mode_temporarily():
            if self.run.step > self.step:
                y = self.exactly()
                y._mark = Mark(self.run, EARLIER, (0,), f"{self.name}, read before the neuron has run")
                return y
            return self._within_this_call()

    def exactly(self) -> Tensor:
        """After the call: the state after that step, its input taken for constant over the window's steps."""
        deferred = self.run.deferred
        of = [deferred.of(p, x.new_zeros(()).expand(x.shape)) for p, x in zip(self.places, self.shapes, strict=True)]
        return Linearised.apply((self.value,), self.slopes, *of)

    def _within_this_call(self) -> Tensor:
        """As any other value of a step, of which the rate is the mean over the steps of the window."""
        run, value = self.run, self.value
        place = run.place(f"{self.name} (read)", [])
        slopes = [torch.as_tensor(slope, dtype=value.dtype, device=value.device) for slope in self.slopes]
        run.record(place, tuple(x / run.steps for x in (value, *slopes)), _sums)
        rate = None
        if self.sources is not None:
            mean, *mean_slopes = run.records_of(place)
            rate = Linearised.apply((mean,), tuple(mean_slopes), *self.sources)
        y = run.put_out(value.data, (*place, 0), rate, self.name, torch.is_grad_enabled())
        y._exactly = self.exactly
        return y


def _sums(earlier: tuple | None, record: tuple) -> tuple:
    return record if earlier is None else tuple(x + y for x, y in zip(earlier, record, strict=True))
