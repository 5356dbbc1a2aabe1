"""Rate-based gradients beside BPTT's, layer by layer, on SpikingJelly's networks, before and after some training.

python experiment/report/gradient_agreement.py                 all networks (about half an hour on one CPU core)
python experiment/report/gradient_agreement.py CIFAR10Net      some of them, printed only
python experiment/report/gradient_agreement.py --redraw        pictures and table again, of the CSV that is there

Writes doc/method/gradient_agreement.md and .csv, gradient_cosine.png and gradient_norm.png. Data: scikit-learn's digits
as images (the same at every step) of the size each network wants, or, for event cameras, as recordings (DIGITS_DVS).
A run of one's own is compared by experiment/analysis/main.py.
"""

import csv
import itertools
import platform
import re
import sys
from collections.abc import Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "doc" / "method" / "gradient_agreement.md"
sys.path.insert(0, str(ROOT))

from model import resnet18
from model.layer import lif
from tests.rate.zoo import ZOO, Zoo
from util.analysis.gradients import QUANTITIES, compare_layers, draw_layers, weights_of
from util.analysis.report import Row, picture, write_csv
from util.data import load_dataset
from util.dataset.event_data import load_event_dataset
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
FLOOR = 1e-3  # of the norms in the picture
MADE = re.compile(r"Made by `python experiment/report/gradient_agreement.py` \((.*)\)")
INTRODUCTION = f"""\
# Rate-based gradients beside BPTT's

Gradients of the cross-entropy of the time-averaged output, both in float64, on the same weights and a batch of
{BATCH} training samples, in step mode `m`: the cosine between the two and the norm of the rate-based one over BPTT's,
of all parameters together; then the lowest cosine of a single layer's weights at T = {STEPS[-1]}. The {UPDATES} updates
are rate-based ones of Adam (learning rate {LEARNING_RATE}, T = {TRAIN_T}, batch {TRAIN_BATCH}),
{UPDATES * TRAIN_BATCH} images in all: a beginning, no trained network. The loss is the mean of the last ten; at chance
it is 2.30, and networks with a loss above 2 have learned next to nothing by then. The scripts' scaling of the gradient
by 1/T is not in it.

Layer by layer: [cosines](gradient_cosine.png), [norms](gradient_norm.png),
[numbers](gradient_agreement.csv). A layer to which no gradient comes has a gap in the pictures; the picture of norms
ends at {FLOOR:g} below.

Made by `python experiment/report/gradient_agreement.py` ({{made}}).
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


def measure(name: str) -> Iterator[Row]:
    """One row for each stage, T and layer's weight ("" for all parameters together)."""
    zoo = NETWORKS[name]
    torch.manual_seed(0)
    net = zoo.make()
    for stage in STAGES:
        loss = train(net, zoo) if stage == STAGES[1] else float("nan")
        for time_step in STEPS:
            found = compare_layers(net, *batch(zoo, time_step, torch.arange(BATCH)), time_dim=zoo.time_dim)
            yield from ({"network": name, "stage": stage, "T": time_step, **row, "loss": loss} for row in found)
            whole = found[0]
            print(
                f"{name}, {stage}, T = {time_step}: cosine {whole['cosine']:.3f}, norm {whole['norm_ratio']:.2f}",
                flush=True,
            )


