"""Checkpoints: written whole or not at all, read without running code, and held against the options of the command."""

import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from util.errors import UserError

FORMAT = 1
LAST, BEST = "last.pth", "model_weights.pth"


def save(path: Path, **content: Any) -> None:
    """Writes ``content`` so that ``path`` holds the earlier file or the whole new one, whatever happens in between.

    Raises:
        UserError: it cannot be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch hides a full disk behind a RuntimeError
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or 'is the disk full?'}") from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        UserError: the file is absent or unreadable, or no checkpoint of this project.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}")
    try:
        written = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles that it refuses anyway
            content = torch.load(io.BytesIO(written), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        raise UserError(f"{path} is not a checkpoint, or a damaged one ({type(error).__name__})") from error
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {content['format']}; this version reads format {FORMAT}")
    return content


def load_state(trainer: Any, content: dict[str, Any], path: Path) -> None:
    """Raises UserError where ``content`` is not what a trainer like this one left behind."""
    if "optimizer" not in content:
        raise UserError(f"{path} holds weights only: to continue, name the run's directory or its {LAST}")
    try:
        trainer.load_state_dict(content)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: its state does not fit ({type(error).__name__}: {error})") from error


def last_of(run: str) -> Path:
    """The checkpoint to continue from: ``run`` itself, or the last one of the run directory ``run``."""
    path = Path(run)
    return path / LAST if os.path.isdir(path) else path


def best_of(run: str) -> Path:
    """The checkpoint to evaluate: ``run`` itself, or the best one of the run directory ``run``."""
    path = Path(run)
    return path / BEST if os.path.isdir(path) else path


def load_weights(net: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """Raises UserError where the weights are not those of ``net``."""
    try:
        net.load_state_dict(content["model"])
    except (RuntimeError, AttributeError, TypeError) as error:
        # torch lists what does not fit line by line, after a line that only says so
        reason = next(iter(str(error).splitlines()[1:]), str(error)).strip()
        raise UserError(f"the weights in {path} do not fit the network: {reason}") from error
