"""Draws doc/method/method.png, the idea in one picture: python experiment/report/method_figure.py"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

T, LAYERS = 4, 3
INK, FORWARD, BACKWARD, KEPT, FREED = "#222222", "#2b6cb0", "#c53030", "#bee3f8", "#f2f2f2"
ROW, COLUMN = 1.25, 1.2


def box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    style = FancyBboxPatch(
        (x - 0.4, y - 0.28), 0.8, 0.56, boxstyle="round,pad=0.02,rounding_size=0.08", fc=color, ec=INK, lw=1
    )
    ax.add_patch(style)
    ax.text(x, y, text, ha="center", va="center", fontsize=11, color=INK)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, dashed: bool = False) -> None:
    ax.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=11, color=color, lw=1.6, ls="--" if dashed else "-",
            shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def steps(ax: Axes, color: str, backward: bool) -> None:
    """The network unrolled over T steps: layers upward, time to the right."""
    for t in range(T):
        for layer in range(LAYERS):
            x, y = t * COLUMN, layer * ROW
            box(ax, x, y, f"$s^{layer + 1}[{t + 1}]$", color)
            if layer + 1 < LAYERS:
                arrow(ax, (x - 0.12, y + 0.3), (x - 0.12, y + ROW - 0.3), FORWARD)
                if backward:
                    arrow(ax, (x + 0.12, y + ROW - 0.3), (x + 0.12, y + 0.3), BACKWARD, dashed=True)
            if t + 1 < T:
                arrow(ax, (x + 0.42, y + 0.1), (x + COLUMN - 0.42, y + 0.1), FORWARD)
                if backward:
                    arrow(ax, (x + COLUMN - 0.42, y - 0.1), (x + 0.42, y - 0.1), BACKWARD, dashed=True)
        ax.text(t * COLUMN, -0.62, f"t = {t + 1}", ha="center", fontsize=10, color=INK)


def rate_pass(ax: Axes, x: float) -> None:
    for layer in range(LAYERS):
        y = layer * ROW
        box(ax, x, y, f"$r^{layer + 1}$", KEPT)
        ax.text(x + 0.5, y, f"$\\times\\, e^{layer + 1}$", va="center", fontsize=11, color=BACKWARD)
        arrow(ax, ((T - 1) * COLUMN + 0.48, y), (x - 0.45, y), "#888888")
        if layer + 1 < LAYERS:
            arrow(ax, (x - 0.12, y + 0.3), (x - 0.12, y + ROW - 0.3), FORWARD)
            arrow(ax, (x + 0.12, y + ROW - 0.3), (x + 0.12, y + 0.3), BACKWARD, dashed=True)
    ax.text((T - 1) * COLUMN + 1.15, 0.12, "mean\nover $t$", ha="center", va="bottom", fontsize=9, color="#666666")
    ax.text(x, -0.62, "rates", ha="center", fontsize=10, color=INK)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.5, 4.6), width_ratios=[1, 1.5])
    steps(left, KEPT, backward=True)
    left.set_title("BPTT: every step kept, backward through $L \\times T$", fontsize=12, color=INK)
    steps(right, FREED, backward=False)
    rate_pass(right, T * COLUMN + 1.0)
    right.set_title("Rate-based: T steps without a graph, then one backward through L", fontsize=12, color=INK)
    for ax, width in ((left, (T - 1) * COLUMN + 0.6), (right, T * COLUMN + 2.0)):
        ax.set(xlim=(-0.6, width), ylim=(-0.85, (LAYERS - 1) * ROW + 0.5), aspect="equal")
        ax.axis("off")
    keys = [(KEPT, INK, "kept for backward"), (FREED, INK, "freed at once"), (FORWARD, FORWARD, "forward"),
            (BACKWARD, BACKWARD, "backward")]  # fmt: skip
    handles = [plt.Line2D([], [], marker="s", ms=10, ls="", mfc=fc, mec=ec, label=label) for fc, ec, label in keys]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(Path(__file__).resolve().parents[2] / "doc" / "method" / "method.png", dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