def table(rows: list[Row]) -> list[str]:
    lines = [
        f"| network | weights | {' | '.join(f'cosine T={t}' for t in STEPS)} | "
        f"{' | '.join(f'norm T={t}' for t in STEPS)} | lowest layer, T={STEPS[-1]} | loss |",
        f"| --- | --- |{' --- |' * (2 * len(STEPS) + 2)}",
    ]
    for name in NETWORKS:
        for stage in STAGES:
            own = [row for row in rows if row["network"] == name and row["stage"] == stage]
            whole = {row["T"]: row for row in own if not row["parameter"]}
            layers = [row for row in own if row["T"] == STEPS[-1] and row["parameter"] and row["cosine"] is not None]
            worst = min(layers, key=lambda row: row["cosine"], default=None)  # None: no gradient reaches a layer
            cells = [f"{whole[t]['cosine']:.2f}" for t in STEPS] + [f"{whole[t]['norm_ratio']:.2f}" for t in STEPS]
            loss = "" if stage == STAGES[0] else f"{own[0]['loss']:.2f}"
            lowest = f"{worst['cosine']:.2f} `{worst['parameter']}`" if worst else "no spike, no gradient"
            lines.append(f"| {name} | {stage} | {' | '.join(cells)} | {lowest} | {loss} |")
    return lines


def plot(rows: list[Row], quantity: str, path: Path) -> None:
    """A panel a network: its layers from input to output, a colour a T, dashed before and solid after training."""
    label, high = QUANTITIES[quantity], -(-len(NETWORKS) // 3)
    title = f"{label[0].upper()}{label[1:]}, layer by layer; a gap where no gradient comes to a layer"
    with picture(path, title, high, 3, (12, 2.8 * high)) as grid:
        for axes, name in zip(grid.flat, NETWORKS, strict=False):
            for color, time_step in zip(("#2b6cb0", "#c05621", "#2f855a"), STEPS, strict=True):
                for style, stage in zip(("--", "-"), STAGES, strict=True):
                    own = [row for row in rows if (row["network"], row["stage"], row["T"]) == (name, stage, time_step)]
                    draw_layers(axes, own, quantity, ls=style, color=color, label=f"T = {time_step}, {stage}")
            axes.set_title(name, fontsize=9)
            axes.axhline(1, color="#999999", lw=0.6)
            axes.set_xlabel("layer (convolution or linear), from 0", fontsize=8)
            if quantity == "norm_ratio":
                axes.set_yscale("log")
                axes.set_ylim(bottom=max(axes.get_ylim()[0], FLOOR))
            else:
                axes.set_ylim(-1.05, 1.05)
        for axes in grid.flat[len(NETWORKS) :]:
            axes.axis("off")
        for line in grid:
            line[0].set_ylabel(label, fontsize=8)
        grid[-1][-1].legend(*grid[0][0].get_legend_handles_labels(), loc="center", fontsize=9)


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote, with a row for each layer, those without a value included."""
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    numbers = {(row["network"], row["stage"], int(row["T"]), row["parameter"]): row for row in found}
    rows = []
    for name, zoo in NETWORKS.items():
        parameters = ["", *weights_of(zoo.make())]
        for stage, time_step, parameter in itertools.product(STAGES, STEPS, parameters):
            row = numbers.get((name, stage, time_step, parameter), {})
            whole = numbers[name, stage, time_step, ""]
            values = {key: float(row[key]) if row.get(key) else None for key in ("cosine", "norm_ratio")}
            rows.append({"network": name, "stage": stage, "T": time_step, "layer": parameters.index(parameter) or None,
                         "parameter": parameter, **values, "loss": float(whole["loss"])})  # fmt: skip
    return rows


def write(rows: list[Row], made: str) -> None:
    here = PAGE.parent
    for quantity, name in (("cosine", "gradient_cosine.png"), ("norm_ratio", "gradient_norm.png")):
        plot(rows, quantity, here / name)
    PAGE.write_text(INTRODUCTION.format(made=made) + "\n".join(table(rows)) + "\n")


def main(names: list[str]) -> None:
    file = PAGE.with_suffix(".csv")
    if names == ["--redraw"]:
        return write(read_csv(file), MADE.search(file.with_suffix(".md").read_text())[1])
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        sys.exit(f"unknown network {unknown[0]!r}: choose from {', '.join(map(repr, NETWORKS))}")
    rows = [row for name in names or NETWORKS for row in measure(name)]
    if names:
        return None
    write_csv(rows, file)
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    return write(rows, f"{platform.machine()}, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main(sys.argv[1:])
