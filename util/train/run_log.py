"""What a run leaves behind in its directory: configuration, train.log, metrics.jsonl and TensorBoard events."""

import contextlib
import functools
import json
import logging
import os
import platform
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import RunError, UserError
from ..staging import sweep
from .checkpoint import sync_directory
from .distributed import is_first
from .lock import locked
from .tensorboard_file import EventFile, event_files

PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "tensorboard", "scikit-learn")


# TensorBoard shows in one chart what several event files call alike, and charts in groups, in alphabetical order:
# accuracy, loss, lr, neurons, speed. A run has train and one of the others.
CURVES = ("train", "validation", "test")
FIRING_RATE = "neurons/firing_rate/"


class Logged(NamedTuple):
    """An epoch as the logs show it."""

    metrics: dict[str, Any]  # a line of metrics.jsonl
    scalars: dict[str, float]  # one of CURVES/TensorBoard tag -> value
    time: float  # seconds since 1970

    @property
    def firing_rates(self) -> dict[str, float]:
        """Layer -> its mean rate in training, between 0 and 1."""
        start = f"train/{FIRING_RATE}"
        return {tag.removeprefix(start): value for tag, value in self.scalars.items() if tag.startswith(start)}


@contextlib.contextmanager
def new_run_directory(log_path: str, name: str, fill: Callable[[Path], None], stamped: bool = True) -> Iterator[Path]:
    """Makes ``log_path/name_DATE-TIME``, with a number behind it if that exists; it appears with what ``fill`` wrote.

    Not ``stamped``, it is ``log_path/name``.

    It is locked before it appears, until the context is left: whoever finds it cannot continue it in between.

    Raises:
        UserError: it cannot be made, and nothing of it is left.
    """
    full_name = f"{name}_{time.strftime('%Y%m%d-%H%M%S')}" if stamped else name
    unfinished = Path(log_path) / f".{full_name}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as lock:
        try:
            unfinished.mkdir(parents=True)
            sweep(unfinished.parent, f".{full_name}-{'[0-9a-f]' * 8}")
            sweep(unfinished.parent, f".*_{'[0-9]' * 8}-{'[0-9]' * 6}-{'[0-9a-f]' * 8}")
            lock.enter_context(locked(unfinished))  # a lock of the directory, whatever its name
            fill(unfinished)
            directory = _moved(unfinished, Path(log_path) / full_name, attempts=999 if stamped else 1)
        except OSError as error:
            raise UserError(f"cannot write to --log_path {log_path}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        yield directory


def _moved(unfinished: Path, wanted: Path, attempts: int = 999) -> Path:
    for attempt in range(1, attempts + 1):
        directory = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}-{attempt}")
        try:
            unfinished.rename(directory)
        except OSError:
            if os.path.lexists(directory):  # of another run: one that holds files cannot be replaced
                continue
            raise
        sync_directory(directory.parent)
        return directory
    if attempts == 1:
        raise UserError(f"{wanted} has just been made by another process: let it train, or choose another --run")
    raise UserError(f"{wanted.parent} holds too many runs called {wanted.name}")


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json: the options, the command, and the versions of Python and the packages. Raises OSError."""
    content = json.dumps({"options": dict(config), **_provenance()}, indent=2)
    (directory / "config.json").write_text(content + "\n")


def log_to_console() -> None:
    """Sends the messages of this project to stdout; where that is closed or full, they are in train.log alone.

    Of several processes the first one's alone.
    """
    logging.raiseExceptions = False
    level = logging.INFO if is_first() else logging.CRITICAL
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout, force=True)


class _RunFile(logging.FileHandler):
    """train.log, on whose failure the run ends as on any other file's."""

    def handleError(self, record: logging.LogRecord) -> NoReturn:  # noqa: N802
        error = sys.exc_info()[1]
        raise RunError(f"cannot write {self.baseFilename}: {getattr(error, 'strerror', None) or error}") from error


class RunLog:
    """Writes the files of one run. A context manager: leaving it closes them."""

    def __init__(self, directory: Path, logged: Iterable[Logged] = (), config: Mapping[str, Any] | None = None):
        """``logged``: the epochs already done. A killed run may have written more: the files are made to hold these.

        ``config``: the options, which TensorBoard gets as a text.

        Raises:
            RunError: they cannot be written.
        """
        self.directory = directory
        with self._naming_files():
            self._file = _RunFile(directory / "train.log", encoding="utf-8", errors="backslashreplace")
            self._file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
            logged, old = list(logged), event_files(directory)
            replace_text(directory / "metrics.jsonl", "".join(map(_line, logged)))
            self._events: dict[str, EventFile] = {}
            if config:
                began = logged[0].time if logged else time.time()
                self._curve("train").add_text("configuration", _table(config), began)
            for epoch in logged:
                self._add_scalars(epoch)
            self._flush()
            for path in old:
                path.unlink()
        logging.getLogger().addHandler(self._file)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self._file)
        for file in (self._file, *self._events.values()):
            with contextlib.suppress(OSError):  # a full disk has been told of by then
                file.close()

    def epoch(self, logged: Logged) -> None:
        """Adds one epoch to metrics.jsonl and to the event file. Raises RunError."""
        with self._naming_files():
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(_line(logged))
            self._add_scalars(logged)
            self._flush()

    def _add_scalars(self, logged: Logged) -> None:
        for curve in CURVES:
            own = {tag: value for tag, value in logged.scalars.items() if tag.startswith(f"{curve}/")}
            if own:
                values = {tag.partition("/")[2]: value for tag, value in own.items()}
                self._curve(curve).add(values, logged.metrics["epoch"], logged.time)

    def _curve(self, name: str) -> EventFile:
        if name not in self._events:
            self._events[name] = EventFile(self.directory / name)
        return self._events[name]

    def _flush(self) -> None:
        for events in self._events.values():
            events.flush()

    @contextlib.contextmanager
    def _naming_files(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"cannot write to {self.directory}: {error.strerror or error}") from error


def _line(logged: Logged) -> str:
    return json.dumps({**logged.metrics, "firing_rates": logged.firing_rates}) + "\n"


def _table(config: Mapping[str, Any]) -> str:
    """Markdown."""
    command = shlex.join(sys.argv)
    rows = [f"| {name} | `{value}` |" for name, value in sorted(config.items())]
    return "\n".join(
        [f"    {command}", "", f"code: {code_version()}", "", "| option | value |", "| --- | --- |", *rows]
    )


def replace_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises OSError."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


@functools.cache
def code_version() -> str | None:
    """The git commit of this code, with a + where files were changed since; None where git does not tell."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run([*git, *what], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for what in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _provenance() -> dict[str, Any]:
    """The command, the code, the platform, and the versions of the packages that made the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": sys.argv,
        "code": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
