"""Accuracy with the time steps of the spikes between layers in another order: what the network knows by timing."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..train.evaluation import evaluate
from ..train.meter import neuron_layers
from ..train.setup import Setup
from .report import Row, name_layers, picture


@contextmanager
def shuffled(layers: Iterable[nn.Module], generator: torch.Generator) -> Iterator[None]:
    """Within, these layers put out their spikes [T, B, ...] with the steps permuted.

    The permutation is drawn anew for each call of each layer; it is the same for all neurons and samples.
    """

    def permute(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out[torch.randperm(len(out), generator=generator)]

    handles = [layer.register_forward_hook(permute) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(setup: Setup, repeats: int, seed: int) -> list[Row]:
    """Test accuracy in percent: as trained, with one layer's spikes permuted, and with those of all layers.

    Args:
        setup: its network in step mode 'm'.
        repeats: permutations drawn for each row; ``accuracy`` is their mean, ``std`` their standard deviation.
    """
    layers = neuron_layers(setup.net)
    cases = {"none": [], **{name: [layer] for name, layer in layers.items()}, "all": list(layers.values())}
    generator, rows = torch.Generator().manual_seed(seed), []
    for name, chosen in cases.items():
        found = []
        for _ in range(repeats if chosen else 1):
            with shuffled(chosen, generator):
                meter = evaluate(setup.net, setup.method, setup.precision, setup.test_loader, setup.device)
            found.append(meter.top1)
        accuracy = statistics.mean(found)
        before = rows[0]["accuracy"] if rows else accuracy
        rows.append({"shuffled": name, "accuracy": accuracy, "std": statistics.pstdev(found),
                     "change": accuracy - before, "repeats": len(found)})  # fmt: skip
    return rows


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Raises OSError."""
    before, *others = rows
    with picture(file, title) as ((axes,),):
        places = range(len(others))
        tops = [row["accuracy"] for row in others]
        lowest = min([before["accuracy"], *tops])
        low = max(0, lowest - max(4, 0.6 * (100 - lowest)))
        axes.bar(places, tops, yerr=[row["std"] for row in others], color="#2b6cb0", width=0.6, capsize=3)
        axes.axhline(before["accuracy"], color="#c05621", lw=1.2, label=f"not shuffled: {before['accuracy']:.2f} %")
        for place, top in zip(places, tops, strict=True):
            axes.annotate(f"{top:.1f}", (place, low), (0, 3), textcoords="offset points", ha="center", color="white")
        axes.set_ylim(low, max([before["accuracy"], *tops]) + 3)
        axes.set_ylabel("test accuracy in percent")
        name_layers(axes, [row["shuffled"] for row in others], "layer whose spikes are permuted over time")
        axes.legend(fontsize=8, loc="upper left")
