"""Draws doc/results/augmentation_samples.png: augmented images, and event frames of both kinds, as a network sees them.

python experiment/report/augmentation_samples.py [DIR]

DIR: the --data_path of CIFAR-10. Without it scikit-learn's digits are augmented in CIFAR's way.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from util.dataset.digits_dvs import SENSOR, record
from util.dataset.event_frames import KINDS, integrate_events
from util.dataset.image_augment import test_transform, train_transform
from util.dataset.image_sets import DATASETS, load_dataset

COLUMNS, IMAGES, FRAMES = 8, 4, 3
CAMERA = 128  # pixels a side of the camera of CIFAR10-DVS


def images(data_path: str | None) -> list[Image.Image]:
    if data_path:
        train, _ = load_dataset("CIFAR10", data_path)
        return [Image.fromarray(train.images[i]) for i in range(IMAGES)]
    digits = np.rint(load_digits().images[:IMAGES] * (255 / 16)).astype(np.uint8)
    return [Image.fromarray(digit).convert("RGB").resize((32, 32)) for digit in digits]


def show_image(ax, image: Tensor) -> None:
    """Undoes the normalisation of [3, H, W]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (DATASETS["CIFAR10"].mean, DATASETS["CIFAR10"].std))
    ax.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0))


def event_counts() -> Tensor:
    """[T, 2, CAMERA, CAMERA]: a simulated recording, enlarged to the size of CIFAR10-DVS."""
    (events,) = record(load_digits().images[42:43] / 16)
    counts = torch.from_numpy(integrate_events(events, FRAMES, SENSOR, SENSOR, "digit")).float()
    return F.interpolate(counts, size=CAMERA, mode="nearest")


def main() -> None:
    torch.manual_seed(0)
    figure, axes = plt.subplots(IMAGES + 2, COLUMNS, figsize=(COLUMNS, IMAGES + 3.2), layout="constrained")
    spec = DATASETS["CIFAR10"]
    plain, augment = test_transform(spec, 32), train_transform(spec, 32, auto_aug=True, cutout=True)
    for row, image in zip(axes, images(sys.argv[1] if len(sys.argv) > 1 else None), strict=False):
        show_image(row[0], plain(image))
        for ax in row[1:]:
            show_image(ax, augment(image))
    axes[0, 0].set_title("stored", fontsize=8)
    axes[0, 1].set_title("as trained on: crop, flip, AutoAugment, Cutout", fontsize=8, loc="left").set_in_layout(False)
    counts = event_counts()
    for row, (name, kind) in zip(axes[IMAGES:], KINDS.items(), strict=True):
        frames = kind.resize(counts, 48)  # (T, 2, 48, 48)
        for i, channel in enumerate(frames.flatten(0, 1)):
            row[i].imshow(channel, cmap="magma", vmin=0, vmax=float(frames.max()))
            row[i].set_title(f"t = {i // 2}, p = {i % 2}", fontsize=7)
        row[0].set_ylabel(f"--frames\n{name}", fontsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        if not ax.has_data():
            ax.set_axis_off()
    target = ROOT / "doc" / "results" / "augmentation_samples.png"
    figure.savefig(target, dpi=110)
    Image.open(target).convert("RGB").quantize(128).save(target, optimize=True)  # a fifth of the size


if __name__ == "__main__":
    main()
