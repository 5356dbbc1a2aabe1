"""A simulated event camera looking at scikit-learn's digits, and the cached recordings and frames of DIGITS_DVS.

A pixel fires when its log intensity has changed by its threshold since its last event, as the pixels of a real event
camera do, while the camera makes three saccades along a triangle, as N-MNIST was recorded.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..staging import check_may_make, sweep
from .digits import CLASSES, read_digits, split_digits
from .event_frames import integrate_events, write_manifest, write_split

logger = logging.getLogger(__name__)

SENSOR = 48  # pixels a side: what vggsnn_dvs takes, so that frames need no resizing
CELL = 4.0  # sensor pixels across one pixel of the 8x8 digit
CORNERS = np.array([(-3.0, -3.0), (0.0, 3.0), (3.0, -3.0), (-3.0, -3.0)])  # of the path: (x, y) in pixels
SACCADE_US = 100_000
STEPS = 144  # at which the intensity is computed; between them its logarithm is taken as linear
BACKGROUND = 0.15  # intensity where the digit's ink, 0 to 1, is 0
THRESHOLD, MISMATCH = 0.35, 0.03  # of log intensity: the mean of all pixels, and how much they differ among each other
EVENT = np.dtype([("t", "<u4"), ("x", "u1"), ("y", "u1"), ("p", "u1")])  # t in microseconds, p: 1 ON, 0 OFF

VERSION = 1  # to count up with every change of the numbers above, lest old recordings pass for new ones


def thresholds() -> np.ndarray:
    """[SENSOR, SENSOR]: the pixels of one sensor differ a little, always in the same way."""
    return THRESHOLD * np.random.default_rng(0).normal(1, MISMATCH, (SENSOR, SENSOR))


def path_at(step: int) -> np.ndarray:
    """(x, y) of the digit's centre on the sensor, from its middle, after ``step`` of STEPS steps."""
    position = step / STEPS * (len(CORNERS) - 1)
    return np.array([np.interp(position, range(len(CORNERS)), CORNERS[:, axis]) for axis in (0, 1)])


def log_intensity(digits: np.ndarray, step: int) -> np.ndarray:
    """[N, 8, 8] with ink from 0 to 1 -> [N, SENSOR, SENSOR], the digits smoothed by a cubic B-spline."""
    x, y = (_weights(shift) for shift in path_at(step))  # (SENSOR, 8) each
    return np.log(BACKGROUND + y @ digits @ x.T)


def _weights(shift: float) -> np.ndarray:
    """What each of the 8 digit pixels in a row adds to each of the sensor's."""
    from scipy.interpolate import BSpline  # to make recordings alone

    position = (np.arange(SENSOR) - (SENSOR - 1) / 2 - shift) / CELL + 3.5
    kernel = BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    return np.nan_to_num(kernel(position[:, None] - np.arange(8)))  # NaN: outside the kernel's support


def record(digits: np.ndarray) -> list[np.ndarray]:
    """The events of each digit, [N, 8, 8] with ink from 0 to 1, in the order of time."""
    threshold = np.broadcast_to(thresholds(), (len(digits), SENSOR, SENSOR)).ravel()
    before = log_intensity(digits, 0).ravel()
    reference = before.copy()  # the log intensity that a pixel's last event stands for
    parts = []
    for step in range(1, STEPS + 1):
        now = log_intensity(digits, step).ravel()
        crossed = np.trunc((now - reference) / threshold)
        pixel = np.flatnonzero(crossed)
        fired = (values[pixel] for values in (crossed, reference, before, now, threshold))
        parts.append(_crossings(step, pixel, *fired))
        reference += crossed * threshold
        before = now
    return _sorted_by_recording(np.concatenate(parts, axis=1), len(digits))


def _crossings(step: int, *fired: np.ndarray) -> np.ndarray:
    """[3, events] of (pixel, time in us, polarity): one for each level passed on the way from ``before`` to ``now``."""
    pixel, crossed, reference, before, now, threshold = fired
    repeats = np.abs(crossed).astype(int)
    nth = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats) + 1  # 1, 2, ... for each pixel
    sign, pixel, reference, before, now, threshold = (
        np.repeat(values, repeats) for values in (np.sign(crossed), pixel, reference, before, now, threshold)
    )
    level = reference + sign * nth * threshold
    fraction = np.clip((level - before) / (now - before), 0, 1)
    time = (step - 1 + fraction) * (SACCADE_US * (len(CORNERS) - 1) / STEPS)
    return np.stack([pixel, np.rint(time).astype(int), sign > 0])


def _sorted_by_recording(crossings: np.ndarray, count: int) -> list[np.ndarray]:
    pixel, time, polarity = crossings
    recording, pixel = np.divmod(pixel, SENSOR * SENSOR)
    order = np.lexsort((pixel, time, recording))
    events = np.empty(len(order), EVENT)
    events["y"], events["x"] = np.divmod(pixel[order], SENSOR)
    events["t"], events["p"] = time[order], polarity[order]
    return np.split(events, np.searchsorted(recording[order], range(1, count)))


def digits_frames(root: Path, time_steps: int) -> Path:
    """The folder of prepared frames of DIGITS_DVS below ``root``, made when it is not there. Raises UserError."""
    recordings = _made_once(root / f"DIGITS_DVS_v{VERSION}" / "events", _write_events)

    def write(folder: Path) -> None:
        _write_frames(folder, recordings, time_steps)

    return _made_once(recordings.parent / f"frames_T{time_steps}", write)


def _made_once(folder: Path, write: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``write`` aside and moved there whole, so that no half of it is ever seen."""
    sweep(folder.parent, f".{folder.name}-*")
    if folder.is_dir():
        return folder
    check_may_make(folder)
    logger.info("making %s, once", folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = folder.parent / f".{folder.name}-{uuid.uuid4().hex}"
        staging.mkdir()  # not mkdtemp, which keeps out others who may share a data path, whatever the umask
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written ({error.strerror}): name another --data_path") from error
    try:
        write(staging)
        os.rename(staging, folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was quicker, with the very same content
            hint = "make room or name another --data_path"
            raise UserError(f"{folder} cannot be written ({error.strerror or error}): {hint}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _write_events(folder: Path) -> None:
    digits = read_digits()[0] / 16
    events = [recording for start in range(0, len(digits), 32) for recording in record(digits[start : start + 32])]
    np.save(folder / "events.npy", np.concatenate(events))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, events)]))  # recording i: events[offsets[i]:offsets[i + 1]]


def read_events(folder: Path) -> list[np.ndarray]:
    """All recordings, in the order of scikit-learn's digits."""
    try:
        events = np.load(folder / "events.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(folder / "offsets.npy", allow_pickle=False)
        if events.dtype != EVENT or offsets[-1] != len(events):
            raise ValueError("its parts do not fit together")
    except Exception as error:  # NumPy parses the header as Python, and raises whatever the damage led to
        raise UserError(f"{folder} is damaged ({error}): remove it, it is made again") from error
    return [events[low:high] for low, high in pairwise(offsets)]


def _write_frames(folder: Path, recordings: Path, time_steps: int) -> None:
    events, (_, labels) = read_events(recordings), read_digits()
    shape = (time_steps, 2, SENSOR, SENSOR)
    for split, members in zip(("train", "test"), split_digits(labels), strict=True):
        frames = (integrate_events(events[i], time_steps, SENSOR, SENSOR, f"digit {i}") for i in members)
        write_split(folder, split, frames, labels[members], shape)
    settings = {"source": "DIGITS_DVS", "version": VERSION, "frames": time_steps, "size": SENSOR}
    write_manifest(folder, {**settings, "classes": CLASSES})
