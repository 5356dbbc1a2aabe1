"""The published training augmentation and its test counterpart, as torchvision transforms of a PIL image.

Every random choice is drawn from torch's global generator, so seeding torch fixes an augmented image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision import transforms

if TYPE_CHECKING:
    from .image_sets import ImageSet

GREY = 128  # of 255: what AutoAugment's shears, shifts and rotations bring in from outside the image


class Cutout:
    """Set one square hole of an image (C, H, W) to 0; its centre is uniform over the pixels, the border clips it.

    Before Normalize, as in the authors' code: a black hole, not one of the mean colour (DeVries and Taylor, 2017).
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        rows, columns = (self._span(length) for length in image.shape[-2:])
        image = image.clone()
        image[..., rows, columns] = 0
        return image

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"

    def _span(self, length: int) -> slice:
        start = int(torch.randint(length, ())) - self.size // 2
        return slice(max(start, 0), min(start + self.size, length))


def train_transform(spec: ImageSet, image_size: int, auto_aug: bool, cutout: bool) -> transforms.Compose:
    """Crop and flip, AutoAugment (CIFAR-10 policy), Cutout, normalise; 32 pixels: padding 4 and a hole of 16 x 16."""
    steps = [
        *_resize(spec, image_size),
        *[transforms.RandomCrop(image_size, padding=image_size // 8)] * spec.crop,
        *[transforms.RandomHorizontalFlip()] * spec.flip,
        *[transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10, fill=GREY)] * auto_aug,
        transforms.ToTensor(),
        *[Cutout(image_size // 2)] * cutout,
        _normalise(spec),
    ]
    return transforms.Compose(steps)


def test_transform(spec: ImageSet, image_size: int) -> transforms.Compose:
    return transforms.Compose([*_resize(spec, image_size), transforms.ToTensor(), _normalise(spec)])


test_transform.__test__ = False  # else pytest collects it wherever a test imports it


def image_transform(spec: ImageSet, image_size: int) -> transforms.Compose:
    """`test_transform` for an image of any size: its shorter side resized, cropped in the centre."""
    fit = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
    return transforms.Compose([*fit, transforms.ToTensor(), _normalise(spec)])


def _resize(spec: ImageSet, image_size: int) -> list:
    return [] if image_size == spec.stored_size else [transforms.Resize((image_size, image_size))]


def _normalise(spec: ImageSet) -> transforms.Normalize:
    return transforms.Normalize(spec.mean, spec.std)
