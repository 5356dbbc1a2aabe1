"""Published recordings of event cameras, in their archives or unpacked from them: which there are, and of what class.

CIFAR10-DVS: airplane.zip ... truck.zip. N-MNIST: Train.zip and Test.zip, of Train/0/00001.bin ...
N-Caltech101: Caltech101.zip. DVS128 Gesture: the folder DvsGesture, unpacked from its .tar.gz.
"""

import hashlib
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from ..errors import UserError
from .digits import CLASSES as DIGITS
from .event_readers import Camera, Events, spikingjelly_cifar10_dvs

# Of the archives: a class's label is its place here.
CIFAR10_DVS_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
GESTURES = (
    "hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter-clockwise",
    "left arm clockwise", "left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other",
)  # fmt: skip
MOST_EXPANSION = 50  # of an archive's member; deflated zeros expand 1000-fold

_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Source:
    """Recordings of one class, and of one split where it is published: (member, bytes) of each, by their numbers."""

    path: Path  # an archive, or a folder
    label: int
    name: str  # of the class
    split: str | None  # train or test; None: not published
    members: tuple[tuple[str, int], ...]
    camera: Camera

    def recordings(self, first: int, last: int) -> Iterator[tuple[str, Events]]:
        """(how to name it in an error, its events) from number ``first`` up to ``last``."""
        with tempfile.TemporaryDirectory() as scratch:
            for member, _ in self.members[first:last]:
                packed = not self.path.is_dir()
                name = f"{self.path}: {member}" if packed else str(self.path / member)
                path = self._extract(member, Path(scratch)) if packed else self.path / member
                yield name, self.camera.read(path, name)

    def _extract(self, name: str, scratch: Path) -> Path:
        target = scratch / "recording"  # never a name out of the archive, which may point anywhere
        try:
            with _opened(self.path).open(name) as member, target.open("wb") as file:
                shutil.copyfileobj(member, file)
        except _ZIP_ERRORS as error:
            raise UserError(f"{self.path}: {name} is corrupt ({error}): download the archive again") from error
        return target

    def label_of(self, index: int) -> int:
        return self.label

    def fingerprint(self, name: str) -> Hashable:
        """Of the content of a member."""
        if self.path.is_dir():
            return hashlib.sha256((self.path / name).read_bytes()).digest()
        return _opened(self.path).getinfo(name).CRC


def _opened(path: Path) -> zipfile.ZipFile:
    """An archive, whose directory of perhaps 60,000 members a process reads once."""
    return _open(path, os.getpid(), path.stat().st_mtime_ns)  # forked processes would share a file's position


@lru_cache(maxsize=2)
def _open(path: Path, process: int, changed: int) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (*_ZIP_ERRORS, OSError) as error:
        raise UserError(f"{path} is not a whole zip archive ({error}): download it again") from error


