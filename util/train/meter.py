"""What is measured while training: loss, accuracy, speed, memory, and how often each neuron layer fires."""

import resource
import sys
import time
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from tqdm import tqdm

from .distributed import ONE_PROCESS, Processes

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

    def scalars(self, split: str) -> dict[str, float]:
        """TensorBoard tags -> values."""
        return {f"loss/{split}": self.loss, f"top1/{split}": self.top1, f"top5/{split}": self.top5}


def neuron_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The spiking neurons of ``net`` by name, in the order of its modules."""
    kinds = tuple(getattr(neuron, name) for name in ("BaseNode", "SimpleBaseNode") if hasattr(neuron, name))
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


class FiringRates:
    """The mean firing rate of each neuron layer over the training batches seen while the context is open.

    Of rate-based training the spiking steps alone are seen: hooks that only look run in no other pass. What is read of
    them is of the samples of all processes.
    """

    def __init__(self, net: nn.Module, processes: Processes = ONE_PROCESS):
        self._processes = processes
        self._layers = neuron_layers(net)
        self._device = _double_device(next((p.device for p in net.parameters()), torch.device("cpu")))
        self._sums: dict[str, Tensor] = {}
        self._neurons = dict.fromkeys(self._layers, 0)  # times the steps they were seen at

    def __enter__(self) -> "FiringRates":
        def count(name: str):
            def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
                if module.training:
                    self._sums[name] = self._sums.get(name, 0) + in_double(out.detach().sum())
                    self._neurons[name] += out.numel()

            return hook

        self._handles = [module.register_forward_hook(count(name)) for name, module in self._layers.items()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        sums, neurons = self._of_all()
        return {"sums": {name: value.cpu() for name, value in sums.items()}, "neurons": neurons}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["neurons"].keys() != self._neurons.keys():
            raise ValueError("its firing rates are of other layers")
        if not self._processes.first:
            return
        self._sums = {name: in_double(value) for name, value in state["sums"].items()}
        self._neurons = {name: int(count) for name, count in state["neurons"].items()}

    def silent(self) -> list[str]:
        """The layers that were seen and never fired."""
        return [name for name, total in self._of_all()[0].items() if total.item() == 0]

    def scalars(self) -> dict[str, float]:
        """TensorBoard tag -> spikes per neuron and time step, between 0 and 1."""
        sums, neurons = self._of_all()
        return {f"firing_rate/{name}": sums[name].item() / n for name, n in neurons.items() if n}

    def _of_all(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Sums and numbers of neurons, of all processes together; layers that none has seen have no sum."""
        if self._processes.size == 1:
            return self._sums, dict(self._neurons)
        pairs = [(self._sums.get(name, 0.0), count) for name, count in self._neurons.items()]
        own = torch.tensor(pairs, dtype=torch.float64, device=self._device).reshape(-1, 2)
        total = self._processes.sum(own)
        neurons = {name: int(count) for name, count in zip(self._neurons, total[:, 1].tolist(), strict=True)}
        return {name: total[i, 0] for i, (name, count) in enumerate(neurons.items()) if count}, neurons


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that PyTorch had allocated, elsewhere the most that the process had resident, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
