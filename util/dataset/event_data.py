"""The event-camera data sets: what is known of each, the two layouts they are read from, and their augmentation.

A sample is (frames: float tensor [T, 2, H, W], label: int). Layout a: `train/0.pt ...` and `test/0.pt ...`, each a pair
(frames, label), as published code reads them. Layout b: what `experiment/dvs/prepare.py` writes (`event_frames`).
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .checksums import cache_root, fingerprint, fingerprint_of_files
from .digits import CLASSES as DIGITS
from .digits_dvs import SENSOR, digits_frames
from .event_frames import (
    KINDS,
    MANIFEST,
    SPLITS,
    check_content,
    check_finite,
    checksums,
    frame_files,
    frame_kind_of,
    integrate_events,
    read_manifest,
    resize_frames,
)
from .event_readers import ATIS_34, ATIS_240, DVS128, DVS128_GESTURE, Camera
from .event_sources import (
    CIFAR10_DVS_CLASSES,
    GESTURES,
    Source,
    find_cifar10_dvs,
    find_gesture,
    find_n_caltech101,
    find_n_mnist,
    in_other_form,
)
from .files import FileReader, check_directory, visible


@dataclass(frozen=True)
class Published:
    """What there is of a data set to prepare, by experiment/dvs/prepare.py."""

    name: str
    camera: Camera
    find: Callable[[Path, Camera], list[Source]]  # in the folder of the archives
    recordings: int  # all of them
    alike: bool = False  # those of a class are about as long as one another


@dataclass(frozen=True)
class EventDatasetSpec:
    classes: Sequence[str]  # the name of each label; none: as the data name them
    frame_size: int | None  # pixels a side; None: as the frames are
    flip: bool  # a mirrored animal is an animal, a mirrored digit is no digit
    roll: int  # the most pixels by which a recording is shifted
    frames: str  # the default kind, of event_frames.KINDS
    published: Published | None = None
    channels: int = 2  # one for each polarity

    script: ClassVar[str] = "experiment/dvs/main.py"

    def file_reader(self, config: dict[str, Any]) -> FileReader | None:
        """Of recordings, for the network of a run with this configuration; None where there is no such run."""
        kind, time_steps = config.get("frames"), config.get("T")
        if kind not in (None, *KINDS) or type(time_steps) is not int:
            return None
        read = partial(read_frames, spec=self, time_steps=time_steps, kind=kind)
        return FileReader(self.channels, (self.camera.suffix, ".pt") if self.frame_size else (".npz",), read)

    @property
    def camera(self) -> Camera:
        """What reads a recording: the simulated camera writes none."""
        return self.published.camera if self.published else DVS128


DATASETS: dict[str, EventDatasetSpec] = {
    "CIFAR10_DVS_Aug": EventDatasetSpec(
        classes=CIFAR10_DVS_CLASSES, frame_size=48, flip=True, roll=5, frames="published",
        published=Published("CIFAR10-DVS", DVS128, find_cifar10_dvs, recordings=10_000, alike=True),
    ),
    "N_MNIST": EventDatasetSpec(
        classes=DIGITS, frame_size=34, flip=False, roll=3, frames="counts",
        published=Published("N-MNIST", ATIS_34, find_n_mnist, recordings=70_000),
    ),
    "DVS128_GESTURE": EventDatasetSpec(
        classes=GESTURES, frame_size=128, flip=False, roll=5, frames="counts",
        published=Published("DVS128 Gesture", DVS128_GESTURE, find_gesture, recordings=1464),
    ),
    "N_CALTECH101": EventDatasetSpec(
        classes=(), frame_size=48, flip=True, roll=5, frames="counts",
        published=Published("N-Caltech101", ATIS_240, find_n_caltech101, recordings=8709),
    ),
    "FRAMES": EventDatasetSpec(classes=(), frame_size=None, flip=False, roll=5, frames="counts"),
    "DIGITS_DVS": EventDatasetSpec(classes=DIGITS, frame_size=SENSOR, flip=False, roll=5, frames="counts"),
}  # fmt: skip


class Recordings(Protocol):
    """One split of one layout."""

    classes: Sequence[str]  # the name of each label
    labels: Sequence[int]  # of each recording

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    def fingerprint(self) -> str:
        """The same for the same recordings, wherever they lie."""


class EventDataset(Dataset):
    """Recordings, brought to the frames that a network sees and augmented where they are for training.

    ``classes``: the name of each label; ``kind``: of the frames, of `event_frames.KINDS`; ``transform`` augments.
    """

    def __init__(
        self,
        recordings: Recordings,
        classes: Sequence[str],
        resize: Callable[[Tensor], Tensor],
        transform: Callable[[Tensor], Tensor] | None,
        kind: str,
    ) -> None:
        self.recordings, self.classes, self.resize, self.transform = recordings, classes, resize, transform
        self.kind = kind

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames, label = self.recordings[index]
        frames = self.resize(frames)
        return frames if self.transform is None else self.transform(frames), label

    @property
    def labels(self) -> Sequence[int]:
        return self.recordings.labels

    def fingerprint(self) -> str:
        return self.recordings.fingerprint()


@dataclass(frozen=True)
class FlipAndRoll:
    """A random horizontal flip, then a cyclic shift of up to ``roll`` pixels in y and x, alike for all frames."""

    flip: bool
    roll: int

    def __call__(self, frames: Tensor) -> Tensor:
        flipped = bool(torch.rand(()) < 0.5)
        shifts = torch.randint(-self.roll, self.roll + 1, (2,)).tolist()
        return torch.roll(frames.flip(-1) if self.flip and flipped else frames, shifts, dims=(-2, -1))


def load_event_dataset(
    name: str, data_path: str | os.PathLike | None, time_steps: int, augment: bool = True, frames: str | None = None
) -> tuple[EventDataset, EventDataset]:
    """The training set, with augmentation unless switched off, and the test set, which never has it.

    DIGITS_DVS is made on first use, below ``data_path`` or else in the user's cache directory.

    Args:
        frames: their kind, of `event_frames.KINDS`; None is that of which they were prepared, else the data set's own:
            "published" for CIFAR10_DVS_Aug, "counts" for the others.

    Raises:
        UserError: the data are missing, damaged, have another number of frames than ``time_steps``, or were prepared as
            another kind than ``frames``. What is wrong with a single recording of layout a is found when it is read.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    if frames not in (None, *KINDS):
        raise UserError(f"unknown kind of frames {frames!r}: choose one of {', '.join(KINDS)}")
    if name == "DIGITS_DVS":
        folder = digits_frames(Path(data_path).expanduser() if data_path else cache_root(), time_steps)
    elif data_path:
        folder = Path(data_path).expanduser()
    else:
        raise UserError(f"{name} needs --data_path DIR: {_WANTED}")
    if name == "FRAMES":
        train, test = _npz_folders(folder, time_steps)
        if frames == "published":
            raise UserError("--frames published is of CIFAR10-DVS: leave it out with --dataset FRAMES")
    else:
        train, test = (_layout(folder)(folder, split, time_steps, spec) for split in SPLITS)
    if (folder / MANIFEST).is_file():
        check_content(folder)
    # The cache of DIGITS_DVS serves both kinds: it holds the counts of whole events, at the sensor's own size.
    prepared = (folder / MANIFEST).is_file() and name != "DIGITS_DVS"
    kind = frames or (train.kind if prepared else spec.frames)
    if prepared:
        _check_prepared(folder, kind, train, spec.frame_size)
    resize = (
        partial(resize_frames if prepared else KINDS[kind].resize, size=spec.frame_size)
        if spec.frame_size
        else _as_they_are
    )
    augmentation = FlipAndRoll(spec.flip, spec.roll) if augment else None
    return tuple(
        EventDataset(recordings, train.classes, resize, augmented, kind)
        for recordings, augmented in ((train, augmentation), (test, None))
    )


