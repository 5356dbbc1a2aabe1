"""What is measured while training: loss, accuracy, speed, memory, and how often each neuron layer fires."""

import operator
import sys
import time
from typing import Any, NamedTuple

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from tqdm import tqdm

from ..rate.rated import rated
from .distributed import ONE_PROCESS, Processes

try:
    import resource
except ImportError:  # Windows
    resource = None

_REFRESH_SECONDS = 0.5


def in_double(x: Tensor) -> Tensor:
    """``x`` in float64, on its device where that has the type for certain, else on the CPU."""
    return x.to(_double_device(x.device)).double()


def _double_device(device: torch.device) -> torch.device:
    """MPS has no float64, and not every XPU."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


class Meter:
    """Running means over batches. Sums stay on the device: reading them waits for the GPU, so `show` does it rarely.

    They are of this process's samples until `stop` adds up those of all.
    """

    def __init__(self, device: torch.device, processes: Processes = ONE_PROCESS):
        self._sums = torch.zeros(3, dtype=torch.float64, device=_double_device(device))
        self._count = 0
        self._processes = processes
        self._totals: tuple[Tensor, int] | None = None
        self._before = 0.0  # seconds of an earlier process
        self._started = self._shown = time.perf_counter()
        self._seconds: float | None = None

    def start(self) -> None:
        """Makes the time count from now."""
        self._started = self._shown = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        sums, count = self._of_all()
        return {"sums": sums.to("cpu", copy=True), "count": count, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = float(state["seconds"])
        if self._processes.first:
            self._sums.copy_(state["sums"])
            self._count = int(state["count"])

    def _of_all(self) -> tuple[Tensor, int]:
        if self._processes.size == 1:
            return self._sums, self._count
        total = self._processes.sum(torch.cat([self._sums, self._sums.new_tensor([self._count])]))
        return total[:-1], int(total[-1].item())

    def add(self, loss: Tensor, out: Tensor, target: Tensor) -> None:
        """``loss``: mean over the batch; ``out``: [B, classes]; ``target``: [B]."""
        top5 = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]  # [B, 5], best first
        batch = torch.stack([loss * len(target), top5[:, 0].sum(), top5.sum()])
        self._sums += in_double(batch)
        self._count += len(target)

    def show(self, bar: tqdm) -> None:
        """Puts loss, accuracy and images/s behind the progress bar, at most twice a second."""
        now = time.perf_counter()
        if not bar.disable and now - self._shown > _REFRESH_SECONDS:
            self._shown = now
            bar.set_postfix_str(f"loss {self.loss:.4f}, acc {self.top1:.2f} %, {self.images_per_second:.0f} images/s")

    def stop(self) -> "Meter":
        """Ends the time over which images/s is taken, all work on the device included."""
        self._totals = self._of_all()
        self._totals[0].cpu()
        self._seconds = self.seconds
        return self

    @property
    def seconds(self) -> float:
        """From the making or the start of the meter to its stop, or to now."""
        return self._seconds or self._before + time.perf_counter() - self._started

    def _mean(self, i: int) -> float:
        sums, count = self._totals or (self._sums, self._count)
        return sums[i].item() / max(count, 1)

    @property
    def loss(self) -> float:
        return self._mean(0)

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * self._mean(1)

    @property
    def top5(self) -> float:
        return 100 * self._mean(2)

    @property
    def images_per_second(self) -> float:
        _, count = self._totals or (None, self._count * self._processes.size)
        return count / self.seconds

    def scalars(self) -> dict[str, float]:
        """TensorBoard tags -> values."""
        return {"loss": self.loss, "accuracy/top1": self.top1, "accuracy/top5": self.top5}


class TestMeter(Meter):
    """Knows too whether all predictions are the same."""

    __test__ = False  # no test of pytest's

    def __init__(self, device: torch.device, processes: Processes = ONE_PROCESS):
        super().__init__(device, processes)
        self._ends = torch.full((2,), -(2**31), device=device)  # of labels predicted: the largest, minus the smallest

    def add(self, loss: Tensor, out: Tensor, target: Tensor) -> None:
        super().add(loss, out, target)
        predicted = out.argmax(1)
        self._ends = torch.maximum(self._ends, torch.stack([predicted.max(), -predicted.min()]))

    def only_prediction(self) -> int | None:
        """The label that all samples got, of all processes, if it is one."""
        largest, smallest = (self._processes.largest(end) for end in self._ends.tolist())
        return largest if largest == -smallest else None


class ClassMeter(TestMeter):
    """Counts by class too."""

    def __init__(self, device: torch.device, num_classes: int, processes: Processes = ONE_PROCESS):
        super().__init__(device, processes)
        self._by_class = torch.zeros(2, num_classes, dtype=torch.long, device=device)  # correct ones, all

    def add(self, loss: Tensor, out: Tensor, target: Tensor) -> None:
        super().add(loss, out, target)
        for counts, labels in zip(self._by_class, (target[out.argmax(1) == target], target), strict=True):
            counts += torch.bincount(labels, minlength=len(counts))

    def by_class(self) -> list[tuple[float | None, int]]:
        """Of each class: accuracy in percent, None where there is no sample of it, and the number of samples."""
        counts = self._processes.sum(self._by_class)
        return [(100 * right / count if count else None, count) for right, count in counts.t().tolist()]


def neuron_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The spiking neurons of ``net`` by name, in the order of its modules."""
    kinds = tuple(getattr(neuron, name) for name in ("BaseNode", "SimpleBaseNode") if hasattr(neuron, name))
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


