"""What `gpu.py` has found so far: a JSON file a part, of which the report, the CSV files and the plots are made."""

import argparse
import csv
import gc
import json
import operator
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Rows = list[dict[str, Any]]
ORDER = ("right", "fast", "profile", "learns", "defaults")  # of the stages, each of which uses what those before found


@dataclass
class Bench:
    """What the stages share. ``small``: a dry run, whose sizes only show that everything runs."""

    options: argparse.Namespace
    device: torch.device
    deadline: float  # by time.monotonic()

    @property
    def out(self) -> Path:
        return Path(self.options.out)

    @property
    def small(self) -> bool:
        return self.options.dry_run

    def rows(self, stage: str) -> Rows:
        """What the parts of a stage have found so far."""
        return [row for part in found(self.out, stage) for row in part["rows"]]


def found(out: Path, stage: str) -> list[dict[str, Any]]:
    files = sorted((out / "parts").glob(f"{stage}.*.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text()) for file in files]


class Report:
    def __init__(self, bench: Bench):
        self.bench, self.out = bench, bench.out
        (self.out / "parts").mkdir(parents=True, exist_ok=True)

    def _file(self, stage: str, name: str) -> Path:
        return self.out / "parts" / f"{stage}.{re.sub('[^a-zA-Z0-9]+', '_', name)}.json"

    def has(self, stage: str, name: str) -> bool:
        """Whether the part is done; one that failed or was cut short is not."""
        file = self._file(stage, name)
        return file.exists() and json.loads(file.read_text())["done"]

    def add(self, stage: str, name: str, find: Callable[["Bench"], Rows]) -> None:
        """Runs a part and keeps what it finds, be it an error. A row {"unfinished": ...} asks to be called again."""
        began = time.monotonic()
        try:
            rows, error = find(self.bench), None
        except Exception as reason:  # the other parts must not suffer
            traceback.print_exc()
            rows, error = [], f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        gc.collect()
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()
        done = error is None and not any("unfinished" in row for row in rows)
        part = {"stage": stage, "name": name, "done": done, "error": error, "rows": rows}
        part |= {"seconds": round(time.monotonic() - began, 1), "machine": machine(self.bench.device)}
        write(self._file(stage, name), json.dumps(part, indent=1))
        self.write()

    def write(self) -> None:
        """The report of all that is there."""
        text = [
            "# A GPU, measured" if not self.bench.small else "# Dry run on a CPU: no figure here is a GPU's",
            "    python experiment/benchmark/gpu.py " + shlex.join(sys.argv[1:]),
        ]
        machines = set()
        for stage in ORDER:
            parts = found(self.out, stage)
            if not parts:
                continue
            text.append(f"## {stage}")
            for part in parts:
                machines.add(part["machine"])
                text.append(f"### {part['name']} ({part['seconds']} s)")
                text += [f"**failed**: {part['error']}"] if part["error"] else [table(part["rows"])]
            rows = [{"part": part["name"], **row} for part in parts for row in part["rows"]]
            write_csv(self.out / f"{stage}.csv", rows)
            if plot(stage, rows, self.out / f"{stage}.png"):
                text.append(f"![{stage}]({stage}.png)")
        text[2:2] = ["Machine: " + "; ".join(sorted(machines))]
        write(self.out / "report.md", "\n\n".join(text) + "\n")


def write(file: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    part = _beside(file)
    part.write_text(text)
    os.replace(part, file)


def _beside(file: Path) -> Path:
    return file.with_suffix(f".{os.getpid()}")  # of each process: several may write a report


def machine(device: torch.device) -> str:
    versions = []
    for package in ("torch", "spikingjelly", "triton", "cupy-cuda12x"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    name = f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"
    if device.type == "cuda":
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        ).stdout.split()
        name = (
            f"{torch.cuda.get_device_name(device)}, driver {driver[0] if driver else 'unknown'}, "
            f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, {name}"
        )
    return ", ".join([name, *versions])


def columns(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def table(rows: Rows) -> str:
    names = columns(rows)
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(shown(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def write_csv(file: Path, rows: Rows) -> None:
    part = _beside(file)
    with open(part, "w", newline="") as out:
        writer = csv.DictWriter(out, columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, file)


# stage: (what is a line, [(x, y), ...])
PLOTS = {
    "fast": (("variant", "name"), [("T", "seconds"), ("T", "peak MiB")]),
    "learns": (("name",), [("epoch", "test accuracy %"), ("training seconds", "test accuracy %")]),
}


def plot(stage: str, rows: Rows, file: Path) -> bool:
    """Draws what there is to draw; False where nothing is."""
    labels, axes_of = PLOTS.get(stage, ((), []))
    rows = [row for row in rows if all(name in row for pair in axes_of for name in (*pair, *labels))]
    if not axes_of or not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(axes_of), figsize=(12, 5))
    for line in dict.fromkeys(tuple(row[name] for name in labels) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in labels) == line]
        own.sort(key=operator.itemgetter(axes_of[0][0]))
        for ax, (x, y) in zip(axes, axes_of, strict=True):
            ax.plot([row[x] for row in own], [row[y] for row in own], marker="o", markersize=3, label=", ".join(line))
            ax.set(xlabel=x, ylabel=y)
    axes[-1].legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True
