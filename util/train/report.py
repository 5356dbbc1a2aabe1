"""What testing a checkpoint tells: loss and accuracy, by class too, and how often each neuron layer fires."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .distributed import ONE_PROCESS, Processes
from .evaluation import evaluate
from .meter import ClassMeter, FiringRates
from .method import Method, Precision
from .signals import StopSignals

SHOWN = 20  # classes, or the worst ones of more


def report(
    net: nn.Module,
    method: Method,
    precision: Precision,
    loader: Iterable,
    device: torch.device,
    classes: list[str],
    processes: Processes = ONE_PROCESS,
    stop: StopSignals | None = None,
) -> dict[str, Any]:
    """Of the test set in ``loader``: accuracies in percent, firing rates in spikes per neuron and time step.

    Raises:
        StoppedError: ``stop`` was asked to.
    """
    with FiringRates(net, processes, training=False) as rates:
        meter = ClassMeter(device, len(classes), processes)
        evaluate(net, method, precision, loader, device, stop, processes, meter)
    by_class = [
        {"class": name, "accuracy": accuracy, "samples": count}
        for name, (accuracy, count) in zip(classes, meter.by_class(), strict=True)
    ]
    means = {"loss": meter.loss, "accuracy": meter.top1, "top5": meter.top5}
    return {**means, "accuracy_by_class": by_class, "firing_rates": rates.by_layer()}


def lines(found: dict[str, Any]) -> list[str]:
    """A report as it is printed."""
    by_class = [row for row in found["accuracy_by_class"] if row["samples"]]
    title = "accuracy by class:"
    if len(by_class) > SHOWN:
        title = f"accuracy by class, the {SHOWN} lowest of {len(by_class)}:"
        by_class = sorted(by_class, key=lambda row: row["accuracy"])[:SHOWN]
    wide = max(map(len, [*(row["class"] for row in by_class), *found["firing_rates"]]), default=0)
    said = [title, *(f"  {row['class']:<{wide}}  {row['accuracy']:6.2f} % of {row['samples']}" for row in by_class)]
    rates = [f"  {layer:<{wide}}  {rate:.4f}" for layer, rate in found["firing_rates"].items()]
    return [*said, "spikes per neuron and time step:", *rates]


def check_new(path: Path) -> None:
    """Raises UserError where a report cannot be written to ``path``, or would take the place of a file."""
    if os.path.lexists(path):
        raise UserError(f"--report {path} is there already: name a file that is not")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--report {path} cannot be written: {path.parent} is no directory that can be written to")


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def write(path: Path, found: dict[str, Any]) -> None:
    """Raises UserError."""
    try:
        with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(as_json(found))
    except OSError as error:
        raise UserError(f"--report {path} cannot be written: {error.strerror or error}") from error
