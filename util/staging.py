"""What is made aside, in a directory of its own, and moved to its place whole; a killed process leaves it behind."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

ABANDONED_S = 24 * 3600  # far more than any such making takes


def sweep(parent: Path, pattern: str) -> None:
    """Removes the directories in ``parent`` with such a name in which nothing has been made for a day."""
    for path in parent.glob(pattern):
        with suppress(OSError):  # another process sweeps, too
            if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
