"""Checkpoints: written whole or not at all, read without running code, and only if they are what was written.

A file is what torch.save makes, and ``torch.load(path, weights_only=True)`` reads it: a zip archive, whose members have
checksums, which torch.load does not look at. Earlier versions wrote a digest of the file as its comment: not read.

Format 2 is a dict: ``format``; ``config``, the options; ``model``, the weights; ``logged``, a `run_log.Logged` of each
epoch that is done; of the best epoch's file ``classes``, the names of the outputs, of the others the rest of
``Trainer.state_dict()``. Earlier versions also wrote ``epoch`` and ``history``, which ``logged`` tells: not read.
"""

import contextlib
import io
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import RunError, UserError

FORMAT = 2
LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "model_weights.pth"


class _Kept:
    """Passes on to ``file`` what torch.save writes, and keeps what goes wrong: torch's writer is no Python that an
    exception could leave.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, block: bytes | memoryview) -> int:
        try:
            if self.error is None:
                self.file.write(block)
        except OSError as error:
            self.error = error
        return len(block)

    def flush(self) -> None:
        """torch calls it."""


def write(content: dict[str, Any], file: BinaryIO) -> None:
    """Writes a checkpoint, tensor by tensor. Raises OSError."""
    kept = _Kept(file)
    torch.save(content, kept)
    if kept.error is not None:
        raise kept.error


def encode(content: dict[str, Any]) -> bytes:
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    write(content, buffer)
    return buffer.getvalue()


def save(path: Path, **content: Any) -> None:
    """Writes ``content`` so that ``path`` holds the earlier file or the whole new one, whatever happens in between.

    The earlier ``last.pth`` is kept as ``previous.pth``.

    Raises:
        RunError: it cannot be written; the earlier files are as they were.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST and path.exists():
            copy(path, path.with_name(PREVIOUS))
        os.replace(unfinished, path)
        sync_directory(path.parent)
    except OSError as error:
        for leftover in (unfinished, path.with_name(PREVIOUS + ".tmp")):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        hint = f"; make room, then continue with --resume {path.parent}" if path.with_name(LAST).exists() else ""
        raise RunError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def forget_previous(directory: Path) -> None:
    """Of a run that is done, whose last checkpoint nothing will replace."""
    with contextlib.suppress(OSError):
        (directory / PREVIOUS).unlink()


def copy(path: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``path``, in one instant. Raises OSError."""
    link = target.with_name(target.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)
        with open(link, "rb") as file:
            os.fsync(file.fileno())
    os.replace(link, target)
    link.unlink(missing_ok=True)  # replacing a file by itself does nothing


def sync_directory(directory: Path) -> None:
    """Makes what was renamed in ``directory`` outlast a power cut."""
    with contextlib.suppress(OSError):  # not every system can
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        UserError: the file is absent or damaged, or no checkpoint of this project. If the run directory holds an
            intact one, the message says to give that to ``flag``.
    """
    with intact_named(path, flag):
        return _load(path)


@contextlib.contextmanager
def intact_named(path: Path, flag: str) -> Iterator[None]:
    """Within, an error of ``path`` says to give ``flag`` an intact checkpoint of the same run, if there is one."""
    try:
        yield
    except UserError as error:
        intact = _intact_beside(path)
        if intact is None:
            raise
        raise UserError(f"{error}; {intact} is intact: use {flag} {intact}") from error


def _intact_beside(path: Path) -> Path | None:
    """The newest checkpoint of the run directory that can be read, if ``path`` is another one of it."""
    if path.name not in (LAST, PREVIOUS, BEST):
        return None
    for other in (path.with_name(LAST), path.with_name(PREVIOUS)):
        with contextlib.suppress(UserError):
            if other != path:
                _load(other)
                return other
    return None


def _load(path: Path) -> dict[str, Any]:
    content = read(path, own=True)
    if not isinstance(content, dict) or not {"format", "config", "model"} <= content.keys():
        raise UserError(f"{path} is not a checkpoint of this project")
    if type(content["format"]) is not int or content["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {str(content['format'])[:40]}; this version reads format {FORMAT}"
        )
    return content


def read(path: Path, own: bool) -> Any:
    """What torch.save was given. ``own``: whether it must be a zip archive, as checkpoints of this project are.

    Raises:
        UserError: it cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}{_runs_beside(path)}")
    try:
        with open(path, "rb") as file:  # one handle, so that what was checked is what is read
            _check_content(file, path, own)
            return _unpickled(file, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _runs_beside(path: Path) -> str:
    """The newest runs where a directory of runs was named for one of them."""
    runs = sorted((file.stat().st_mtime, file.parent) for file in path.parent.glob(f"*/{path.name}"))[::-1]
    named = ", ".join(str(run) for _, run in runs[:3]) + (", ..." if len(runs) > 3 else "")
    return f": {path.parent} holds {len(runs)} run{'s' * (len(runs) > 1)}, name one: {named}" if runs else ""


def _check_content(file: BinaryIO, path: Path, own: bool) -> None:
    """Reads the archive. Raises UserError where a member is not what was written, or where there is none in ``own``."""
    try:
        with zipfile.ZipFile(file) as archive:
            # No checksum covers the directory of the archive, in which torch takes such members for empty.
            strange = [m for m in archive.infolist() if m.is_dir() or m.external_attr & 0x10 or m.compress_type]
            damaged = strange or archive.testzip()
    except Exception as error:  # zipfile raises whatever the damage led to
        if not own:
            return  # torch.load finds the fault, or the older format
        raise UserError(f"{path} is not a checkpoint of this project, or a truncated or damaged one") from error
    if damaged:
        raise UserError(f"{path} is damaged: its content does not match its checksum")


def _unpickled(file: BinaryIO, path: Path) -> Any:
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles that it refuses anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        code = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error))
        what = f"it holds {code[1]}" if code else "it is damaged, or holds more than tensors and plain values"
        how = "torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), KEY that of the weights"
        reason = f"{what}, which is not run{f'; where you trust it, resave the weights: {how}' if code else ''}"
        raise UserError(f"{path} is not a checkpoint: {reason} ({type(error).__name__})") from error


def load_state(trainer: Any, content: dict[str, Any], path: Path) -> None:
    """Empties ``content`` into ``trainer``. Raises UserError where no trainer like this one left it behind."""
    if "optimizer" not in content:
        raise UserError(f"{path} holds weights only: to continue, name the run's directory or its {LAST}")
    try:
        trainer.load_state_dict(content)
    except Exception as error:  # whatever a structure leads to that no trainer wrote: infinite counts, recursion, ...
        raise UserError(f"{path} is damaged: its state does not fit ({type(error).__name__}: {error})") from error
    content.clear()  # else its tensors would be held as long as the training runs


def last_of(run: str) -> Path:
    """The checkpoint to continue from: ``run`` itself, or the last one of the run directory ``run``."""
    path = Path(run)
    return path / LAST if os.path.isdir(path) else path


def best_of(run: str) -> Path:
    """The checkpoint to evaluate: ``run`` itself, or the best one of the run directory ``run``."""
    path = Path(run)
    return path / BEST if os.path.isdir(path) else path
