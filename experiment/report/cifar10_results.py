"""Accuracy over epochs of runs of experiment/cifar/main.py: doc/results/cifar10_results.csv, its picture and its table.

python experiment/report/cifar10_results.py RUN RUN ...     the directories of finished runs
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).resolve().parents[2] / "doc" / "results" / "cifar10_results.md"
STYLES = {"BPTT": "k-", "rate, not scaled": "C0-", "rate, scaled": "C0--"}


def label_of(options: dict) -> str:
    if options["method"] == "bptt":
        return "BPTT"
    return "rate, not scaled" if options["rate_loss_scale"] is False else "rate, scaled"


def main(runs: list[Path]) -> None:
    curves = {}
    for run in runs:
        options = json.loads((run / "config.json").read_text())["options"]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[label_of(options)] = [(row["epoch"], row["train_loss"], row["val_acc"]) for row in rows]
    curves = {label: curves[label] for label in STYLES if label in curves}

    with open(PAGE.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "epoch", "train_loss", "test_accuracy"])
        for label, rows in curves.items():
            writer.writerows([label, epoch, f"{loss:.4f}", f"{accuracy:.2f}"] for epoch, loss, accuracy in rows)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, rows in curves.items():
        axes.plot([row[0] for row in rows], [row[2] for row in rows], STYLES[label], marker="o", ms=3, label=label)
    axes.set(xlabel="epoch", ylabel="test accuracy (%)", title="CIFAR-10, JPEG, quality 75: vggsnn_small, T = 4")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PAGE.with_suffix(".png"), dpi=150)

    epochs = [row[0] for row in next(iter(curves.values()))]
    lines = [f"| epoch | {' | '.join(map(str, epochs))} |", f"| --- |{' --- |' * len(epochs)}"]
    lines += [f"| {label} | {' | '.join(f'{row[2]:.2f}' for row in rows)} |" for label, rows in curves.items()]
    text = PAGE.read_text().partition("| epoch |")[0] if PAGE.exists() else ""
    PAGE.write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    main([Path(run) for run in sys.argv[1:]])
