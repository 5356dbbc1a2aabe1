"""A neuron layer in step mode 'm': all T steps of a call, window by window."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from .draws import generator_state, set_generator_state
from .dynamics import Differentiated, NotElementwiseError
from .eligibility import NeuronRecord
from .function import Linearised
from .neurons import Neurons
from .rated import mean_of_steps, rated, with_rate


class MultiStepNeurons(Neurons):
    """The stand-in of one neuron layer's ``multi_step_forward``."""

    STEP = "multi_step_forward"

    def step(self, *args, **kwargs) -> Tensor:
        """[T, B, ...] -> the spikes, with their rate."""
        running, (x, *others) = self.hooks.running, (*args, *kwargs.values())
        if running is None or self.runs_as_bptt or others:
            return self.original(*args, **kwargs)
        running.enter(self, x)
        steps = min(len(x), self.setting.time_step // self.setting.windows)
        if len(x) % steps:  # of equal windows, as long as elsewhere
            return self.original(x)
        before = dict(vars(self.module)), dict(self.memory)  # what steps may change
        with _pop_mode_temporarily():
            try:
                return self._steps_of_windows(x, steps, before)
            except NotElementwiseError:
                self.runs_as_bptt = True
        self._put_back(before)
        return self.original(x)

    def _steps_of_windows(self, x: Tensor, steps: int, before: tuple) -> Tensor:
        """Raises NotElementwiseError."""
        expected = None if self.checked else self._own_steps(x.detach(), before)
        tag, windows = rated(x), len(x) // steps
        fits = tag is not None and tag.dim == 0 and len(tag.rate) == tag.windows == windows
        current = tag.rate if fits else mean_of_steps(x, steps, windows)  # [K, B, ...], with a graph
        starts, found = self.starts(x[0]), []
        currents = (current,) if windows == 1 else current.split(1)
        for part, of_window in zip(x.detach().chunk(windows), currents, strict=True):
            record, spikes = self.steps(part, self.record(starts, windows > 1))
            sources = self.sources(of_window, starts, record)
            found.append((spikes, *self.rate(record, sources, steps, spikes.dtype)))
            starts = self._leave(record, sources, windows > 1)
        spikes, rate, count = (
            of[0] if windows == 1 or of[0] is None else torch.cat(of) for of in zip(*found, strict=True)
        )
        if expected is not None and not torch.allclose(expected.view_as(spikes).to(spikes.dtype), spikes):
            raise NotElementwiseError("its multi-step forward is not its single step repeated, or is random")
        self.checked_in = self.module.training
        return with_rate(spikes, rate, 0, windows, count)

    def _leave(self, record: NeuronRecord, sources: list[Tensor], follow: bool) -> list[Tensor]:
        """Puts the memory that a window leaves where it is read, and returns it, for the next window with a graph."""
        ends = []
        for name, (value, slopes) in zip(self.names, self.slopes(record), strict=True):

            def with_graph(value: Tensor, slopes: tuple = slopes) -> Tensor:
                return Linearised.apply((value,), slopes, *sources)

            self.memory.leave(name, value, with_graph)
            ends.append(with_graph(value) if follow else value)
        return ends

    def _put_back(self, snapshot: tuple[dict[str, Any], dict[str, Any]]) -> None:
        attributes, memory = snapshot
        vars(self.module).clear()
        vars(self.module).update(attributes)
        self.memory.forget()
        self.memory.update(memory)

    @torch.no_grad()
    def _own_steps(self, currents: Tensor, before: tuple) -> Tensor | None:
        """What a neuron without a closed form itself makes of all steps at once. Raises NotElementwiseError."""
        if not isinstance(self.dynamics(check=True), Differentiated):
            return None
        drawn = generator_state([currents])
        spikes = self.stand_ins[0].original(currents)
        self._put_back(before)
        set_generator_state(drawn, [currents])
        if not isinstance(spikes, Tensor) or spikes.numel() != currents.numel():
            raise NotElementwiseError("it puts out no tensor of its input's shape")
        return spikes