def _as_they_are(frames: Tensor) -> Tensor:
    return frames


def _check_prepared(folder: Path, asked: str, recordings: "FrameFolder", size: int) -> None:
    """Raises UserError where the frames in ``folder`` are of another kind, or published ones of another size."""
    if recordings.kind != asked:
        hint = f"use --frames {recordings.kind}, or prepare them again with --frame_kind {asked}"
        raise UserError(f"--frames {asked} asked for, but {folder} was prepared as {recordings.kind}: {hint}")
    if asked == "published" and recordings.shape[3:] != (size, size):
        found = "x".join(map(str, recordings.shape[3:]))
        raise UserError(f"{folder} holds published frames of {found} pixels, not {size}x{size}: prepare them again")


_WANTED = f"a directory with train/0.pt ... and test/0.pt ..., or with the {MANIFEST} of experiment/dvs/prepare.py"


def _layout(folder: Path) -> Callable[[Path, str, int, EventDatasetSpec], Recordings]:
    if folder.is_dir():
        check_directory(folder)
    if (folder / MANIFEST).is_file():
        return FrameFolder
    other = in_other_form(folder) if folder.is_dir() else ""
    if all((folder / split).is_dir() for split in SPLITS) and not other:
        return PtFolder
    raise UserError(f"{folder} is not {_WANTED}{other}")


