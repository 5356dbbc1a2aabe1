"""Small, learnable data sets in the published on-disk formats: CIFAR-10 and CIFAR-100 (python version), MNIST (idx).

A class is a colour and a coarse pattern, the same for every seed; a seed fixes the noise and the order of the labels.
"""

import pickle
import struct
from pathlib import Path

import numpy as np


def write_cifar10(directory: str | Path, images_per_batch: int = 20, seed: int = 0) -> Path:
    """Five training batches and a test batch of `images_per_batch` images; returns the folder of the files."""
    folder = _make_folder(directory, "cifar-10-batches-py")
    rng = np.random.default_rng(seed)
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = _labels(rng, images_per_batch, 10)
        _dump(folder / file, {"batch_label": file, "labels": labels, "data": _colour_rows(rng, labels, 10)})
    _dump(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)], "num_vis": 3072})
    return folder


def write_cifar100(directory: str | Path, train_images: int = 200, test_images: int = 100, seed: int = 0) -> Path:
    folder = _make_folder(directory, "cifar-100-python")
    rng = np.random.default_rng(seed)
    for file, count in (("train", train_images), ("test", test_images)):
        labels = _labels(rng, count, 100)
        coarse = [label // 5 for label in labels]
        _dump(folder / file, {"fine_labels": labels, "coarse_labels": coarse, "data": _colour_rows(rng, labels, 100)})
    names = {"fine_label_names": [f"class {i}" for i in range(100)], "coarse_label_names": [f"{i}" for i in range(20)]}
    _dump(folder / "meta", names)
    return folder


def write_mnist(
    directory: str | Path, train_images: int = 100, test_images: int = 20, seed: int = 0, name: str = "MNIST"
) -> Path:
    folder = _make_folder(directory, f"{name}/raw")
    rng = np.random.default_rng(seed)
    for prefix, count in (("train", train_images), ("t10k", test_images)):
        labels = _labels(rng, count, 10)
        images = _images(rng, labels, 10, channels=1, size=28)
        header = struct.pack(">4I", 0x0803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x0801, count) + bytes(labels))
    return folder


def _make_folder(directory: str | Path, name: str) -> Path:
    folder = Path(directory) / name
    folder.mkdir(parents=True)
    return folder


def _dump(path: Path, entry: dict) -> None:
    path.write_bytes(pickle.dumps(entry, protocol=2))  # the protocol of the published files


def _labels(rng: np.random.Generator, count: int, num_classes: int) -> list[int]:
    return rng.permutation(np.arange(count) % num_classes).tolist()


def _colour_rows(rng: np.random.Generator, labels: list[int], num_classes: int) -> np.ndarray:
    return _images(rng, labels, num_classes, channels=3, size=32).reshape(len(labels), 3072)


def _images(rng: np.random.Generator, labels: list[int], num_classes: int, channels: int, size: int) -> np.ndarray:
    """uint8, (N, C, H, W): the class's colour, 4 x 4 blocks of its pattern, noise."""
    classes = np.random.default_rng(num_classes)
    colours = classes.uniform(60, 195, (num_classes, channels, 1, 1))
    patterns = classes.uniform(-50, 50, (num_classes, channels, 4, 4)).repeat(size // 4, 2).repeat(size // 4, 3)
    noise = rng.normal(0, 10, (len(labels), channels, size, size))
    return (colours[labels] + patterns[labels] + noise).clip(0, 255).astype(np.uint8)
