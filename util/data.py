"""Image data sets as PyTorch data sets, and the way to those of event cameras: `load_dataset`, `load_event_dataset`."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .dataset.checksums import fingerprint
from .dataset.event_data import load_event_dataset
from .dataset.image_files import DATASETS, Split, read_dataset
from .errors import UserError
from .image_augment import test_transform, train_transform

__all__ = ["DATASETS", "IMAGE_SIZES", "ImageDataset", "load_dataset", "load_event_dataset"]

IMAGE_SIZES = range(4, 1025)


class ImageDataset(Dataset):
    """Images in memory; a sample is (transform(PIL image): float tensor (C, H, W), label: int).

    ``classes``: the name of each label.
    """

    def __init__(self, split: Split, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.labels, self.classes = split
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """The same for the same images and labels, wherever they lie."""
        return fingerprint(np.ascontiguousarray(self.images).data, np.ascontiguousarray(self.labels).data)

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