def _check(frames: Any, label: Any, time_steps: int, num_classes: int, source: Any) -> tuple[Tensor, int]:
    """The pair as (float tensor [T, 2, H, W], int); UserError naming ``source`` where it is none."""
    if not _is_plain(frames) or frames.is_complex() or frames.ndim != 4 or frames.shape[1] != 2:
        found = f"a tensor of shape {list(frames.shape)}" if _is_plain(frames) else f"a {type(frames).__name__}"
        raise UserError(f"{source} holds {found} as frames, where a tensor [T, 2, H, W] belongs: replace it")
    if frames.numel() * frames.element_size() > frames.untyped_storage().nbytes():
        raise UserError(
            f"{source} holds frames that share their memory (stride {frames.stride()}): save a copy of them"
        )
    if not frames.numel():
        raise UserError(f"{source} holds no frames (shape {list(frames.shape)}): remove or replace it")
    _check_time_steps(len(frames), time_steps, source)
    value = label.item() if _is_plain(label) and label.numel() == 1 else label
    if not isinstance(value, int | float) or value not in range(num_classes):
        raise UserError(f"{source} has the label {value!r}, which is not one of 0 to {num_classes - 1}: replace it")
    return check_finite(frames.detach().float(), source), int(value)


def _is_plain(x: Any) -> bool:
    """Whether ``x`` is a tensor with its values in the CPU's memory, one after the other."""
    if not isinstance(x, Tensor) or x.is_nested or x.is_quantized:
        return False
    return x.layout is torch.strided and x.device.type == "cpu"


def _check_time_steps(found: int, asked: int, source: Any) -> None:
    if found != asked:
        raise UserError(f"--T {asked} asked for, but {source} has {found} frames: use --T {found} or other data")


