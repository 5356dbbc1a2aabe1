"""Rate-based gradients beside BPTT's, layer by layer, on SpikingJelly's networks, before and after some training.

python doc/gradient_agreement.py                 all networks (about half an hour on one CPU core)
python doc/gradient_agreement.py CIFAR10Net      some of them, printed only

Writes doc/gradient_agreement.md and .csv, gradient_cosine.png and gradient_norm.png. Data: scikit-learn's digits as
images (the same at every step) of the size each network wants, or, for event cameras, as recordings (DIGITS_DVS).
"""

import csv
import platform
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model import resnet18
from model.layer import lif
from tests.rate.zoo import ZOO, Zoo
from util.data import load_dataset
from util.dataset.event_data import load_event_dataset
from util.rate.check import compare_gradients
from util.util import detach, rate_model_setting

STEPS = (2, 4, 8)
TRAIN_T, TRAIN_BATCH, UPDATES, LEARNING_RATE, BATCH = 4, 16, 100, 1e-3, 8
STAGES = ("at initialisation", f"after {UPDATES} updates")
IF = {"spiking_neuron": neuron.IFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}
LIF = {"spiking_neuron": lif}
NETWORKS = {name: zoo for name, zoo in ZOO.items() if name != "MNISTNet"} | {
    "spiking_resnet18, IFNode": Zoo(partial(spiking_resnet.spiking_resnet18, num_classes=10, **IF)),
    "spiking_resnet18, the paper's LIF": Zoo(
        partial(spiking_resnet.spiking_resnet18, num_classes=10, spiking_neuron=lif)
    ),
    "resnet18 of this project": Zoo(partial(resnet18, num_classes=10)),
}
INTRODUCTION = f"""\
# Rate-based gradients beside BPTT's

Gradients of the cross-entropy of the time-averaged output, both in float64, on the same weights and a batch of
{BATCH} training samples, in step mode `m`: the cosine between the two and the norm of the rate-based one over BPTT's,
of all parameters together; then the lowest cosine of a single layer's weights at T = {STEPS[-1]}. The {UPDATES} updates
are rate-based ones of Adam (learning rate {LEARNING_RATE}, T = {TRAIN_T}, batch {TRAIN_BATCH}); the loss is the mean of
the last ten. The scripts' scaling of the gradient by 1/T is not in it.

Layer by layer: [cosines](gradient_cosine.png), [norms](gradient_norm.png),
[numbers](gradient_agreement.csv).

Made by `python doc/gradient_agreement.py` ({{made}}).
Neurons, where none is named: SpikingJelly's LIFNode with its own defaults (tau = 2, decayed input, hard reset), ATan
surrogate, detached reset.

"""


@cache
def samples(events: bool) -> tuple[Tensor, Tensor]:
    """[N, T, C, H, W] and [N]: all training samples; images have T = 1."""
    if events:
        data = load_event_dataset("DIGITS_DVS", None, max(STEPS), augment=False)[0]
    else:
        data = load_dataset("DIGITS", None, 32, False, False)[0]
    x, y = zip(*(data[i] for i in range(len(data))), strict=True)
    x = torch.stack(x)
    return x if events else x.unsqueeze(1), torch.tensor(y)


