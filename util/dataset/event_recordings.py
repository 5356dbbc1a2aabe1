"""The recordings of CIFAR10-DVS, in the ten published archives or extracted from them, read by SpikingJelly."""

import hashlib
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import UserError

# Of the archives: a class's label is its place here.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MOST_EXPANSION = 50  # of an archive's member; deflated zeros expand 1000-fold
PER_CLASS = 1000  # recordings of a class, as published
HEIGHT = WIDTH = 128


class NumPyWithBool(ModuleType):
    """NumPy as SpikingJelly 0.0.0.0.14 expects it, with the np.bool that NumPy 1.24 to 1.26 do not have."""

    bool = np.bool_

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@cache
def spikingjelly_cifar10_dvs() -> ModuleType:
    """SpikingJelly's module of that name, whose package imports matplotlib, torchaudio and more."""
    from spikingjelly.datasets import cifar10_dvs

    if "bool" not in vars(np):
        cifar10_dvs.np = NumPyWithBool("numpy")  # for its own use alone
    return cifar10_dvs


_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """The recordings of one class: an archive or a folder, and (member, bytes) of each, ordered by their numbers."""

    path: Path
    label: int
    members: tuple[tuple[str, int], ...]

    @contextmanager
    def extracted(self, first: int, last: int) -> Iterator[Iterator[tuple[str, Path]]]:
        """(how to name it in an error, file) of the recordings from ``first`` up to ``last``."""
        names = [name for name, _ in self.members[first:last]]
        if self.path.is_dir():
            yield ((str(self.path / name), self.path / name) for name in names)
            return
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(self.path) as archive:
            yield ((f"{self.path}: {name}", self._extract(archive, name, Path(scratch))) for name in names)

    def _extract(self, archive: zipfile.ZipFile, name: str, scratch: Path) -> Path:
        target = scratch / "recording.aedat"  # never a name out of the archive, which may point anywhere
        try:
            with archive.open(name) as member, target.open("wb") as file:
                shutil.copyfileobj(member, file)
        except _ZIP_ERRORS as error:
            raise UserError(f"{self.path}: {name} is corrupt ({error}): download the archive again") from error
        return target


def find_sources(folder: Path) -> list[Source]:
    """One source for each class. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"--archives {folder} is not a directory: name the one that holds the CIFAR10-DVS archives")
    places = {name: [folder / f"{name}.zip", folder / name] for name in CLASSES}
    found = {name: next((path for path in paths if path.exists()), None) for name, paths in places.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        urls = {archive: url for archive, url, _ in spikingjelly_cifar10_dvs().CIFAR10DVS.resource_url_md5()}
        wanted = ", ".join(f"{name}.zip ({urls[f'{name}.zip']})" for name in missing)
        raise UserError(f"{folder} lacks {wanted}: download them (CIFAR10-DVS on figshare), or extract them to folders")
    return [_source(found[name], label) for label, name in enumerate(CLASSES)]


def _source(path: Path, label: int) -> Source:
    if path.is_dir():
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*.aedat") if file.is_file()}

        def fingerprint(name: str) -> Hashable:
            return hashlib.sha256((path / name).read_bytes()).digest()
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
        except (*_ZIP_ERRORS, OSError) as error:
            raise UserError(f"{path} is not a whole zip archive ({error}): download it again") from error
        sizes = {name: info.file_size for name, info in infos.items()}
        size = path.stat().st_size
        for name, info in infos.items():
            if info.file_size > MOST_EXPANSION * min(info.compress_size, size):
                fault = f"expands more than {MOST_EXPANSION}-fold, as no recording does"
                raise UserError(f"{path}: {name} {fault}: replace it")

        def fingerprint(name: str) -> Hashable:
            return infos[name].CRC

    members = sorted((item for item in sizes.items() if _is_recording(Path(item[0]))), key=_by_number)
    if len(members) < 2:
        raise UserError(f"{path} holds {len(members)} recordings (.aedat), not enough for both splits: replace it")
    for name, _ in members:
        others = set(re.split(r"[^a-z]+", name.lower())) & {*CLASSES} - {CLASSES[label]}
        if others:
            raise UserError(f"{path}: {name} is a recording of {others.pop()}, not of {CLASSES[label]}: move it there")
    _refuse_duplicates(path, members, fingerprint)
    return Source(path, label, tuple(members))


def _refuse_duplicates(path: Path, members: list[tuple[str, int]], fingerprint: Callable[[str], Hashable]) -> None:
    """Raises UserError for two recordings of the same content: one might be trained on, the other tested on."""
    by_size = defaultdict(list)
    for name, size in members:
        by_size[size].append(name)
    for names in by_size.values():
        seen = {}
        for name in names if len(names) > 1 else ():  # a size of its own: its content need not be read
            twin = seen.setdefault(fingerprint(name), name)
            if twin != name:
                raise UserError(f"{path}: {name} and {twin} are the same recording: remove one of each such pair")


def _is_recording(name: Path) -> bool:
    return name.suffix == ".aedat" and not name.name.startswith(".")  # "._x.aedat" is what a Mac adds to an archive


def _by_number(member: tuple[str, int]) -> tuple:
    """cifar10_cat_2.aedat comes before cifar10_cat_10.aedat, wherever they lie."""
    name = Path(member[0]).name
    return [int(digits) for digits in re.findall(r"\d+", name)], name, member[0]


def read_recording(path: Path, name: str) -> dict[str, np.ndarray]:
    """The events of an .aedat file, through SpikingJelly's reader. Raises UserError, calling the file ``name``."""
    with path.open("rb") as file:
        header = file.read(32)
    if not header:
        raise UserError(f"{name} is empty: replace it by an intact file")
    if not header.startswith(b"#"):
        raise UserError(f"{name} has no AEDAT header: replace it by an intact file")
    version = re.match(rb"#!AER-DAT([\d.]+)", header)
    if version and not version[1].startswith(b"2"):
        found = f"AEDAT {version[1].decode()}"
        raise UserError(f"{name} is of the format {found}, and CIFAR10-DVS of AEDAT 2.0: convert or replace it")
    reader = spikingjelly_cifar10_dvs()
    # Renamed between releases, otherwise the same function.
    load = getattr(reader.CIFAR10DVS, "load_origin_data", None) or reader._load_origin_data
    try:
        events = load(str(path))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        if "fromstring" in str(error):
            raise UserError(f"this SpikingJelly reads .aedat files with numpy<2.3 only: {error}") from error
        raise UserError(f"{name} is truncated or corrupt ({error}): replace it by an intact file") from error
    time = events["t"]
    # A real recording may step back where its clock was reset, a random one does half of the time.
    if np.count_nonzero(time[1:] < time[:-1]) > 0.1 * len(time):
        raise UserError(f"{name} is corrupt (its time stamps are in no order): replace it by an intact file")
    return events
