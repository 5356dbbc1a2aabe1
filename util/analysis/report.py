"""Tables and pictures of measurements: a row is a dict, the same names in each."""

import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # files only: no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, Any]
DPI = 130


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """Numbers with six digits, so that small ones are not rounded away; None is an empty cell. Raises OSError."""
    with open(file, "w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def text_table(rows: Sequence[Row]) -> str:
    """As Markdown."""

    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(map(cell, row.values())) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


@contextmanager
def picture(file: Path, title: str, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.5)) -> Iterator:
    """A figure with its axes [rows, columns], written to ``file``. Raises OSError."""
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    try:
        figure.suptitle(title, fontsize=11)
        yield axes
        figure.savefig(file, dpi=DPI)
    finally:
        plt.close(figure)


def name_layers(axes: Axes, names: Sequence[str], label: str = "") -> None:
    """The layers' names below the axis, as many as there is room for."""
    every = -(-len(names) // 40)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=60, ha="right", fontsize=7)
    axes.set_xlabel(label)


def colors(values: Iterable[Any]) -> dict[Any, Any]:
    """One for each value, from dark to light."""
    values = list(values)
    return {value: plt.cm.viridis(0.9 * i / max(len(values) - 1, 1)) for i, value in enumerate(values)}
