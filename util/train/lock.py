"""One process at a time trains in a run directory."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

FILE = ".lock"  # in the directory, where that itself cannot be locked

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
    """Holds the lock of ``directory``, which leaves no file there; where that is impossible, as on NFS, that of a file.

    Where the file system has no locks at all, it warns and goes on.

    Raises:
        UserError: another process holds it.
    """
    handle = _take(directory) if fcntl else None
    if handle is not None:
        _held.add(handle)
    try:
        yield
    finally:
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def holds(directory: Path) -> bool:
    """Whether this process holds the lock of ``directory``, whatever it was called then."""
    with suppress(OSError):
        places = [os.stat(path) for path in (directory, directory / FILE) if path.exists()]
        return any(os.path.samestat(os.fstat(handle), place) for handle in _held for place in places)
    return False


def _take(directory: Path) -> int | None:
    """A handle with the lock, None where there is none to be had."""
    for path, flags in ((directory, os.O_RDONLY), (directory / FILE, os.O_RDWR | os.O_CREAT)):
        try:
            handle = os.open(path, flags, 0o666)
        except OSError:  # what is wrong with it, if anything, is said by whoever reads or writes there
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError as error:
            os.close(handle)
            raise UserError(f"{directory} is being continued by another process: wait for it, or stop it") from error
        except OSError:
            os.close(handle)
    logger.warning(f"{directory} cannot be locked on its file system: let no second process continue this run")
    return None