def _refuse_disguises(path: Path) -> None:
    """Raises UserError for what may block for ever or unpack to far more than its size; torch.save makes neither."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: replace it by one")
    try:
        with zipfile.ZipFile(path) as archive:
            packed = any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # torch.load finds the fault, or the older format
    if packed:
        raise UserError(f"{path} is a compressed archive, which torch.save does not write: replace it")


def _load_pair(path: Path) -> tuple[Any, Any]:
    """What a .pt file of layout a holds. Raises UserError."""
    _refuse_disguises(path)
    try:
        pair = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage led to
        cause = "truncated, corrupt, or a pickle of more than tensors and numbers (of NumPy arrays, say), not run"
        raise UserError(f"{path} cannot be read ({cause}): replace it by an intact file") from error
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{path} holds a {type(pair).__name__}, where a pair (frames, label) belongs: replace it")
    return tuple(pair)


def read_frames(path: Path, spec: EventDatasetSpec, time_steps: int, kind: str | None = None) -> Tensor:
    """A single recording, of no split: frames [T, 2, H, W] as a network sees them, without augmentation.

    Args:
        path: a recording of the data set's own camera, or a .pt file with (frames, label), whose label does not matter.
        kind: of the frames, of `event_frames.KINDS`; None is the data set's own.

    Raises:
        UserError: it is neither, or damaged, or has another number of frames than ``time_steps``.
    """
    resize = KINDS[kind or spec.frames].resize
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    if path.suffix == ".pt":
        frames, _ = _check(_load_pair(path)[0], 0, time_steps, 1, path)
    elif path.suffix == ".npz":
        frames, _ = _check(read_npz(path), 0, time_steps, 1, path)
    else:
        events = spec.camera.read(path, str(path))
        counts = integrate_events(events, time_steps, spec.camera.height, spec.camera.width, path)
        frames = check_finite(torch.from_numpy(counts).float(), path)
    return resize(frames, spec.frame_size) if spec.frame_size else frames


class PtFolder:
    """Layout a: one file for each recording, numbered from 0."""

    def __init__(self, folder: Path, split: str, time_steps: int, spec: EventDatasetSpec) -> None:
        if not spec.classes:
            raise UserError(f"{folder} names no classes: give a directory that experiment/dvs/prepare.py has made")
        self.folder, self.time_steps, self.classes = folder / split, time_steps, spec.classes
        names = {path.name for path in self.folder.glob("*.pt")}
        self.length = len(names)
        missing = next((f"{i}.pt" for i in range(self.length or 1) if f"{i}.pt" not in names), None)
        if missing:
            hint = f"the {self.length} .pt files there have to be numbered from 0 without a gap"
            raise UserError(f"{self.folder / missing} is missing: {hint}")
        self[0]  # a wrong number of frames is to be known before training starts

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> list[int]:
        """Reads every file."""
        return [self[index][1] for index in range(self.length)]

    def fingerprint(self) -> str:
        paths = [self.folder / f"{index}.pt" for index in range(self.length)]
        return fingerprint_of_files(paths, [path.name for path in paths])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.folder / f"{index}.pt"
        return _check(*_load_pair(path), self.time_steps, len(self.classes), path)


class FrameFolder:
    """Layout b: all recordings of a split in one file, of which only what is asked for is read."""

    def __init__(self, folder: Path, split: str, time_steps: int, spec: EventDatasetSpec) -> None:
        self.kind = frame_kind_of(folder)
        self.classes, num_classes = _classes_of(folder, spec)
        self.checksums = checksums(read_manifest(folder), [split])
        self.shape = tuple(read_manifest(folder)["splits"][split]["shape"])
        self.frames_path, labels_path = (folder / name for name in frame_files(split))
        self.time_steps, self.num_classes = time_steps, num_classes
        _check_time_steps(self.shape[1], time_steps, folder)
        if not self.shape[0]:
            raise UserError(f"{self.frames_path} holds no recordings: prepare more of them")
        self.labels = _load_array(labels_path, self.shape[:1], "i")
        outside = [int(label) for label in (self.labels.min(), self.labels.max()) if label not in range(num_classes)]
        if outside:
            raise UserError(f"{labels_path} has the label {outside[0]}, which is not one of 0 to {num_classes - 1}")
        self[0]

    @cached_property
    def frames(self) -> np.ndarray:
        return _load_array(self.frames_path, self.shape, KINDS[self.kind].dtype.kind, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the file itself: pickled, a mapped array is a copy of the whole file.
        return {key: value for key, value in self.__dict__.items() if key != "frames"}

    def __len__(self) -> int:
        return self.shape[0]

    def fingerprint(self) -> str:
        return fingerprint(repr(sorted(self.checksums.items())).encode())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = KINDS[self.kind].restored(self.frames[index])
        source = f"{self.frames_path} (recording {index})"
        return _check(frames, int(self.labels[index]), self.time_steps, self.num_classes, source)


def _classes_of(folder: Path, spec: EventDatasetSpec) -> tuple[Sequence[str], int]:
    """The names in a manifest, and their number. Raises UserError where it is another data set's."""
    settings = read_manifest(folder)["settings"]
    source = settings.get("source") if spec.published else None
    if source is not None and source != spec.published.name:
        raise UserError(f"{folder} holds frames of {source}, not of {spec.published.name}: name its --dataset")
    names = spec.classes or settings.get("classes")
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / MANIFEST} names no classes: prepare the frames again")
    return names, len(names)


MOST_EXPANSION = 200  # of a compressed file of frames, most of whose counts are 0


