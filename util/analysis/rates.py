"""Firing rates: spikes per neuron, by layer and time step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..train.evaluation import evaluate
from ..train.meter import in_double, neuron_layers
from ..train.setup import Setup
from .report import Row, colors, name_layers, picture


def measure(setup: Setup) -> list[Row]:
    """A row a layer and time step (from 1), over the test samples. ``setup``: its network in step mode 'm'."""
    sums: dict[str, Tensor] = {}
    neurons: dict[str, int] = {}  # of all samples together

    def count(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:  # out: [T, B, ...]
            sums[name] = sums.get(name, 0) + in_double(out.flatten(1).sum(1))
            neurons[name] = neurons.get(name, 0) + out[0].numel()

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in neuron_layers(setup.net).items()]
    try:
        evaluate(setup.net, setup.method, setup.precision, setup.test_loader, setup.device)
    finally:
        for handle in handles:
            handle.remove()
    return [
        {"layer": name, "step": step, "rate": total / neurons[name]}
        for name in sums
        for step, total in enumerate(sums[name].tolist(), 1)
    ]


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Layers over steps as a map, and a curve a step over the layers. Raises OSError."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    steps = list(dict.fromkeys(row["step"] for row in rows))
    rates = torch.tensor([row["rate"] for row in rows]).view(len(layers), len(steps)).numpy()
    with picture(file, title, columns=2, size=(12, max(4.5, 1.5 + 0.25 * len(layers)))) as ((left, right),):
        shown = left.imshow(rates, aspect="auto", cmap="magma", vmin=0)
        left.figure.colorbar(shown, ax=left, label="spikes per neuron and time step")
        left.set_xticks(range(len(steps)), steps)
        left.set_yticks(range(len(layers)), layers, fontsize=7)
        left.set_xlabel("time step")
        left.set_ylabel("neuron layer, from input to output")
        color = colors(steps)
        for i, step in enumerate(steps):
            right.plot(rates[:, i], marker=".", color=color[step], label=f"t = {step}")
        right.set_ylim(bottom=0)
        right.set_ylabel("spikes per neuron")
        name_layers(right, layers, "neuron layer, from input to output")
        right.legend(fontsize=7)
