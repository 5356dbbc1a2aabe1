"""What is made aside, in a directory of its own, and moved to its place whole; a killed process leaves it behind."""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any

from .errors import UserError

ABANDONED_S = 24 * 3600  # far more than any such making takes


def sweep(parent: Path, pattern: str) -> None:
    """Removes the directories in ``parent`` with such a name in which nothing has been made for a day."""
    if _named_by.get():
        return
    for path in parent.glob(pattern):
        with suppress(OSError):  # another process sweeps, too
            if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


_named_by: ContextVar[Path | None] = ContextVar("named_by", default=None)


def only_reading(load: Callable[..., Any], named_by: Path) -> Callable[..., Any]:
    """``load``, which makes nothing where the checkpoint ``named_by`` says that data are: it may be a stranger's."""

    @wraps(load)
    def read(*args: Any) -> Any:
        token = _named_by.set(named_by)
        try:
            return load(*args)
        finally:
            _named_by.reset(token)

    return read


def check_may_make(path: Path) -> None:
    """Raises UserError within `only_reading`."""
    if named_by := _named_by.get():
        raise UserError(f"{named_by} says that its data are in {path}, where they are not: name their --data_path")
