"""Images a second that the training loader hands over.

python experiment/benchmark/loader.py                  0 to 4 workers, batches of 128, a table on stdout
python experiment/benchmark/loader.py --workers 8 16
python experiment/benchmark/loader.py --photographs    JPEG files of 640x427 pixels, two decoders
python experiment/benchmark/loader.py --folder DIR     the same of one's own files, one folder a class

Without a flag the images are noise in memory, 32x32 as CIFAR-10's, with its published augmentation: nothing has to be
downloaded, and an augmentation takes as long whatever an image shows. Of files, a random part of each is resized to
--size and flipped, as experiment/imagenet/main.py trains, decoded by Pillow, as in that script, and by torchvision.io.
Starting workers is not timed: they live as long as the training does.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import io
from torchvision.transforms import v2

from util.data import ImageDataset
from util.dataset import image_folder
from util.dataset.digits import CLASSES as DIGITS
from util.dataset.files import Split
from util.dataset.image_augment import train_transform
from util.dataset.image_folder import ImageFolder
from util.dataset.image_sets import DATASETS
from util.errors import UserError
from util.train.batches import data_loaders
from util.train.options import Parser, complain
from util.train.values import number

WARM_UP = 2  # batches of each epoch that are not timed: filling the workers' queues


def cifar_like(images: int) -> ImageDataset:
    spec, random = DATASETS["CIFAR10"], np.random.default_rng(0)
    pixels = random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, random.integers(0, 10, images), DIGITS)
    return ImageDataset(split, train_transform(spec, spec.image_size, spec.auto_aug, spec.cutout))


class TensorFolder(ImageFolder):
    """An `ImageFolder` whose files torchvision.io decodes, transformed as tensors."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        content = io.read_file(os.fsdecode(self.paths[index]))
        return self.transform(io.decode_image(content, io.ImageReadMode.RGB)), int(self.labels[index])


def folders(folder: Path, size: int, images: int) -> dict[str, Dataset]:
    """The first ``images`` files below ``folder``, by decoder."""
    crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    normalise = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(image_folder.MEAN, image_folder.STD)]
    by_decoder = {
        "Pillow": ImageFolder(folder, image_folder.train_transform(size)),
        "torchvision.io": TensorFolder(folder, v2.Compose([*crop, *normalise])),
    }
    count = min(images, len(by_decoder["Pillow"]))
    return {name: Subset(samples, range(count)) for name, samples in by_decoder.items()}


def write_photographs(folder: Path, copies: int) -> None:
    """The two photographs that come with scikit-learn, a class each, as JPEG files."""
    for image, name in zip(load_sample_images().images, ("china", "flower"), strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(copies):
            Image.fromarray(image).save(folder / name / f"{i}.jpg", quality=90)


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


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch_size", type=number(int, 1), default=128)
    parser.add_argument("--batches", type=number(int, WARM_UP + 1), default=60, help="in an epoch")
    parser.add_argument("--epochs", type=number(int, 1), default=5)
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--photographs", action="store_true")
    files.add_argument("--folder", type=Path, metavar="DIR")
    parser.add_argument("--size", type=number(int, 4), default=224, help="of the crops of files")
    options = parser.parse_args()
    count = options.batches * options.batch_size
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if options.photographs:
                write_photographs(Path(scratch), -(-count // 2))
            folder = Path(scratch) if options.photographs else options.folder
            measure(folders(folder, options.size, count) if folder else {"in memory": cifar_like(count)}, options)
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt:
        return 130
    return 0


def measure(sources: dict[str, Dataset], options: argparse.Namespace) -> None:
    """Prints the table."""
    loaders = {
        (name, n): data_loaders(samples, samples, options.batch_size, 128, n, "cpu", seed=0)[0]
        for n in options.workers
        for name, samples in sources.items()
    }
    if (least := min(map(len, loaders.values()))) <= WARM_UP:
        raise UserError(f"{least} batches, of which {WARM_UP} are not timed: use a smaller --batch_size or more files")
    found: dict[tuple[str, int], list[float]] = {key: [] for key in loaders}
    for epoch in range(1, options.epochs + 1):  # in turns
        for key, loader in loaders.items():
            found[key].append(images_per_second(loader, options.batch_size, epoch))
    print(
        f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {metadata.version('torch')}; batches of "
        f"{options.batch_size}, medians of {options.epochs} epochs of {options.batches} batches\n"
    )
    print("| images | workers | images/s (min to max) |\n| --- | --- | --- |")
    for (name, n), speeds in found.items():
        print(f"| {name} | {n} | {statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f}) |")


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in a worker, where a batch is made by one thread
    sys.exit(main())
