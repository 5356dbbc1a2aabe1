"""Folders of image files, one folder a class below train/ and val/ (or test/): ImageNet, and images of one's own.

A sample is (image: float tensor [3, size, size], label: int). Classes are numbered in the order of their names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from ..errors import UserError
from .checksums import fingerprint_of_files
from .files import IMAGE_SIZES, FileReader, check_directory, visible

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1, per channel
RESIZE = 256 / 224  # a test image's shorter side, of the side of the crop in its centre


@dataclass(frozen=True)
class FolderSet:
    test_names: tuple[str, ...]  # where the test set is: the first that is there

    script: ClassVar[str] = "experiment/imagenet/main.py"

    def file_reader(self, config: dict[str, Any]) -> FileReader | None:
        """Of image files, for the network of a run with this configuration; None where there is no such run."""
        size = config.get("image_size")
        if type(size) is not int or size not in IMAGE_SIZES:
            return None
        transform = test_transform(size)
        return FileReader(3, IMG_EXTENSIONS, lambda path: transform(read_image(path)))


DATASETS = {"IMAGENET": FolderSet(("val",)), "FOLDER": FolderSet(("val", "test"))}


class ImageFolder(Dataset):
    """The images of one split, each read when it is asked for. ``classes``: the names of its folders, sorted.

    Raises:
        UserError: no folder of that name, no class in it, or a class without images, which is named.
    """

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        check_directory(folder)
        self.folder = folder
        try:
            folders = visible((path for path in folder.iterdir() if path.is_dir()), folder)
            self.classes = sorted(path.name for path in folders)
            if not self.classes:
                raise FileNotFoundError("there is no folder in it")
            files = make_dataset(folder, {name: i for i, name in enumerate(self.classes)}, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            reason = error.strerror or error
            raise UserError(f"{folder}: {reason}; it has to hold one folder of images a class") from error
        # Arrays, not lists: counting references to a million strings would copy them all into every worker.
        self.paths = np.array([os.fsencode(path) for path, _ in files])
        self.labels = np.array([label for _, label in files])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(os.fsdecode(self.paths[index]))), int(self.labels[index])

    def fingerprint(self) -> str:
        """Of the files' names and of the content of a few: the same for the same images, wherever they lie."""
        paths = [Path(os.fsdecode(path)) for path in self.paths]
        return fingerprint_of_files(paths, [str(path.relative_to(self.folder)) for path in paths])

    def check_headers(self) -> None:
        """Opens every file as far as its size and kind. Raises UserError for the first that holds no image."""
        for path in map(os.fsdecode, self.paths):
            try:
                with Image.open(path):
                    pass
            except Exception as error:
                raise _unusable(path, error) from error


def read_image(path: str | os.PathLike, mode: str = "RGB") -> Image.Image:
    """An image file of any kind, in this ``mode`` of Pillow's. Raises UserError, naming the file, if it cannot."""
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # each of Pillow's decoders complains in its own way
        raise _unusable(path, error) from error


def _unusable(path: str | os.PathLike, error: Exception) -> UserError:
    reason = "no image file" if isinstance(error, Image.UnidentifiedImageError) else error
    return UserError(f"{path} cannot be read ({reason}): replace or remove it")


def train_transform(image_size: int) -> transforms.Compose:
    """A random part of the image, of 8 to 100 % of its area, resized; flip; normalise. Draws from torch's generator."""
    crop = [transforms.RandomResizedCrop(image_size), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*crop, *_to_normalised_tensor()])


def test_transform(image_size: int) -> transforms.Compose:
    """The shorter side resized to 256 (for crops of 224), the crop in the centre."""
    crop = [transforms.Resize(round(image_size * RESIZE)), transforms.CenterCrop(image_size)]
    return transforms.Compose([*crop, *_to_normalised_tensor()])


test_transform.__test__ = False  # else pytest collects it wherever a test imports it


def _to_normalised_tensor() -> list:
    return [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]


def load_folders(root: Path, test_names: Sequence[str], image_size: int = 224) -> tuple[ImageFolder, ImageFolder]:
    """The training and the test set below ``root``: train/, and the first of ``test_names`` that is there.

    Raises:
        UserError: a folder is missing, a class is empty, or the two have not the same classes.
    """
    check_directory(root)
    test_folder = next((root / name for name in test_names if (root / name).exists()), None)
    if test_folder is None or not (root / "train").exists():
        missing = "train" if test_folder else " or ".join(f"{name}/" for name in test_names).rstrip("/")
        raise UserError(f"{root} holds no {missing}/: it has to hold train/ and {' or '.join(test_names)}/")
    train = ImageFolder(root / "train", train_transform(image_size))
    test = ImageFolder(test_folder, test_transform(image_size))
    for one, other in ((train, test), (test, train)):
        if alone := sorted(set(one.classes) - set(other.classes)):
            here, there = (root / "train", test_folder) if one is train else (test_folder, root / "train")
            raise UserError(f"{here / alone[0]} has no counterpart in {there}: both need the same classes")
    return train, test
