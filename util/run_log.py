"""What a run leaves behind in its directory: configuration, train.log, metrics.jsonl and TensorBoard events."""

import json
import logging
import platform
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from util.errors import UserError

PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "tensorboard", "scikit-learn")
logger = logging.getLogger("train")


def new_run_directory(log_path: str, name: str) -> Path:
    """Makes ``log_path/name_DATE-TIME``, with a number behind it if that exists. Raises UserError if it cannot."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    try:
        Path(log_path).mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            directory = Path(log_path) / (f"{name}_{stamp}" if attempt == 1 else f"{name}_{stamp}-{attempt}")
            try:
                directory.mkdir()
            except FileExistsError:
                continue
            return directory
    except OSError as error:
        raise UserError(f"cannot write to --log_path {log_path}: {error.strerror or error}") from error
    raise UserError(f"--log_path {log_path} holds too many runs called {name}_{stamp}")


def log_to_console() -> None:
    """Sends the messages of this project to stdout."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)


class RunLog:
    """Writes the files of one run. A context manager: leaving it closes them."""

    def __init__(self, directory: Path, config: Mapping[str, Any], history: list[dict[str, Any]]):
        """``history``: the metrics of the epochs already done; empty for a new run."""
        self.directory = directory
        self._file = logging.FileHandler(directory / "train.log")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
        logging.getLogger().addHandler(self._file)
        if not history:
            _write_json(directory / "config.json", {"options": dict(config), **_provenance()})
        # A killed run may have logged an epoch that its checkpoint does not know: that epoch is run again.
        (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        self._tensorboard = SummaryWriter(str(directory), purge_step=len(history) + 1 if history else None)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._file)
        self._file.close()
        self._tensorboard.close()

    def epoch(self, metrics: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Adds one epoch: ``metrics`` to metrics.jsonl, ``scalars`` (TensorBoard tag -> value) to the event file."""
        with open(self.directory / "metrics.jsonl", "a") as file:
            file.write(json.dumps(dict(metrics)) + "\n")
        for tag, value in scalars.items():
            self._tensorboard.add_scalar(tag, value, metrics["epoch"])
        self._tensorboard.flush()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _provenance() -> dict[str, Any]:
    """The command, the platform, and the versions of the packages that made the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
