"""A function of tensors recorded as a CUDA graph and replayed: what Python and launches cost is paid once."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


@dataclass
class _Recording:
    inputs: list[Tensor]  # read by each replay
    results: Any  # written by it
    gradients: list[Tensor | None]  # likewise, of the parameters
    replay: Callable[[], None]


class Graphed:
    """``function``, which runs as it is until tensors of the same shapes have come ``WARM_UP`` times, then as a graph.

    The results of a replay are the tensors that the last one has returned, with other values; what else is in them is
    of the recording. What the function does to tensors that live on, such as running statistics, a replay does too;
    what it does in Python, it does not. A function that computes gradients finds none in the parameters.

    Where it cannot be recorded, as where it waits for the GPU, it goes on running as it is, and a warning says so.
    """

    WARM_UP = 3

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        recorder: "Recorder | None",
        parameters: Iterable[nn.Parameter] = (),
    ):
        """``recorder``: None runs the function as it is; ``parameters``: whose gradients it computes."""
        self._function, self._device, self._parameters = function, device, list(parameters)
        self._recorder = recorder
        self._recordings: dict[tuple, _Recording] = {}
        self._calls: Counter[tuple] = Counter()

    def __call__(self, *inputs: Tensor) -> Any:
        """``inputs``: on the device, or on their way to it."""
        if self._recorder is None:
            return self._function(*self._moved(inputs))
        kind = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        self._calls[kind] += 1
        if self._calls[kind] <= self.WARM_UP:
            return self._recorder.beside(lambda: self._function(*self._moved(inputs)))
        recording = self._recordings.get(kind) or self._recorded(kind, inputs)
        if recording is None:
            return self._function(*self._moved(inputs))
        for place, x in zip(recording.inputs, inputs, strict=True):
            place.copy_(x, non_blocking=True)
        recording.replay()
        for p, gradient in zip(self._parameters, recording.gradients, strict=True):
            p.grad = gradient
        return recording.results

    def _moved(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        return [x.to(self._device, non_blocking=True) for x in inputs]

    def _recorded(self, kind: tuple, inputs: Iterable[Tensor]) -> _Recording | None:
        self._forget_gradients()
        places = [x.to(self._device, copy=True) for x in inputs]
        try:
            replay, results = self._recorder.record(lambda: self._function(*places))
        except RuntimeError as error:
            self._recorder, self._recordings = None, {}
            self._forget_gradients()
            logger.warning(f"no CUDA graph ({str(error).splitlines()[0]}): running without it")
            return None
        self._recordings[kind] = _Recording(places, results, [p.grad for p in self._parameters], replay)
        return self._recordings[kind]

    def _forget_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None


class Recorder:
    """Records graphs that share their memory, all of whose replays follow one another."""

    @classmethod
    def of(cls, device: torch.device) -> "Recorder | None":
        """None where there are no CUDA graphs."""
        return cls(device) if device.type == "cuda" else None

    def __init__(self, device: torch.device):
        self._device, self._pool = device, None
        self._stream = torch.cuda.Stream(device)

    def beside(self, function: Callable[[], Any]) -> Any:
        """``function()`` on the stream that graphs are recorded on, as its first calls must be."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = function()
        current.wait_stream(self._stream)
        return results

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays ``function()``, which is not run here, and its results."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: that which pins memory for the loader.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = function()
        self._pool = graph.pool()
        return graph.replay, results
