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
ATIS_34 = Camera(34, 34, ".bin", read_atis)  # of N-MNIST: the part of the sensor that saw the digits
