"""What data sets share: directories and files that can be read or not, and what reads a single file for a network."""

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ..errors import UserError

IMAGE_SIZES = range(4, 1025)  # pixels a side, of what networks see

logger = logging.getLogger(__name__)


class Split(NamedTuple):
    """Images in memory."""

    images: np.ndarray  # uint8, (N, H, W) or (N, H, W, 3)
    labels: np.ndarray  # int64, (N,)
    classes: list[str]  # the name of each label


class FileReader(NamedTuple):
    """What makes of a file of no split what a network is to see of it."""

    channels: int
    extensions: tuple[str, ...]  # of the files
    read: Callable[[Path], Tensor]  # raises UserError


def check_directory(path: Path) -> None:
    """Raises UserError where ``path`` is there but is no directory, or none that may be read."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is not a directory: name the directory that holds the data")
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path} cannot be read: mend its permissions or name another directory")


def visible(paths: Iterable[Path], root: Path) -> list[Path]:
    """Those below ``root`` that lie in no folder that an editor, an archive or git has left there; says which do."""
    kept, hidden = [], {}
    for path in paths:
        parts = path.relative_to(root).parts
        place = next((part for part in parts if part.startswith(".") or part == "__MACOSX"), None)
        if place is None:
            kept.append(path)
        else:
            hidden[place] = None
    if hidden:
        logger.warning("%s: left out, as hidden: %s", root, ", ".join(hidden))
    return kept


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend its permissions or replace it") from error


def corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not usable: {reason}; replace it by an intact file")
