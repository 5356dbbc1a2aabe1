"""Draws doc/results/event_samples.png: the events, the frames and the label of four recordings of DIGITS_DVS.

python experiment/report/event_samples.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from util.dataset.digits_dvs import SENSOR, record
from util.dataset.event_frames import integrate_events

DIGITS = (0, 42, 23, 26)  # indices among scikit-learn's digits
FRAMES = 5
OFF, ON = "#2166ac", "#d6604d"


def draw_events(ax, events: np.ndarray) -> None:
    """Time runs to the right, so that the saccades appear as three bends of the digit's track."""
    colours = np.where(events["p"] == 1, ON, OFF)
    ax.scatter(events["t"] / 1000, events["x"], SENSOR - 1 - events["y"], c=colours, s=2.2, linewidths=0, alpha=0.7)
    ax.set(xlim=(0, 300), ylim=(0, SENSOR - 1), zlim=(0, SENSOR - 1), yticks=[], zticks=[], xticks=[0, 100, 200, 300])
    ax.tick_params(axis="x", pad=-3, labelsize=8)
    ax.set_xlabel("time [ms]", labelpad=-6, fontsize=9)
    ax.text(0, SENSOR / 2, -9, "x", fontsize=9)
    ax.text(0, -6, SENSOR / 2, "y", fontsize=9)
    ax.set_box_aspect((2.3, 1, 1), zoom=1.45)
    ax.view_init(elev=16, azim=-58)


def draw_frame(ax, frame: np.ndarray, top: float) -> None:
    """[2, H, W] as white paper on which ON events leave red and OFF events blue."""
    off, on = (np.clip(channel / top, 0, 1)[..., None] for channel in frame)
    blue, red = (1 - np.array(matplotlib.colors.to_rgb(colour)) for colour in (OFF, ON))
    ax.imshow(np.clip(1 - off * blue - on * red, 0, 1), interpolation="nearest")
    ax.set(xticks=[], yticks=[])


def main() -> None:
    digits = load_digits()
    figure = plt.figure(figsize=(13, 8.6), layout="constrained")
    grid = figure.add_gridspec(len(DIGITS), FRAMES + 4, width_ratios=[0.9, 1, 1, 1, *[1] * FRAMES])
    for row, (index, events) in enumerate(zip(DIGITS, record(digits.images[list(DIGITS)] / 16), strict=True)):
        ax = figure.add_subplot(grid[row, 0])
        ax.imshow(digits.images[index], cmap="gray")
        ax.set(xticks=[], yticks=[], title="8x8 image" if row == 0 else "")
        ax.set_ylabel(f"label {digits.target[index]}", fontsize=13, fontweight="bold")
        ax = figure.add_subplot(grid[row, 1:4], projection="3d")
        draw_events(ax, events)
        ax.set_title(f"{len(events)} events" + (" (red: ON, blue: OFF)" if row == 0 else ""), y=0.97, fontsize=11)
        starts = events["t"][:: len(events) // FRAMES] / 1000
        for i, frame in enumerate(integrate_events(events, FRAMES, SENSOR, SENSOR, "digit")):
            ax = figure.add_subplot(grid[row, 4 + i])
            draw_frame(ax, frame, top=3)
            ax.set_title(f"frame {i + 1}\n" * (row == 0) + f"from {starts[i]:.0f} ms", fontsize=9)
    figure.savefig(ROOT / "doc" / "results" / "event_samples.png", dpi=90)


if __name__ == "__main__":
    main()