class NpzFolder:
    """What SpikingJelly caches, as in frames_number_10_split_by_number: CLASS/*.npz with ``frames`` [T, 2, H, W]."""

    def __init__(self, folder: Path, time_steps: int) -> None:
        check_directory(folder)
        self.folder, self.time_steps = folder, time_steps
        below = visible((path for path in folder.iterdir() if path.is_dir()), folder)
        self.classes = sorted((path.name for path in below), key=lambda name: (not name.isdecimal(), name.zfill(9)))
        files = {name: sorted((folder / name).glob("*.npz")) for name in self.classes}
        empty = next((name for name in self.classes if not files[name]), None)
        if empty or not files:
            place = folder / empty if empty else folder
            wanted = "no .npz file" if empty else "no folder of .npz files a class"
            raise UserError(f"{place} holds {wanted}{in_other_form(place)}: give SpikingJelly's folder of frames")
        self.paths = [path for name in self.classes for path in files[name]]
        self.labels = [label for label, name in enumerate(self.classes) for _ in files[name]]
        self.size = None
        self.size = tuple(self[0][0].shape[2:])

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        return fingerprint_of_files(self.paths, [str(path.relative_to(self.folder)) for path in self.paths])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.paths[index], self.labels[index]
        frames, label = _check(read_npz(path), label, self.time_steps, len(self.classes), path)
        if self.size not in (None, tuple(frames.shape[2:])):
            found, usual = ("x".join(map(str, size)) for size in (frames.shape[2:], self.size))
            raise UserError(f"{path} has frames of {found} pixels, and others there of {usual}: keep them apart")
        return frames, label


def _npz_folders(folder: Path, time_steps: int) -> tuple[NpzFolder, NpzFolder]:
    lacking = [split for split in SPLITS if not (folder / split).is_dir()]
    if lacking:
        raise UserError(
            f"{folder} lacks {lacking[0]}/: it has to hold train/ and test/, as SpikingJelly's folders of frames do"
        )
    train, test = (NpzFolder(folder / split, time_steps) for split in SPLITS)
    alone = sorted(set(train.classes) ^ set(test.classes))
    if alone:
        raise UserError(
            f"{folder}: the class {alone[0]} is in one of train/ and test/ alone: both need the same classes"
        )
    if train.size != test.size:
        found = " and ".join("x".join(map(str, part.size)) for part in (train, test))
        raise UserError(f"{folder} holds frames of {found} pixels in train/ and test/: keep them apart")
    return train, test


def read_npz(path: Path) -> Tensor:
    """The array ``frames`` of a file, whose memory its header and its size agree on. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if "frames.npy" not in archive.namelist():
                events = (
                    "events, of which SpikingJelly makes frames" if "t.npy" in archive.namelist() else "other arrays"
                )
                raise UserError(f"{path} holds {events}, where an array called frames belongs: give a folder of frames")
            member = archive.getinfo("frames.npy")
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
                    version
                ]
                shape, _, dtype = header(file)
                stated = file.tell() + prod(shape) * dtype.itemsize
        if (
            member.file_size > MOST_EXPANSION * member.compress_size
            or stated != member.file_size
            or dtype.kind not in "fiub"
        ):
            raise ValueError("its size does not fit its content, or it holds no numbers")
        with np.load(path, allow_pickle=False) as content:
            return torch.from_numpy(np.asarray(content["frames"], np.float32))
    except UserError:
        raise
    except Exception as error:  # NumPy and zipfile raise whatever the damage led to
        raise UserError(f"{path} is truncated or corrupt ({error}): replace it by an intact file") from error


def _load_array(path: Path, shape: tuple[int, ...], kind: str, **options: Any) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False, **options)
    except Exception as error:  # NumPy parses the header as Python, and raises whatever the damage led to
        raise UserError(f"{path} is truncated or corrupt: prepare its directory again") from error
    if array.shape != shape or array.dtype.kind != kind:
        found = f"{array.dtype} of shape {list(array.shape)}"
        raise UserError(f"{path} holds {found}, not {list(shape)} as {MANIFEST} says: prepare its directory again")
    return array
