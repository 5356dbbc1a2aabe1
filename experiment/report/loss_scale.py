"""Trains on scikit-learn's digits, still and moved, and writes what the loss scale 1/T does over T and epochs.

python experiment/report/loss_scale.py            doc/results/scale_results.md and .csv

Hours on a core; stop it at will, the next call goes on from the CSV.
"""

import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNSCALED = ["--rate_flag", "--no-rate_loss_scale"]
SEEDS = (0, 1, 2)
SCALE_COMMANDS = {
    "DIGITS": "experiment/cifar/main.py --dataset DIGITS --arch vggsnn_small --step_mode m",
    "DIGITS_DVS": "experiment/dvs/main.py --dataset DIGITS_DVS --arch vggsnn_small --step_mode m --train_batch_size 32",
}
SCALES = {"BPTT": [], "rate, not scaled": UNSCALED, "rate, scaled": ["--rate_flag"]}
SCALE_STEPS, SCALE_EPOCHS = (10, 2, 4, 8), (3, 10)
SCALE_COLUMNS = ("data", "T", "epochs", "method", "seed", "last", "best", "train_loss", "seconds")
SCALE_CSV = ROOT / "doc" / "results" / "scale_results.csv"


def train(command: str, flags: list[str], seed: int) -> dict[str, float]:
    """One run of the real script on one thread: accuracy after the last and best epoch, last loss, seconds of all."""
    with tempfile.TemporaryDirectory() as log:
        arguments = [*command.split(), *flags, "--seed", str(seed), "--log_path", log]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        (metrics,) = Path(log).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    print(f"{' '.join(flags)}, seed {seed}: last epoch {rows[-1]['val_acc']:.2f} %", flush=True)
    return {"last": rows[-1]["val_acc"], "best": max(row["val_acc"] for row in rows),
            "train_loss": rows[-1]["train_loss"], "seconds": sum(row["seconds"] for row in rows)}  # fmt: skip


def scale() -> None:
    """Runs what the CSV does not have, seed by seed, and writes the table after each run."""
    grid = itertools.product(SEEDS, SCALE_COMMANDS, SCALE_EPOCHS, SCALE_STEPS, SCALES)
    for seed, data, epochs, time_step, method in grid:
        done = scale_rows()
        write_scale_table(done)
        wanted = {"data": data, "T": time_step, "epochs": epochs, "method": method, "seed": seed}
        if any(wanted.items() <= row.items() for row in done):
            continue
        flags = ["--T", str(time_step), "--num_epoch", str(epochs), *SCALES[method]]
        results = {column: f"{value:.4f}" for column, value in train(SCALE_COMMANDS[data], flags, seed).items()}
        new = not SCALE_CSV.exists()
        with open(SCALE_CSV, "a", newline="") as file:
            writer = csv.DictWriter(file, SCALE_COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow({**wanted, **results})
    write_scale_table(scale_rows())


def scale_rows() -> list[dict]:
    if not SCALE_CSV.exists():
        return []
    with open(SCALE_CSV, newline="") as file:
        return [{**row, **{name: int(row[name]) for name in ("T", "epochs", "seed")}} for row in csv.DictReader(file)]


def write_scale_table(rows: list[dict]) -> None:
    """Replaces the table at the end of doc/results/scale_results.md; what stands above it is written by hand."""
    lines = [
        f"| data, epochs | T | {' | '.join(SCALES)} | scaled - not scaled | seeds |",
        f"| --- | --- |{' --- |' * (len(SCALES) + 2)}",
    ]
    for data, epochs, time_step in itertools.product(SCALE_COMMANDS, SCALE_EPOCHS, sorted(SCALE_STEPS)):
        own = [row for row in rows if (row["data"], row["epochs"], row["T"]) == (data, epochs, time_step)]
        found = {method: {row["seed"]: row for row in own if row["method"] == method} for method in SCALES}
        seeds = sorted(set.intersection(*map(set, (found["rate, scaled"], found["rate, not scaled"]))))
        if not seeds:
            continue  # the two would not be compared on the same seeds
        means = {
            method: statistics.mean(float(by_seed[seed]["last"]) for seed in seeds)
            for method, by_seed in found.items()
            if set(seeds) <= by_seed.keys()
        }
        cells = [f"{means[method]:.2f}" if method in means else "not run" for method in SCALES]
        change = means["rate, scaled"] - means["rate, not scaled"]
        lines.append(
            f"| {data}, {epochs} | {time_step} | {' | '.join(cells)} | {change:+.2f} | {', '.join(map(str, seeds))} |"
        )
    page = SCALE_CSV.with_suffix(".md")
    text = page.read_text() if page.exists() else "# The loss scale 1/T\n\n"
    page.write_text(text.partition("| data, epochs |")[0] + "\n".join(lines) + "\n")


if __name__ == "__main__":
    scale()
