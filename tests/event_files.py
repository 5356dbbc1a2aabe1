"""Recordings in the binary AEDAT 2.0 format of CIFAR10-DVS (128x128), archives of them, and layout a of frames;
recordings in the ATIS format of N-MNIST (34x34).

A class is a bright bar at its own angle that moves to and fro, so that a network can tell the classes apart.
"""

import struct
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


def aedat3_bytes(events: dict[str, np.ndarray]) -> bytes:
    """AEDAT 3.1, as libcaer writes it: packets of up to 100 polarity events, and one of another kind between them."""
    data = events["x"] << 17 | events["y"] << 2 | events["p"] << 1 | 1
    pairs = np.stack([data, events["t"]], axis=1).astype("<u4")
    other = struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8)
    packets = [
        struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, len(part), len(part), len(part)) + part.tobytes()
        for part in np.split(pairs, range(100, len(pairs), 100))
    ]
    return b"#!AER-DAT3.1\r\n#Format: RAW\r\n#!END-HEADER\r\n" + other.join(packets)


def write_gesture(directory: Path) -> Path:
    """DvsGesture/ with a session of training and one of testing, of three trials each."""
    place = directory / "DvsGesture"
    place.mkdir(parents=True)
    for user, split in ((1, "train"), (24, "test")):
        name = f"user{user:02d}_led"
        (place / f"trials_to_{split}.txt").write_text(f"{name}.aedat\n\n")
        (place / f"{name}.aedat").write_bytes(aedat3_bytes(events_of_class(user % 10)))
        rows = [(1, 0, 300_000), (11, 300_000, 600_000), (4, 550_000, 900_000)]
        table = "".join(f"{label},{start},{end}\n" for label, start, end in rows)
        (place / f"{name}_labels.csv").write_text(f"class,startTime_usec,endTime_usec\n{table}")
    return directory


def write_n_caltech101(directory: Path) -> Path:
    for label, name in enumerate(("accordion", "BACKGROUND_Google")):
        (directory / "Caltech101" / name).mkdir(parents=True)
        for i in (1, 2, 3):
            content = atis_bytes(atis_events(label, i, size=180))
            (directory / "Caltech101" / name / f"image_{i:04d}.bin").write_bytes(content)
    return directory


def write_npz(directory: Path, size: tuple[int, int] = (20, 24), time_steps: int = 4) -> Path:
    """What SpikingJelly caches: train/CLASS/*.npz and test/CLASS/*.npz, classes 0, 2 and 10."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("0", "2", "10"):
            (directory / split / name).mkdir(parents=True)
            for i in range(2):
                frames = rng.poisson(0.3, (time_steps, 2, *size)).astype(np.float32)
                np.savez_compressed(directory / split / name / f"{i}.npz", frames=frames)
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
