"""How near rate-based gradients come to BPTT's with K windows of rates, over K and T, before and after some training.

python experiment/report/windows.py                 vggsnn_small on images and events, a minute on two CPU cores
python experiment/report/windows.py --redraw        the picture and the table again, of the CSV that is there

Writes doc/method/windows.csv, .md and .png. Data, updates and comparison are those of gradient_agreement.py.
"""

import csv
import platform
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gradient_agreement import BATCH, STAGES, STEPS, UPDATES, batch, train

from model import vggsnn_small
from tests.rate.zoo import Zoo
from util.analysis.report import Row, picture, write_csv
from util.rate.check import compare_gradients

NETWORKS = {
    "vggsnn_small, images": Zoo(partial(vggsnn_small, num_classes=10, in_channel=3)),
    "vggsnn_small, events": Zoo(partial(vggsnn_small, num_classes=10, in_channel=2), channels=2),
}

FILE = Path(__file__).resolve().parents[2] / "doc" / "method" / "windows.csv"


def measure() -> list[Row]:
    rows = []
    for name, zoo in NETWORKS.items():
        torch.manual_seed(0)
        net = zoo.make()
        for stage in STAGES:
            if stage == STAGES[1]:
                train(net, zoo)
            for steps in STEPS:
                for windows in (k for k in (1, *STEPS) if steps % k == 0):
                    x, y = batch(zoo, steps, torch.arange(BATCH))
                    cosine, ratio = compare_gradients(net, x, y, time_dim=zoo.time_dim, windows=windows)[""]
                    rows.append({"network": name, "stage": stage, "T": steps, "K": windows, "cosine": cosine,
                                 "norm_ratio": ratio})  # fmt: skip
                    print(f"{name}, {stage}, T = {steps}, K = {windows}: cosine {cosine:.4f}", flush=True)
    return rows


def write(rows: list[Row]) -> None:
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    columns = [(steps, k) for steps in STEPS for k in (1, *STEPS) if steps % k == 0 and k < steps]
    made = f"{platform.machine()}, Python {platform.python_version()}, {versions}"
    lines = [
        "# Windows of rates: how near to BPTT",
        "",
        "Cosine between rate-based gradients and BPTT's, all parameters together, K windows of rates over T steps,",
        f"in float64, step mode `m`, a batch of {BATCH}; at K = T it is 1. Before and after {UPDATES} rate-based",
        f"updates with K = 1. Made by `python experiment/report/windows.py` ({made}); [numbers](windows.csv).",
        "",
        "![](windows.png)",
        "",
        f"| network | weights | {' | '.join(f'T={steps}, K={k}' for steps, k in columns)} |",
        f"| --- | --- |{' --- |' * len(columns)}",
    ]
    for name in NETWORKS:
        for stage in STAGES:
            own = {(row["T"], row["K"]): row for row in rows if (row["network"], row["stage"]) == (name, stage)}
            lines.append("| " + " | ".join([name, stage, *(f"{own[at]['cosine']:.3f}" for at in columns)]) + " |")
    FILE.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with picture(FILE.with_suffix(".png"), "Cosine of rate-based and BPTT's gradients", 1, 2, (11, 4)) as grid:
        for axes, stage in zip(grid.flat, STAGES, strict=True):
            for name in NETWORKS:
                own = [row for row in rows if (row["network"], row["stage"], row["T"]) == (name, stage, STEPS[-1])]
                axes.plot([row["K"] for row in own], [row["cosine"] for row in own], marker="o", label=name)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{stage}, T = {STEPS[-1]}", fontsize=9)
            axes.set_xlabel("windows of rates, K", fontsize=8)
            axes.set_ylim(top=1.02)
        grid.flat[0].legend(fontsize=7)


def main() -> None:
    if sys.argv[1:] == ["--redraw"]:
        with open(FILE, newline="") as file:
            rows = [{**row, "T": int(row["T"]), "K": int(row["K"]), "cosine": float(row["cosine"])}
                    for row in csv.DictReader(file)]  # fmt: skip
    else:
        rows = measure()
        FILE.parent.mkdir(exist_ok=True)
        write_csv(rows, FILE)
    write(rows)


if __name__ == "__main__":
    main()
