"""Recordings in the binary AEDAT 2.0 format of CIFAR10-DVS (128x128), archives of them, and layout a of frames;
recordings in the ATIS format of N-MNIST (34x34).

A class is a bright bar at its own angle that moves to and fro, so that a network can tell the classes apart.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SENSOR = 128
HEADER = (
    b"#!AER-DAT2.0\r\n"
    b"# This is a raw AE data file - do not edit\r\n"
    b"# Data format is int32 address, int32 timestamp (8 bytes total), repeated for each event\r\n"
    b"# Timestamps tick is 1 us\r\n"
)


def events_of_class(label: int, seed: int = 0, count: int = 400) -> dict[str, np.ndarray]:
    """``count`` events as SpikingJelly's reader returns them: t in microseconds, x, y, p."""
    rng = np.random.default_rng([label, seed])
    t = np.sort(rng.integers(0, 1_000_000, count))
    angle = np.pi * label / len(CLASSES)
    along, across = rng.uniform(-50, 50, count), 10 * np.sin(t / 1e6 * 2 * np.pi) + rng.normal(0, 1.5, count)
    x = 63.5 + along * np.cos(angle) - across * np.sin(angle)
    y = 63.5 + along * np.sin(angle) + across * np.cos(angle)
    p = rng.random(count) < np.where(np.cos(t / 1e6 * 2 * np.pi) > 0, 0.8, 0.2)
    return {"t": t, "x": x.astype(int), "y": y.astype(int), "p": p.astype(int)}


def aedat_bytes(events: dict[str, np.ndarray]) -> bytes:
    """Address and time stamp of each event, big-endian; the address holds 127 - x, 127 - y and 1 - polarity."""
    last = SENSOR - 1
    address = (last - events["x"]) << 8 | (last - events["y"]) << 1 | (1 - events["p"])
    return HEADER + np.stack([address, events["t"]], axis=1).astype(">u4").tobytes()


def write_folders(directory: Path, per_class: int = 10, count: int = 400) -> Path:
    """A folder of .aedat files for each class."""
    for label, name in enumerate(CLASSES):
        (directory / name).mkdir(parents=True)
        for i in range(per_class):
            content = aedat_bytes(events_of_class(label, i, count))
            (directory / name / f"cifar10_{name}_{i}.aedat").write_bytes(content)
    return directory


def write_archives(directory: Path, folders: Path) -> Path:
    """The ten archives of ``folders``."""
    directory.mkdir(parents=True)
    for name in CLASSES:
        with zipfile.ZipFile(directory / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted((folders / name).iterdir()):
                archive.write(file, f"{name}/{file.name}")
    return directory


def atis_events(label: int, seed: int = 0, count: int = 300, size: int = 34) -> dict[str, np.ndarray]:
    """Those of `events_of_class`, of a smaller sensor and in the time of three saccades."""
    events = events_of_class(label, seed, count)
    return {**events, "t": events["t"] // 3, **{axis: events[axis] * size // SENSOR for axis in "xy"}}


def atis_bytes(events: dict[str, np.ndarray]) -> bytes:
    """x, y, and 24 bits, big-endian: polarity and time."""
    rest = events["p"] << 23 | events["t"]
    return np.stack([events["x"], events["y"], rest >> 16, rest >> 8, rest], axis=1).astype(np.uint8).tobytes()


def write_n_mnist(directory: Path) -> Path:
    """Train/0/00001.bin ... and Test/0/00001.bin ..., two and one of each digit."""
    for split, seeds in (("Train", (1, 2)), ("Test", (3,))):
        for label in range(10):
            (directory / split / str(label)).mkdir(parents=True)
            for number, seed in enumerate(seeds, 1):
                content = atis_bytes(atis_events(label, seed))
                (directory / split / str(label) / f"{number:05d}.bin").write_bytes(content)
    return directory


def write_layout_a(directory: Path, splits: dict[str, list[tuple]]) -> Path:
    """train/0.pt ... and test/0.pt ... of the pairs (frames, label)."""
    for split, pairs in splits.items():
        (directory / split).mkdir(parents=True)
        for i, (frames, label) in enumerate(pairs):
            torch.save([frames, label], directory / split / f"{i}.pt")
    return directory


def random_layout_a(directory: Path, time_steps: int = 10, size: int = SENSOR, train: int = 20, test: int = 10) -> Path:
    """Sparse random counts."""
    rng = torch.Generator().manual_seed(0)

    def pairs(count: int) -> list[tuple]:
        shape = (time_steps, 2, size, size)
        return [(torch.poisson(torch.full(shape, 0.1), generator=rng), i % len(CLASSES)) for i in range(count)]

    return write_layout_a(directory, {"train": pairs(train), "test": pairs(test)})
