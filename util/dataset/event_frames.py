"""From events to frames, and the folder of prepared frames: `manifest.json` and, for each split, two .npy files.

Real and simulated recordings pass through the same functions. Frames are of one of two kinds, KINDS; what is stored of
either is read back as it was.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from ..errors import UserError
from .checksums import check_once, file_digest

MANIFEST = "manifest.json"
FORMAT = {"format": "event-frames", "version": 1}
SPLITS = ("train", "test")
LARGEST = torch.finfo(torch.float16).max


def integrate_events(events: Any, time_steps: int, height: int, width: int, source: Any) -> np.ndarray:
    """Counts [T, 2, H, W] of the events in T runs of equal number; channel 0: polarity 0, channel 1: polarity 1.

    ``events``: arrays by the names t, x, y and p, in a dict or a structured array.

    Raises:
        UserError: ``source`` has fewer events than frames, or events outside the sensor.
    """
    count = len(events["t"])
    if count < time_steps:
        raise UserError(f"{source} holds {count} events, too few for {time_steps} frames: remove or replace it")
    if any(not 0 <= events[axis].min() <= events[axis].max() < size for axis, size in (("x", width), ("y", height))):
        raise UserError(f"{source} holds events outside the {width}x{height} sensor: replace it by an intact file")
    from spikingjelly.datasets import integrate_events_by_fixed_frames_number  # imports matplotlib, torchaudio, ...

    return integrate_events_by_fixed_frames_number(events, "number", time_steps, height, width)


def resize_frames(frames: Tensor, size: int) -> Tensor:
    """[T, 2, H, W] -> [T, 2, size, size], each polarity on its own; rounded to what float16 holds, returned as float32.

    Bilinear with antialiasing: a pixel is a weighted mean of the counts it covers, none of which is skipped.
    """
    if frames.shape[-2:] == (size, size):
        return frames
    resized = F.interpolate(frames.float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return resized.half().float()


def published_frames(frames: Tensor, size: int) -> Tensor:
    """[T, 2, H, W] -> [T, 2, size, size], float32 from 0 to 1, each frame by the three transforms of published code.

    ToPILImage takes a float for 0 to 1 and keeps 255 times it modulo 256, so that a count of 0, 1, 2, 3 ... becomes
    0, 1, 254/255, 253/255 ...; and it takes two channels for grey and its opacity, so that Resize weighs polarity 0 by
    polarity 1.
    """
    chain = transforms.Compose([transforms.ToPILImage(), transforms.Resize((size, size)), transforms.ToTensor()])
    return torch.stack([chain(frame) for frame in frames.float()])


@dataclass(frozen=True)
class FrameKind:
    """How counts become frames, and how these are stored: as ``dtype``, ``scale`` times their value."""

    resize: Callable[[Tensor, int], Tensor]  # [T, 2, H, W], size -> float32 [T, 2, size, size]
    dtype: np.dtype
    scale: int

    def stored(self, frames: Tensor) -> np.ndarray:
        scaled = (frames * self.scale).numpy()
        return (scaled if self.dtype.kind == "f" else scaled.round()).astype(self.dtype)

    def restored(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).float().div_(self.scale)  # copied: NumPy is slow with float16


# Nothing is lost by storing: a published frame holds bytes / 255; whole counts up to 2048 are exact in float16, and
# resize_frames rounds to it.
KINDS = {
    "published": FrameKind(published_frames, np.dtype(np.uint8), 255),
    "counts": FrameKind(resize_frames, np.dtype(np.float16), 1),
}


def frame_files(split: str) -> tuple[str, str]:
    return f"{split}_frames.npy", f"{split}_labels.npy"


def write_split(
    folder: Path,
    split: str,
    frames: Iterable[np.ndarray],
    labels: Sequence[int],
    shape: Sequence[int],
    dtype: np.dtype = KINDS["counts"].dtype,
) -> None:
    """Writes recordings of ``shape`` (T, 2, H, W) one by one, so that a split may be larger than memory.

    Raises:
        OSError: it cannot be written, with the name of the file.
    """
    frames_file, labels_file = frame_files(split)
    row = np.empty(shape, dtype)
    header = {"descr": row.dtype.str, "fortran_order": False, "shape": (len(labels), *shape)}
    try:
        # Not through a memory map: there a full disk kills the process.
        with open(folder / frames_file, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, recording in zip(labels, frames, strict=True):
                row[...] = recording
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno is None:  # no failure to write: a library that does not load, say
            raise
        raise OSError(error.errno, error.strerror, str(folder / frames_file)) from error
    with open(folder / labels_file, "wb") as file:
        np.save(file, np.asarray(labels, dtype=np.int64))
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """Describes the splits in ``folder``.

    ``settings``: how they were made, with ``classes``, the names by label, and ``frame_kind``, counts if it is missing.
    """
    splits, files = {}, {}
    for split in SPLITS:
        frames_file, labels_file = frame_files(split)
        array = np.load(folder / frames_file, mmap_mode="r", allow_pickle=False)
        counts = np.bincount(np.load(folder / labels_file), minlength=len(settings["classes"])).tolist()
        splits[split] = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "recordings_per_class": dict(zip(settings["classes"], counts, strict=True)),
        }
        files |= {name: _fingerprint(folder / name) for name in (frames_file, labels_file)}
    manifest = {**FORMAT, "settings": settings, "splits": splits, "files": files}
    with open(folder / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its files found to have the size it states. Raises UserError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        found = {key: manifest[key] for key in FORMAT}
        stated = {name: manifest["files"][name]["bytes"] for split in SPLITS for name in frame_files(split)}
        checksums(manifest)
        dimensions = {len(manifest["splits"][split]["shape"]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no manifest of frames ({type(error).__name__}): prepare them again") from error
    if found != FORMAT or dimensions != {5}:
        raise UserError(f"{path} is of another format ({found}) than this version reads ({FORMAT}): prepare them again")
    for name, size in stated.items():
        actual = (folder / name).stat().st_size if (folder / name).is_file() else None
        if actual != size:
            fault = "missing" if actual is None else f"truncated or changed ({actual} bytes, not {size})"
            raise UserError(f"{folder / name} is {fault}: remove {folder} and make it again")
    return manifest


def checksums(manifest: dict[str, Any], splits: Sequence[str] = SPLITS) -> dict[str, str]:
    """The SHA-256 of each file of these splits."""
    return {name: str(manifest["files"][name]["sha256"]) for split in splits for name in frame_files(split)}


def check_content(folder: Path) -> None:
    """Raises UserError where a file is not the one that the manifest was written for; reads each once (check_once)."""
    check_once(folder, checksums(read_manifest(folder)))


def frame_kind_of(folder: Path) -> str:
    """The kind of the frames in ``folder``, by its manifest: one of KINDS. Raises UserError."""
    settings = read_manifest(folder).get("settings")
    kind = settings.get("frame_kind", "counts") if isinstance(settings, dict) else "counts"
    if kind not in tuple(KINDS):
        raise UserError(f"{folder / MANIFEST} says that the frames are {kind!r}, none of {', '.join(KINDS)}")
    return kind


def check_finite(frames: Tensor, source: Any) -> Tensor:
    """The frames; UserError where a value is negative, not a number, or beyond what float16 holds."""
    low, high = torch.aminmax(frames)
    if not (low >= 0 and high < torch.inf):  # false for NaN, too
        raise UserError(f"{source} holds negative, infinite or NaN values, which no count of events is: replace it")
    if high > LARGEST:
        raise UserError(f"{source} holds the value {high:.4g}, too large for a count of events: replace it")
    return frames
