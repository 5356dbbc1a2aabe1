"""Image data sets as PyTorch data sets, and loaders whose epochs are a function of (seed, epoch) alone."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from util.errors import UserError
from util.image_augment import test_transform, train_transform
from util.image_files import DATASETS, Split, read_dataset

IMAGE_SIZES = range(4, 1025)


class ImageDataset(Dataset):
    """Images in memory; a sample is (transform(PIL image): float tensor (C, H, W), label: int)."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def load_dataset(
    name: str,
    data_path: str | os.PathLike | None,
    image_size: int | None = None,
    auto_aug: bool | None = None,
    cutout: bool | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test set; None stands for the data set's own default. Raises UserError."""
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    size = spec.image_size if image_size is None else image_size
    if size not in IMAGE_SIZES:
        raise UserError(f"image size {size} is not usable: choose one from {IMAGE_SIZES[0]} to {IMAGE_SIZES[-1]}")
    auto_aug = spec.auto_aug if auto_aug is None else auto_aug
    cutout = spec.cutout if cutout is None else cutout
    train, test = read_dataset(name, data_path)
    return (
        ImageDataset(train, train_transform(spec, size, auto_aug, cutout)),
        ImageDataset(test, test_transform(spec, size)),
    )


def data_loaders(
    train_set: Dataset,
    test_set: Dataset,
    train_batch_size: int,
    val_batch_size: int,
    num_workers: int,
    device: torch.device | str,
    seed: int,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training set (shuffled) and the test set (in order); `seed_epoch` before each epoch."""
    # Workers live for one epoch: a new one takes its seed from the loader's generator, which seed_epoch sets, while
    # the random state of a persistent one would depend on all the epochs before and be lost on resume.
    common = {
        "num_workers": num_workers,
        "pin_memory": torch.device(device).type == "cuda",
        "persistent_workers": False,
    }
    size = len(train_set)
    train_loader = DataLoader(
        train_set,
        train_batch_size,
        shuffle=True,
        # BatchNorm cannot normalise a single value; any other remainder is worth training on.
        drop_last=size > train_batch_size and size % train_batch_size == 1,
        generator=torch.Generator().manual_seed(seed),
        **common,
    )
    # A generator of its own, lest starting the test loader advance the global one.
    test_loader = DataLoader(test_set, val_batch_size, generator=torch.Generator().manual_seed(seed), **common)
    return train_loader, test_loader


def seed_epoch(loader: DataLoader, seed: int, epoch: int) -> None:
    """Make the loader's order, its workers and the global generators a function of (seed, epoch) alone."""
    order, torch_seed, numpy_seed, python_seed = np.random.SeedSequence([seed, epoch]).generate_state(4).tolist()
    loader.generator.manual_seed(order)
    torch.manual_seed(torch_seed)  # of the CPU and of every CUDA device
    np.random.seed(numpy_seed)
    random.seed(python_seed)