def batch(zoo: Zoo, time_step: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """[T, B, channels, size, size] as the network wants it, and the labels [B]."""
    x, y = samples(events=zoo.channels == 2)
    x = x[indices].transpose(0, 1)  # [8 or 1, B, C, H, W]
    x = _steps(x, time_step, zoo.channels)
    x = F.interpolate(x.flatten(0, 1), zoo.size, mode="bilinear").unflatten(0, (time_step, -1))
    return x.transpose(0, zoo.time_dim).contiguous(), y[indices]


def _steps(x: Tensor, time_step: int, channels: int) -> Tensor:
    if len(x) == 1:
        return x.expand(time_step, -1, channels, -1, -1)
    return x.unflatten(0, (time_step, -1)).sum(1)  # as if the events had been integrated into fewer frames


def train(net: nn.Module, zoo: Zoo) -> float:
    """Rate-based; returns the mean loss of the last ten updates."""
    rate_model_setting(net, TRAIN_T, "m", time_dim=zoo.time_dim)
    optimizer = torch.optim.Adam(net.parameters(), LEARNING_RATE)
    order, losses = torch.randperm(len(samples(zoo.channels == 2)[1])), []
    for i in range(UPDATES):
        functional.reset_net(net)
        x, y = batch(zoo, TRAIN_T, order[(torch.arange(TRAIN_BATCH) + i * TRAIN_BATCH) % len(order)])
        out = net(x)
        loss = F.cross_entropy(out if out.dim() == 2 else out.mean(0), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    functional.reset_net(net)
    detach(net)
    return sum(losses[-10:]) / 10


def measure(name: str) -> Iterator[dict]:
    """One row for each stage, T and layer's weight ("" for all parameters together)."""
    zoo = NETWORKS[name]
    torch.manual_seed(0)
    net = zoo.make()
    for stage in STAGES:
        loss = train(net, zoo) if stage == STAGES[1] else float("nan")
        matrices = {parameter for parameter, p in net.named_parameters() if p.dim() > 1}
        for time_step in STEPS:
            x, y = batch(zoo, time_step, torch.arange(BATCH))
            found = compare_gradients(net, x, y, "m", time_dim=zoo.time_dim)
            for parameter, (cosine, ratio) in found.items():
                if parameter in matrices or not parameter:
                    yield {
                        "network": name, "stage": stage, "T": time_step, "parameter": parameter,
                        "layer": parameter in matrices, "cosine": cosine, "norm_ratio": ratio, "loss": loss,
                    }  # fmt: skip
            print(f"{name}, {stage}, T = {time_step}: cosine {found[''][0]:.3f}, norm {found[''][1]:.2f}", flush=True)


def table(rows: list[dict]) -> list[str]:
    lines = [
        f"| network | weights | {' | '.join(f'cosine T={t}' for t in STEPS)} | "
        f"{' | '.join(f'norm T={t}' for t in STEPS)} | lowest layer, T={STEPS[-1]} | loss |",
        f"| --- | --- |{' --- |' * (2 * len(STEPS) + 2)}",
    ]
    for name in NETWORKS:
        for stage in STAGES:
            own = [row for row in rows if row["network"] == name and row["stage"] == stage]
            whole = {row["T"]: row for row in own if not row["parameter"]}
            layers = [row for row in own if row["T"] == STEPS[-1] and row["layer"]]
            worst = min(layers, key=lambda row: row["cosine"], default=None)  # None: no gradient reaches a layer
            cells = [f"{whole[t]['cosine']:.2f}" for t in STEPS] + [f"{whole[t]['norm_ratio']:.2f}" for t in STEPS]
            loss = "" if stage == STAGES[0] else f"{own[0]['loss']:.2f}"
            lowest = f"{worst['cosine']:.2f} `{worst['parameter']}`" if worst else "no spike, no gradient"
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} | {lowest} | {loss} |")
    return lines


def plot(rows: list[dict], quantity: str, label: str, path: Path) -> None:
    """A panel a network: layers from input to output, a colour a T, dashed before and solid after training."""
    figure, grid = plt.subplots(-(-len(NETWORKS) // 3), 3, figsize=(12, 2.6 * -(-len(NETWORKS) // 3)), sharey=True)
    for axes, name in zip(grid.flat, NETWORKS, strict=False):
        for color, time_step in zip(("#2b6cb0", "#c05621", "#2f855a"), STEPS, strict=True):
            for style, stage in zip(("--", "-"), STAGES, strict=True):
                values = [
                    row[quantity]
                    for row in rows
                    if (row["network"], row["stage"], row["T"], row["layer"]) == (name, stage, time_step, True)
                ]
                axes.plot(
                    range(1, len(values) + 1), values, style, color=color, lw=1.2, label=f"T = {time_step}, {stage}"
                )
        axes.set_title(name, fontsize=9)
        axes.axhline(1, color="#999999", lw=0.6)
        axes.set_xlabel("layer (convolution or linear)", fontsize=8)
        if quantity == "norm_ratio":
            axes.set_yscale("log")
    for axes in grid.flat[len(NETWORKS) :]:
        axes.axis("off")
    for row in grid:
        row[0].set_ylabel(label, fontsize=8)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        sys.exit(f"unknown network {unknown[0]!r}: choose from {', '.join(map(repr, NETWORKS))}")
    rows = [row for name in names or NETWORKS for row in measure(name)]
    if names:
        return
    here = Path(__file__).parent
    with open(here / "gradient_agreement.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})
    plot(rows, "cosine", "cosine", here / "gradient_cosine.png")
    plot(rows, "norm_ratio", "norm, rate-based over BPTT", here / "gradient_norm.png")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    made = f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    (here / "gradient_agreement.md").write_text(INTRODUCTION.format(made=made) + "\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
