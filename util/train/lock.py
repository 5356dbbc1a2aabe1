"""One process at a time trains in a run directory."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_held: set[int] = set()


def _drop_in_child() -> None:
    """A process that loads data outlives a killed parent for some seconds; it must not keep the lock."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl:
    os.register_at_fork(after_in_child=_drop_in_child)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of ``directory``, which leaves no file there.

    Where the file system has no such locks, as NFS has none of a directory, it warns and goes on.

    Raises:
        UserError: another process holds it.
    """
    handle = _open(directory)
    try:
        if handle is not None:
            _held.add(handle)
            _take(handle, directory)
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def _open(directory: Path) -> int | None:
    try:
        return os.open(directory, os.O_RDONLY) if fcntl else None
    except OSError:  # what is wrong with it, if anything, is said by whoever reads or writes there
        return None


def _take(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{directory} is being continued by another process: wait for it, or stop it") from error
    except OSError:
        logger.warning(f"{directory} cannot be locked on its file system: let no second process continue this run")
