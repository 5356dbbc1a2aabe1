"""Draws doc/results/real_samples.png: real recordings and images beside those that the project makes by itself.

python experiment/report/real_samples.py --n_mnist DIR --fashion_mnist DIR
(DIR: what prepare.py takes for N_MNIST, and experiment/cifar/main.py for FashionMNIST.)
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from experiment.report.event_samples import draw_frame
from util.dataset.digits_dvs import SENSOR, record
from util.dataset.event_frames import integrate_events
from util.dataset.event_readers import ATIS_34
from util.dataset.image_sets import load_dataset

SHOWN, FRAMES = (3, 7), 6  # labels


def events_of(folder: Path, label: int) -> tuple[list, int, str]:
    path = sorted((folder / "Train" / str(label)).glob("*.bin"))[0]
    return ATIS_34.read(path, str(path)), 34, f"N-MNIST, {label}"


def simulated(label: int) -> tuple[list, int, str]:
    digits = load_digits()
    return record(digits.images[digits.target == label][:1] / 16)[0], SENSOR, f"DIGITS_DVS, {label}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_mnist", type=Path, required=True, metavar="DIR")
    parser.add_argument("--fashion_mnist", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    recordings = [make for label in SHOWN for make in (events_of(args.n_mnist, label), simulated(label))]
    figure, axes = plt.subplots(len(recordings) + 2, 10, figsize=(11, 7.5), layout="constrained")
    for ax in axes.flat:
        ax.set_axis_off()
    for row, (events, size, name) in zip(axes, recordings, strict=False):
        frames = integrate_events(events, FRAMES, size, size, name)
        counts = frames.reshape(-1)[frames.reshape(-1) > 0]
        for ax, frame in zip(row, frames, strict=False):
            draw_frame(ax, frame, top=np.quantile(counts, 0.95))
            ax.set_axis_on()
        said = f"{name}:\n{len(events['t'])} events, at most\n{frames.max():.0f} a pixel and frame"
        row[FRAMES].text(0, 0.5, said, va="center", fontsize=9).set_in_layout(False)
    for row, (name, path) in zip(axes[-2:], (("FashionMNIST", args.fashion_mnist), ("DIGITS", None)), strict=True):
        samples, _ = load_dataset(name, path)
        for label, ax in enumerate(row):
            ax.imshow(samples.images[samples.labels == label][0], cmap="gray")
            ax.set_title(f"{name}\n{samples.classes[label]}" if label == 0 else samples.classes[label], fontsize=8)
    figure.savefig(ROOT / "doc" / "results" / "real_samples.png", dpi=80)


if __name__ == "__main__":
    main()
