"""Runs the training scripts, in a process of its own or in this one; a network small enough to do so often."""

import contextlib
import json
import logging
import os
import runpy
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import layer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import model
from model.layer import SpikingClassifier, conv_bn, make_neuron
from tests.processes import ROOT, start_python
from util.train import checkpoint
from util.train.options import TrainOptions
from util.train.tensorboard_file import event_files

SCRIPTS = CIFAR, DVS, FOLDERS = [ROOT / "experiment" / name / "main.py" for name in ("cifar", "dvs", "imagenet")]
ANALYSIS = ROOT / "experiment" / "analysis" / "main.py"
PREDICT = ROOT / "experiment" / "predict.py"
STEPS, LOADER, SCALING = (ROOT / "experiment" / "benchmark" / f"{name}.py" for name in ("main", "loader", "scaling"))
PAIRS = [("bptt", "m"), ("bptt", "s"), ("rate", "m"), ("rate", "s")]
METRICS = ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr", "seconds", "images_per_second",
           "peak_memory_bytes"]  # fmt: skip
MEASURED = {"seconds", "images_per_second", "peak_memory_bytes"}  # what two runs of the same seed may differ in


def pair_flags(method: str, step_mode: str) -> list[str]:
    return ["--step_mode", step_mode, "--rate_flag" if method == "rate" else "--no-rate_flag"]


# A process of its own


def start(*args: str | Path, cwd: Path, script: Path = CIFAR) -> subprocess.Popen:
    """The script as a user starts it; see `start_python`."""
    return start_python(script, *args, cwd=cwd)


# This process


def options_of(script: Path) -> type[TrainOptions]:
    """The options class of a script."""
    classes = [value for value in _execute(script, "imported").values() if isinstance(value, type)]
    (own,) = (kind for kind in classes if issubclass(kind, TrainOptions) and kind is not TrainOptions)
    return own


def image_options() -> type[TrainOptions]:
    return options_of(CIFAR)


def run_here(*args: str | Path, script: Path = CIFAR) -> int:
    """A script run in this process, as if typed; returns its exit status."""
    argv, root = sys.argv, logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []  # the script sets up logging anew, and pytest's handlers are not its own
    sys.argv = [str(script), *map(str, args)]
    try:
        _execute(script, "__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv, root.handlers = argv, handlers
        root.setLevel(level)
    return 0


def _execute(script: Path, name: str) -> dict[str, Any]:
    path = list(sys.path)
    try:
        return runpy.run_path(str(script), run_name=name)
    finally:
        sys.path[:] = path


def tiny(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Two convolutions and a linear layer: a training step takes milliseconds."""
    features = [*conv_bn(in_channel, 16), make_neuron(**neuron), *conv_bn(16, 32, stride=2), make_neuron(**neuron)]
    pooled = nn.Sequential(*features, layer.AdaptiveAvgPool2d(2), layer.Flatten())
    return SpikingClassifier(pooled, layer.Linear(128, num_classes), stages={"features.2": 16})


@contextlib.contextmanager
def tiny_networks(*names: str) -> Iterator[None]:
    """The networks called ``names`` are `tiny` ones, and one thread is enough for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(model.MODELS, name, tiny)
        yield
    torch.set_num_threads(threads)


# What a run leaves behind


def only_run(log_path: Path) -> Path:
    (directory,) = runs(log_path)
    return directory


def runs(log_path: Path) -> list[Path]:
    """The run directories; one that a killed process was about to make has a name with a dot."""
    return [path for path in log_path.glob("*") if not path.name.startswith(".")]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, the `firing_rates` apart."""
    return [{name: row[name] for name in row if name != "firing_rates"} for row in _rows(directory)]


def firing_rates(directory: Path) -> list[dict[str, float]]:
    return [row["firing_rates"] for row in _rows(directory)]


def _rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def unmeasured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics that the same seed must reproduce."""
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard run/tag -> (step, value), as TensorBoard shows them."""
    found = {}
    for curve in {file.parent.name for file in event_files(directory)}:
        events = EventAccumulator(str(directory / curve), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[f"{curve}/{tag}"] = [(e.step, e.value) for e in events.Scalars(tag)]
    return found


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, tensors anywhere in dictionaries and lists included."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def history(content: dict) -> list[dict]:
    """The metrics of the epochs that a checkpoint knows."""
    return [row for row, *_ in content["logged"]]


def check_continued(directory: Path, whole: Path, epochs: int) -> None:
    """``directory`` holds what the uninterrupted run ``whole`` does, in TensorBoard too."""
    for name in (checkpoint.LAST, checkpoint.BEST):
        content, expected = load(directory / name), load(whole / name)
        for part in expected.keys() - {"config", "logged", "meter"}:  # compared below, or measured
            assert same(content[part], expected[part]), (name, part)
    assert [row["epoch"] for row in metrics(directory)] == list(range(1, epochs + 1))
    assert unmeasured(metrics(directory)) == unmeasured(metrics(whole))
    shown, expected = scalars(directory), scalars(whole)
    assert shown.keys() == expected.keys()
    speed = "train/speed/images_per_second"
    for tag in shown.keys() - {speed}:
        assert shown[tag] == expected[tag], tag
    assert [step for step, _ in shown[speed]] == list(range(1, epochs + 1))
    assert len(event_files(directory)) == 2
    assert firing_rates(directory) == firing_rates(whole)


def stamps(directory: Path) -> dict[str, tuple[int, ...] | None]:
    """As `snapshot`, but when and how long each file was written: of many files a fraction of the work."""
    return {
        path: (entry.st_ino, entry.st_mtime_ns, entry.st_size) if stat.S_ISREG(entry.st_mode) else None
        for folder, folders, files in os.walk(directory)
        for path in (os.path.join(folder, name) for name in folders + files)
        for entry in [os.lstat(path)]
    }


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every path below ``directory`` -> its content, None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }
