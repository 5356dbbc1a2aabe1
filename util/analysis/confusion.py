"""Which classes are taken for which: the confusion matrix, and the accuracy of each class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..train.setup import Setup
from .report import Row, picture

_MOST = 20  # classes whose counts and names have room in a picture


@torch.no_grad()
def measure(setup: Setup) -> list[Row]:
    """A row a class: its samples, how many of them are right in percent, and how many were taken for each class."""
    setup.net.eval()
    pairs = []
    for x, y in setup.test_loader:
        with setup.precision.autocast():
            out = setup.method.forward(setup.net, x.to(setup.device))
        pairs.append(torch.stack([y, out.argmax(1).cpu()]))
    counts = counted(*torch.cat(pairs, 1), len(setup.classes))
    columns = [f"as {name}" for name in setup.classes]
    return [
        {
            "class": setup.classes[k],
            "samples": sum(row),
            "accuracy": 100 * row[k] / sum(row) if sum(row) else None,
            **dict(zip(columns, row, strict=True)),
        }
        for k, row in enumerate(counts.tolist())
    ]


def counted(labels: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """[classes, classes]: how many samples of the class of a row were taken for the class of a column."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Raises OSError."""
    names = [row["class"] for row in rows]
    classes = range(len(names))
    counts = torch.tensor([[row[f"as {name}"] for name in names] for row in rows]).numpy()
    shares = counts / counts.sum(1, keepdims=True).clip(1)
    accuracies = [float("nan") if row["accuracy"] is None else row["accuracy"] for row in rows]
    right = int(counts.diagonal().sum())
    title = f"{title}\n{right} of {int(counts.sum())} right, {100 * right / max(int(counts.sum()), 1):.2f} %"
    with picture(file, title, columns=2, size=(12, 5.4)) as ((left, bars),):
        shown = left.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        left.figure.colorbar(shown, ax=left, label="percent of the class's samples")
        left.set_xlabel("predicted class")
        left.set_ylabel("true class")
        bars.bar(classes, accuracies, color="#2b6cb0")
        bars.set_xlabel("class")
        bars.set_ylabel("accuracy in percent")
        bars.set_ylim(0, 105)
        if len(rows) <= _MOST:
            left.set_yticks(classes, names)
            for axes in (left, bars):
                axes.set_xticks(classes, names, rotation=90 if max(map(len, names)) > 2 else 0)
            for k in classes:
                if rows[k]["samples"]:
                    bars.annotate(f"{accuracies[k]:.1f}", (k, accuracies[k] + 0.5), ha="center", fontsize=7)
                for j in classes:
                    if counts[k, j]:
                        color = "white" if shares[k, j] > 0.5 else "black"
                        left.annotate(int(counts[k, j]), (j, k), ha="center", va="center", fontsize=7, color=color)
