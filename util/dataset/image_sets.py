"""The image data sets: what is known of each, in one row, and their samples as PyTorch data sets."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import UserError
from .checksums import fingerprint
from .digits import CLASSES as DIGITS
from .digits import read_digits, split_digits
from .files import IMAGE_SIZES, FileReader, Split
from .image_augment import image_transform, test_transform, train_transform
from .image_folder import read_image
from .torchvision_files import of_torchvision

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


@dataclass(frozen=True)
class ImageSet:
    read: Callable[[str | os.PathLike | None], tuple[Split, Split]]  # from the data path: training and test images
    channels: int
    num_classes: int
    stored_size: int  # pixels a side, as the files hold the images
    image_size: int  # pixels a side, as the networks see them unless asked otherwise
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    crop: bool = True  # random crop after padding; the digits of 8x8 pixels fill their image
    flip: bool = True  # a mirrored animal is an animal, a mirrored digit is no digit
    auto_aug: bool = False
    cutout: bool = False
    train_batch_size: int = 128
    workers: bool = True  # processes that load it; none where making an image takes less than passing it

    script: ClassVar[str] = "experiment/cifar/main.py"

    def file_reader(self, config: dict[str, Any]) -> FileReader | None:
        """Of image files, for the network of a run with this configuration; None where there is no such run."""
        size = config.get("image_size")
        if type(size) is not int or size not in IMAGE_SIZES:
            return None
        transform = image_transform(self, size)
        return FileReader(self.channels, IMG_EXTENSIONS, lambda path: transform(read_image(path, MODES[self.channels])))


def _read_digits(data_path: str | os.PathLike | None) -> tuple[Split, Split]:
    if data_path:
        raise UserError("DIGITS comes with scikit-learn: leave --data_path out, or name its --dataset")
    digits, labels = read_digits()
    images = np.rint(digits * (255 / 16)).astype(np.uint8)  # 0..16 to the bytes that ToTensor maps to 0..1
    train, test = (Split(images[members], labels[members], DIGITS) for members in split_digits(labels))
    return train, test


# CIFAR-10's std is the mean over images of each one's own, less than that of all pixels: the one in the field's use.
DATASETS: dict[str, ImageSet] = {
    "CIFAR10": ImageSet(
        of_torchvision(datasets.CIFAR10), channels=3, num_classes=10, stored_size=32, image_size=32,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), auto_aug=True, cutout=True,
    ),
    "CIFAR100": ImageSet(
        of_torchvision(datasets.CIFAR100), channels=3, num_classes=100, stored_size=32, image_size=32,
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), auto_aug=True, cutout=True,
    ),
    "MNIST": ImageSet(
        of_torchvision(datasets.MNIST), channels=1, num_classes=10, stored_size=28, image_size=32,
        mean=(0.1307,), std=(0.3081,), flip=False,
    ),
    "FashionMNIST": ImageSet(
        of_torchvision(datasets.FashionMNIST), channels=1, num_classes=10, stored_size=28, image_size=28,
        mean=(0.2860,), std=(0.3530,),
    ),
    "DIGITS": ImageSet(
        _read_digits, channels=1, num_classes=10, stored_size=8, image_size=8,
        mean=(0.3054,), std=(0.3760,), crop=False, flip=False, train_batch_size=32, workers=False,
    ),
}  # fmt: skip


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
    train, test = spec.read(data_path)
    return (
        ImageDataset(train, train_transform(spec, size, auto_aug, cutout)),
        ImageDataset(test, test_transform(spec, size)),
    )