class Fired(NamedTuple):
    """Of each neuron layer, in the order of `neuron_layers`: spikes, and neurons times the steps they were seen at."""

    spikes: Tensor  # [layers]
    neurons: tuple[int, ...]


class _Seen(NamedTuple):
    """Of one forward of a layer: ``spikes * times`` spikes of so many neurons times steps."""

    layer: str
    spikes: Tensor
    times: int
    neurons: int


class FiringRates:
    """The mean firing rate of each neuron layer over what is seen in training, or in evaluation, within the context.

    Of rate-based training in step mode 'm' rates are read, of one step's size, not spikes. What `state_dict` and
    `by_layer` tell is of the samples of all processes.
    """

    def __init__(self, net: nn.Module, processes: Processes = ONE_PROCESS, training: bool = True, graph: bool = False):
        """``graph``: whether `mean` is to have one."""
        self._processes, self._training, self._graph = processes, training, graph
        self._layers = neuron_layers(net)
        device = _double_device(next((p.device for p in net.parameters()), torch.device("cpu")))
        self._total = Fired(
            torch.zeros(len(self._layers), dtype=torch.float64, device=device), (0,) * len(self._layers)
        )
        self._latest: list[_Seen] = []  # not yet in the total
        self._of_mean: list[_Seen] = []  # not yet in a `mean`

    def __enter__(self) -> "FiringRates":
        def count(name: str):
            def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
                if module.training == self._training:
                    self._count(name, module.step_mode, out)

            return hook

        self._handles = [module.register_forward_hook(count(name)) for name, module in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _count(self, name: str, step_mode: str, out: Tensor) -> None:
        graph = self._graph and torch.is_grad_enabled()
        tag = rated(out) if step_mode == "m" else None
        x = out if tag is None else tag.rate if graph or tag.count is None else tag.count
        times = tag.steps(out) if tag is not None and x is tag.rate else 1
        x = x if graph else x.detach()
        seen = _Seen(name, x.sum(dtype=torch.promote_types(x.dtype, torch.float32)), times, out.numel())
        self._latest.append(seen)
        if graph:
            self._of_mean.append(seen)

    def mean(self) -> Tensor:
        """Spikes per neuron and step of what was seen with gradients enabled since the last call, with a graph."""
        seen, self._of_mean = self._of_mean, []
        return sum(x.spikes * x.times for x in seen) / max(1, sum(x.neurons for x in seen))

    def take(self) -> Fired | None:
        """What was seen since the last call, and is not counted unless it is handed to `add`."""
        latest, self._latest = self._latest, []
        if not latest:
            return None
        zero = torch.zeros_like(self._total.spikes[0])
        spikes, neurons = dict.fromkeys(self._layers, zero), dict.fromkeys(self._layers, 0)
        for seen in latest:
            spikes[seen.layer] = spikes[seen.layer] + in_double(seen.spikes.detach()) * seen.times
            neurons[seen.layer] += seen.neurons
        return Fired(torch.stack(list(spikes.values())), tuple(neurons.values()))

    def add(self, fired: Fired | None) -> None:
        if fired is not None:
            neurons = tuple(map(operator.add, self._total.neurons, fired.neurons))
            self._total = Fired(self._total.spikes + fired.spikes, neurons)

    def state_dict(self) -> dict[str, Any]:
        spikes, neurons = self._of_all()
        sums = {name: total for name, total, n in zip(self._layers, spikes.cpu(), neurons, strict=True) if n}
        return {"sums": sums, "neurons": dict(zip(self._layers, neurons, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["neurons"].keys() != self._layers.keys():
            raise ValueError("its firing rates are of other layers")
        if not self._processes.first:
            return
        sums = [
            in_double(state["sums"].get(name, torch.zeros(()))).to(self._total.spikes.device) for name in self._layers
        ]
        spikes = torch.stack(sums) if sums else self._total.spikes
        self._latest, self._total = [], Fired(spikes, tuple(int(state["neurons"][name]) for name in self._layers))

    def silent(self) -> list[str]:
        """The layers that were seen and never fired."""
        spikes, neurons = self._of_all()
        return [name for name, total, n in zip(self._layers, spikes.tolist(), neurons, strict=True) if n and total == 0]

    def by_layer(self) -> dict[str, float]:
        """Layer -> spikes per neuron and time step, between 0 and 1."""
        spikes, neurons = self._of_all()
        return {name: total / n for name, total, n in zip(self._layers, spikes.tolist(), neurons, strict=True) if n}

    def _of_all(self) -> Fired:
        """Of all processes together."""
        self.add(self.take())
        if self._processes.size == 1:
            return self._total
        spikes, neurons = self._total
        total = self._processes.sum(torch.stack([spikes, spikes.new_tensor(neurons)]))  # [2, layers]
        return Fired(total[0], tuple(map(int, total[1].tolist())))


def peak_memory_bytes(device: torch.device) -> int:
    """So far: on a GPU the most that PyTorch had allocated, elsewhere that the process had resident; 0 if untold."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
