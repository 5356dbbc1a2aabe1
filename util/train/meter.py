"""What is measured while training: loss, accuracy, speed, memory, and how often each neuron layer fires."""

import resource
import sys
import time
from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from tqdm import tqdm

_REFRESH_SECONDS = 0.5


def in_double(x: Tensor) -> Tensor:
    """``x`` in float64, on its device where that has the type for certain, else on the CPU."""
    return x.to(_double_device(x.device)).double()


def _double_device(device: torch.device) -> torch.device:
    """MPS has no float64, and not every XPU."""
    return device if device.type in ("cpu", "cuda") else torch.device("cpu")


class Meter:
    """Running means over batches. Sums stay on the device: reading them waits for the GPU, so `show` does it rarely."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(3, dtype=torch.float64, device=_double_device(device))
        self._count = 0
        self._before = 0.0  # seconds of an earlier process
        self._started = self._shown = time.perf_counter()
        self._seconds: float | None = None

    def start(self) -> None:
        """Makes the time count from now."""
        self._started = self._shown = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums.to("cpu", copy=True), "count": self._count, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums.copy_(state["sums"])
        self._count, self._before = int(state["count"]), float(state["seconds"])

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
        self._sums.cpu()
        self._seconds = self.seconds
        return self

    @property
    def seconds(self) -> float:
        """From the making or the start of the meter to its stop, or to now."""
        return self._seconds or self._before + time.perf_counter() - self._started

    def _mean(self, i: int) -> float:
        return self._sums[i].item() / max(self._count, 1)

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
        return self._count / self.seconds

    def scalars(self, split: str) -> dict[str, float]:
        """TensorBoard tags -> values."""
        return {f"loss/{split}": self.loss, f"top1/{split}": self.top1, f"top5/{split}": self.top5}


def neuron_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The spiking neurons of ``net`` by name, in the order of its modules."""
    kinds = tuple(getattr(neuron, name) for name in ("BaseNode", "SimpleBaseNode") if hasattr(neuron, name))
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


class FiringRates:
    """The mean firing rate of each neuron layer over the training batches seen while the context is open.

    Of rate-based training the spiking steps alone are seen: hooks that only look run in no other pass.
    """

    def __init__(self, net: nn.Module):
        self._layers = neuron_layers(net)
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
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "neurons": dict(self._neurons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["neurons"].keys() != self._neurons.keys():
            raise ValueError("its firing rates are of other layers")
        self._sums = {name: in_double(value) for name, value in state["sums"].items()}
        self._neurons = {name: int(count) for name, count in state["neurons"].items()}

    def silent(self) -> list[str]:
        """The layers that were seen and never fired."""
        return [name for name, total in self._sums.items() if total.item() == 0]

    def scalars(self) -> dict[str, float]:
        """TensorBoard tag -> spikes per neuron and time step, between 0 and 1."""
        return {f"firing_rate/{name}": self._sums[name].item() / n for name, n in self._neurons.items() if n}


def peak_memory_bytes(device: torch.device) -> int:
    """On a GPU the most that PyTorch had allocated, elsewhere the most that the process had resident, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
