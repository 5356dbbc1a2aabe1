"""Images a second that the training loader hands over, with the published augmentation of CIFAR-10.

python experiment/benchmark/loader.py                  0 to 4 workers, batches of 128, a table on stdout
python experiment/benchmark/loader.py --workers 8 16

The images are noise in memory, 32x32 as CIFAR-10's: nothing has to be downloaded, and an augmentation takes as long
whatever an image shows. Starting workers is not timed: they live as long as the training does.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.utils.data import DataLoader

from util.data import ImageDataset
from util.dataset.image_files import DATASETS, DIGITS, Split
from util.image_augment import train_transform
from util.train.batches import data_loaders
from util.train.options import number

WARM_UP = 2  # batches of each epoch that are not timed: filling the workers' queues


def cifar_like(images: int) -> ImageDataset:
    spec, random = DATASETS["CIFAR10"], np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, random.integers(0, 10, images), DIGITS)
    return ImageDataset(split, train_transform(spec, spec.image_size, spec.auto_aug, spec.cutout))


def images_per_second(loader: DataLoader, batch_size: int, epoch: int) -> float:
    loader.sampler.start_at(epoch)
    batches: Iterator = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    started = time.perf_counter()
    timed = sum(len(x) for x, _ in batches)
    # What the workers had made before is not part of what they made in this time.
    ahead = min(timed, (loader.prefetch_factor or 0) * loader.num_workers * batch_size)
    return (timed - ahead) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch_size", type=number(int, 1), default=128)
    parser.add_argument("--batches", type=number(int, WARM_UP + 1), default=60, help="in an epoch")
    parser.add_argument("--epochs", type=number(int, 1), default=5)
    options = parser.parse_args()
    samples = cifar_like(options.batches * options.batch_size)
    loaders = [data_loaders(samples, samples, options.batch_size, 128, n, "cpu", seed=0)[0] for n in options.workers]
    found: list[list[float]] = [[] for _ in loaders]
    for epoch in range(1, options.epochs + 1):  # the numbers of workers in turns
        for loader, speeds in zip(loaders, found, strict=True):
            speeds.append(images_per_second(loader, options.batch_size, epoch))
    print(
        f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {metadata.version('torch')}; batches of "
        f"{options.batch_size}, medians of {options.epochs} epochs of {options.batches} batches\n"
    )
    print("| workers | images/s (min to max) |\n| --- | --- |")
    for n, speeds in zip(options.workers, found, strict=True):
        print(f"| {n} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) |")


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in a worker, where a batch is made by one thread
    main()