def find_cifar10_dvs(folder: Path, camera: Camera) -> list[Source]:
    """One source for each class. Raises UserError."""
    _check_is_there(folder, "CIFAR10-DVS")
    classes = CIFAR10_DVS_CLASSES
    places = {name: [folder / f"{name}.zip", folder / name] for name in classes}
    found = {name: next((path for path in paths if path.exists()), None) for name, paths in places.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        urls = {archive: url for archive, url, _ in spikingjelly_cifar10_dvs().CIFAR10DVS.resource_url_md5()}
        wanted = ", ".join(f"{name}.zip ({urls[f'{name}.zip']})" for name in missing)
        hint = "download them (CIFAR10-DVS on figshare), or extract them to folders"
        raise UserError(f"{folder} lacks {wanted}{in_other_form(folder)}: {hint}")
    sources = []
    for label, name in enumerate(classes):
        path, members = found[name], _recordings(found[name], camera)
        if len(members) < 2:
            raise UserError(f"{path} holds {len(members)} recordings (.aedat), not enough for both splits: replace it")
        for member, _ in members:
            others = set(re.split(r"[^a-z]+", member.lower())) & {*classes} - {name}
            if others:
                raise UserError(f"{path}: {member} is a recording of {others.pop()}, not of {name}: move it there")
        sources.append(Source(path, label, name, None, members, camera))
    _refuse_duplicates(sources)
    return sources


def find_n_mnist(folder: Path, camera: Camera) -> list[Source]:
    """One source for each class of each split. Raises UserError."""
    _check_is_there(folder, "N-MNIST")
    sources = []
    for split, name in (("train", "Train"), ("test", "Test")):
        path = next((path for path in (folder / f"{name}.zip", folder / name) if path.exists()), None)
        if path is None:
            hint = "download it (https://www.garrickorchard.com/datasets/n-mnist)"
            raise UserError(
                f"{folder} lacks {name}.zip, or the folder {name} unpacked from it{in_other_form(folder)}: {hint}"
            )
        by_class = defaultdict(list)
        for member, size in _recordings(path, camera):
            by_class[Path(member).parent.name].append((member, size))
        for label, digit in enumerate(DIGITS):
            if not by_class[digit]:
                raise UserError(f"{path} holds no recordings ({camera.suffix}) in {digit}/: replace it")
            sources.append(Source(path, label, digit, split, tuple(by_class[digit]), camera))
    _refuse_duplicates(sources)
    return sources


def find_n_caltech101(folder: Path, camera: Camera) -> list[Source]:
    """One source for each class, named by its folder; no split is published. Raises UserError."""
    _check_is_there(folder, "N-Caltech101")
    path = next((path for path in (folder / "Caltech101.zip", folder / "Caltech101") if path.exists()), None)
    if path is None:
        hint = "download it (https://www.garrickorchard.com/datasets/n-caltech101)"
        raise UserError(
            f"{folder} lacks Caltech101.zip, or the folder Caltech101 unpacked from it{in_other_form(folder)}: {hint}"
        )
    by_class = defaultdict(list)
    for member, size in _recordings(path, camera):
        by_class[Path(member).parent.name].append((member, size))
    sources = []
    for label, name in enumerate(sorted(by_class)):
        if len(by_class[name]) < 2:
            raise UserError(f"{path} holds a single recording in {name}/, not enough for both splits: replace it")
        sources.append(Source(path, label, name, None, tuple(by_class[name]), camera))
    if len(sources) < 2:
        raise UserError(f"{path} holds recordings ({camera.suffix}) of {len(sources)} classes: replace it")
    _refuse_duplicates(sources)
    return sources


@dataclass(frozen=True)
class Session(Source):
    """An hour's recording of DVS128 Gesture, of which each member is one trial."""

    trials: tuple[tuple[int, int, int], ...]  # label; first microsecond, and the one behind the last

    def label_of(self, index: int) -> int:
        return self.trials[index][0]

    def recordings(self, first: int, last: int) -> Iterator[tuple[str, Events]]:
        events = self.camera.read(self.path, str(self.path))
        for (member, _), (_, start, end) in zip(self.members[first:last], self.trials[first:last], strict=True):
            mask = (events["t"] >= start) & (events["t"] < end)  # trials may overlap
            yield f"{self.path}: {member}", {key: values[mask] for key, values in events.items()}


def find_gesture(folder: Path, camera: Camera) -> list[Source]:
    """One source for each session that the two tables of trials name. Raises UserError."""
    _check_is_there(folder, "DVS128 Gesture")
    place = folder / "DvsGesture" if (folder / "DvsGesture").is_dir() else folder
    sources = []
    for split in ("train", "test"):
        table = place / f"trials_to_{split}.txt"
        if not table.is_file():
            packed = folder / "DvsGesture.tar.gz"
            hint = (
                f"unpack it (tar -xzf {packed} -C {folder})" if packed.is_file() else "download DvsGesture.tar.gz (IBM)"
            )
            raise UserError(f"{place} lacks {table.name}{in_other_form(folder)}: {hint}")
        names = [line.strip() for line in table.read_text(errors="replace").splitlines() if line.strip()]
        sources += [_session(place, name, split, camera) for name in names]
        if not names:
            raise UserError(f"{table} names no session: replace it")
    return sources


def _session(place: Path, name: str, split: str, camera: Camera) -> Session:
    path = place / Path(name).name
    stem, table = path.stem, path.with_name(f"{path.stem}_labels.csv")
    for file in (path, table):
        if not file.is_file():
            raise UserError(
                f"{place} lacks {file.name}, of a session in trials_to_{split}.txt: unpack the archive again"
            )
    rows = []
    for line in table.read_text(errors="replace").splitlines()[1:]:  # class,startTime_usec,endTime_usec
        try:
            gesture, start, end = map(int, line.split(","))
        except ValueError:
            gesture, start, end = 0, 0, 0
        if not (1 <= gesture <= len(GESTURES) and 0 <= start < end):
            raise UserError(f"{table} holds {line[:80]!r}, no class from 1 to 11 with its times: replace it")
        rows.append((gesture - 1, start, end))
    if not rows:
        raise UserError(f"{table} names no trial: replace it")
    members = tuple((f"{stem}_{i}", path.stat().st_size) for i in range(len(rows)))
    return Session(path, 0, stem, split, members, camera, tuple(rows))


# How else recordings are kept, by the suffix of the files
FORMS = {
    ".aedat4": "AEDAT 4 recordings, which are not read: convert them to AEDAT 2.0",
    ".h5": "HDF5 files, which are not read",
    ".hdf5": "HDF5 files, which are not read",
    ".npz": "SpikingJelly's own cache: train on its frames_number_... folder by main.py --dataset FRAMES",
    ".aedat": "recordings: make frames of them by experiment/dvs/prepare.py",
    ".bin": "recordings: make frames of them by experiment/dvs/prepare.py",
    ".zip": "archives: make frames of them by experiment/dvs/prepare.py",
    ".gz": "archives: make frames of them by experiment/dvs/prepare.py",
}


def in_other_form(folder: Path) -> str:
    """What else lies in a folder, to be put into a message; nothing where that is not known."""
    files = (file for file in islice(folder.rglob("*"), 10_000) if file.suffix in FORMS)
    found = next(files, None)
    return f" (it holds {found.relative_to(folder)}, {FORMS[found.suffix]})" if found else ""


def _check_is_there(folder: Path, what: str) -> None:
    if not folder.is_dir():
        raise UserError(f"--archives {folder} is not a directory: name the one that holds the {what} archives")


def _recordings(path: Path, camera: Camera) -> tuple[tuple[str, int], ...]:
    """(member, bytes) of each recording in an archive or below a folder, by their numbers. Raises UserError."""
    if path.is_dir():
        files = (file for file in path.rglob(f"*{camera.suffix}") if file.is_file())
        sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
    else:
        infos = [info for info in _opened(path).infolist() if not info.is_dir()]
        size = path.stat().st_size
        for info in infos:
            if info.file_size > MOST_EXPANSION * min(info.compress_size, size):
                fault = f"expands more than {MOST_EXPANSION}-fold, as no recording does"
                raise UserError(f"{path}: {info.filename} {fault}: replace it")
        sizes = {info.filename: info.file_size for info in infos}
    chosen = (item for item in sizes.items() if _is_recording(Path(item[0]), camera.suffix))
    return tuple(sorted(chosen, key=_by_number))


def _refuse_duplicates(sources: Sequence[Source]) -> None:
    """Raises UserError for two recordings of the same content: one might be trained on, the other tested on."""
    alike = defaultdict(list)
    for source in sources:
        for name, size in source.members:
            alike[source.label, size].append((source, name))
    for members in alike.values():
        seen = {}
        for source, name in members if len(members) > 1 else ():  # a size of its own: its content need not be read
            twin, where = seen.setdefault(source.fingerprint(name), (name, source.path))
            if (twin, where) != (name, source.path):
                pair = f"{name} and {twin}" if where == source.path else f"{name} and {where}: {twin}"
                raise UserError(f"{source.path}: {pair} are the same recording: remove one of each such pair")


def _is_recording(name: Path, suffix: str) -> bool:
    return name.suffix == suffix and not name.name.startswith(".")  # "._x.aedat" is what a Mac adds to an archive


def _by_number(member: tuple[str, int]) -> tuple:
    """cifar10_cat_2.aedat comes before cifar10_cat_10.aedat, wherever they lie."""
    name = Path(member[0]).name
    return [int(digits) for digits in re.findall(r"\d+", name)], name, member[0]
