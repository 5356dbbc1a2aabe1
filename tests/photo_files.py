"""Folders of image files, as users keep them: one folder a class."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
MODES = ("RGB", "L", "RGBA", "P", "CMYK")


def write_photos(folder: Path, count: int) -> None:
    """JPEG and PNG files of every mode and of several sizes, brighter from class to class."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(80 * label, 80 * label + 80, (20 + i, 30, 3), np.uint8)
            mode = MODES[i % len(MODES)]
            suffix = "jpg" if mode in ("RGB", "L", "CMYK") else "png"
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.{suffix}")
