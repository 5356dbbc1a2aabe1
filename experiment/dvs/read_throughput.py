"""Size on disk and frames read a second, both layouts and kinds of frames, of synthetic recordings (page cache).

python experiment/dvs/read_throughput.py > doc/benchmark/reading.md
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.utils.data import DataLoader

from util.data import load_event_dataset
from util.dataset.event_data import DATASETS
from util.dataset.event_frames import KINDS, resize_frames, write_manifest, write_split
from util.train.options import Parser
from util.train.values import number

NAME = "CIFAR10_DVS_Aug"
STEPS, SENSOR, ROUNDS = 10, 128, 5
EVENTS = 200_000  # about as many as a recording of CIFAR10-DVS holds


def counts(index: int) -> torch.Tensor:
    rng = np.random.default_rng(index)
    frames = rng.poisson(EVENTS / (STEPS * 2 * SENSOR**2), (STEPS, 2, SENSOR, SENSOR))
    return torch.from_numpy(frames).float()


def write_pt(folder: Path, recordings: int, size: int, kind: str) -> None:
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True)
        for i in range(recordings if split == "train" else 1):
            torch.save([resize_frames(counts(i), size), torch.tensor(i % 10)], folder / split / f"{i}.pt")


def write_prepared(folder: Path, recordings: int, size: int, kind: str) -> None:
    folder.mkdir()
    for split, count in (("train", recordings), ("test", 1)):
        frames = (KINDS[kind].stored(KINDS[kind].resize(counts(i), size)) for i in range(count))
        labels = [i % 10 for i in range(count)]
        write_split(folder, split, frames, labels, (STEPS, 2, size, size), KINDS[kind].dtype)
    write_manifest(folder, {"frame_kind": kind, "classes": [str(i) for i in range(10)]})


def epoch_seconds(folder: Path, kind: str) -> float:
    """Of reading the training set in random order, with augmentation, in this process."""
    train, _ = load_event_dataset(NAME, folder, STEPS, frames=kind)
    start = time.perf_counter()
    for _ in DataLoader(train, batch_size=32, shuffle=True):
        pass
    return time.perf_counter() - start


SIZE = DATASETS[NAME].frame_size
CASES = {
    "a, as published: 128x128, float32 | published": (write_pt, SENSOR, "published"),
    "a, as published: 128x128, float32 | counts": (write_pt, SENSOR, "counts"),
    "a, resized beforehand: 48x48, float32 | counts": (write_pt, SIZE, "counts"),
    "b, prepare.py: 48x48, uint8 | published": (write_prepared, SIZE, "published"),
    "b, prepare.py: 48x48, float16 | counts": (write_prepared, SIZE, "counts"),
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=number(int, 1), default=200)
    recordings = parser.parse_args().recordings
    torch.set_num_threads(1)  # like a loader's worker process
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / str(i) for i, name in enumerate(CASES)}
        for name, (write, size, kind) in CASES.items():
            write(folders[name], recordings, size, kind)
        # In turns, and the fastest of each: what else the machine does must not favour one layout.
        rounds = [
            {name: epoch_seconds(folder, CASES[name][2]) for name, folder in folders.items()} for _ in range(ROUNDS)
        ]
        print(
            "# Reading event recordings\n\nMade by `python experiment/dvs/read_throughput.py`: "
            f"{recordings} synthetic recordings of {STEPS} frames, in the page\ncache, read in random order with "
            f"augmentation by one process with one thread; fastest of {ROUNDS} rounds, the layouts in\n"
            f"turns. Layout a is a directory of `.pt` files, layout b what `prepare.py` writes. Machine: "
            f"{platform.machine()}, torch {torch.__version__}.\n\n"
            "| layout | `--frames` | KiB a recording | frames a second |\n| --- | --- | --- | --- |"
        )
        for name, folder in folders.items():
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / (recordings + 1)
            speed = recordings * STEPS / min(seconds[name] for seconds in rounds)
            print(f"| {name} | {size / 1024:.0f} | {speed:.0f} |")


if __name__ == "__main__":
    main()
