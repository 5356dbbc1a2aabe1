"""Files of event cameras to arrays of events t, x, y and p, by SpikingJelly's readers, without trusting the files."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import UserError

Events = dict[str, np.ndarray]  # t in microseconds, x, y and p


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


def read_aedat2(path: Path, name: str) -> Events:
    """The events of an .aedat file of CIFAR10-DVS, in AEDAT 2.0. Raises UserError, calling the file ``name``."""
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
    return _in_order(events, name)


OVERFLOW_ROW, OVERFLOW_US = 240, 2**13  # what stands for no event in an ATIS file: so much time has passed


def read_atis(path: Path, name: str) -> Events:
    """The events of a .bin file of N-MNIST or N-Caltech101: 5 bytes each. Raises UserError, calling the file ``name``.

    SpikingJelly's reader takes the marks of overflowing time, of which its authors' own code tells, for events.
    """
    size = path.stat().st_size
    if not size or size % 5:
        fault = f"it has {size} bytes, and an event takes 5" if size else "it is empty"
        raise UserError(f"{name} is truncated or no recording ({fault}): replace it by an intact file")
    from spikingjelly.datasets import load_ATIS_bin  # imports matplotlib, torchaudio, ...

    events = load_ATIS_bin(str(path))
    mark = events["y"] == OVERFLOW_ROW
    events["t"] = events["t"].astype(np.int64) + OVERFLOW_US * np.cumsum(mark)
    return _in_order({key: values[~mark] for key, values in events.items()}, name)


def read_aedat3(path: Path, name: str) -> Events:
    """The events of an .aedat file of DVS128 Gesture, in AEDAT 3.1. Raises UserError, calling the file ``name``.

    What SpikingJelly's `load_aedat_v3` reads, packet by packet where that goes event by event, and no truncated packet.
    """
    content = np.fromfile(path, np.uint8)
    head = content[:65536].tobytes()
    place = head.find(b"#!END-HEADER\r\n")
    if not head.startswith(b"#!AER-DAT3") or place < 0:
        raise UserError(f"{name} has no header of AEDAT 3, in which DVS128 Gesture is published: replace it")
    place, parts = place + len(b"#!END-HEADER\r\n"), []
    while place < len(content):
        kind, _, size, _, overflow, capacity, _, _ = np.frombuffer(
            content[place : place + 28].tobytes().ljust(28, b"\0"), "<u2,<u2,<u4,<u4,<u4,<u4,<u4,<u4"
        )[0].tolist()
        place += 28
        end = place + size * capacity
        if end > len(content) or size * capacity == 0 or (kind == 1 and size != 8):
            raise UserError(f"{name} is truncated or corrupt (a packet at byte {place}): replace it by an intact file")
        if kind == 1:  # of polarity events
            data, time = np.frombuffer(content[place:end], "<u4").reshape(-1, 2).T
            parts.append(
                (time.astype(np.int64) | overflow << 31, data >> 17 & 0x7FFF, data >> 2 & 0x7FFF, data >> 1 & 1)
            )
        place = end
    if not parts:
        raise UserError(f"{name} holds no events: replace it by an intact file")
    return _in_order(
        {key: np.concatenate(values) for key, values in zip("txyp", zip(*parts, strict=True), strict=True)}, name
    )


def _in_order(events: Events, name: str) -> Events:
    time = events["t"].astype(np.int64)
    # A real recording may step back where its clock was reset, a random one does half of the time.
    if np.count_nonzero(time[1:] < time[:-1]) > 0.1 * len(time):
        raise UserError(f"{name} is corrupt (its time stamps are in no order): replace it by an intact file")
    return events


@dataclass(frozen=True)
class Camera:
    """A sensor, and what reads the files of its recordings."""

    height: int
    width: int
    suffix: str  # of the files
    read: Callable[[Path, str], Events]  # a file, and how to name it in an error


DVS128 = Camera(128, 128, ".aedat", read_aedat2)  # of CIFAR10-DVS
DVS128_GESTURE = Camera(128, 128, ".aedat", read_aedat3)
ATIS_240 = Camera(180, 240, ".bin", read_atis)  # of N-Caltech101
ATIS_34 = Camera(34, 34, ".bin", read_atis)  # of N-MNIST: the part of the sensor that saw the digits
