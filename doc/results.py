"""Trains on scikit-learn's digits and writes the tables of accuracies: by gradient, step mode and loss scale.

python doc/results.py digits            doc/digits_results.md
python doc/results.py dvs               doc/dvs_results.md; step mode m's runs are those of scale_results.csv
python doc/results.py spikformer        doc/spikformer_results.md: step mode m alone
python doc/results.py scale             doc/scale_results.md and .csv: the loss scale 1/T over T and epochs. Hours on a
                                        core; stop it at will, the next call goes on from the CSV
"""

import csv
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "digits": "experiment/cifar/main.py --dataset DIGITS --arch resnet18 --T 4 --num_epoch 6",
    "dvs": "experiment/dvs/main.py --dataset DIGITS_DVS --arch vggsnn_small --num_epoch 10 --train_batch_size 32",
    "spikformer": "experiment/cifar/main.py --dataset DIGITS --arch spikformer_small --T 4 --num_epoch 4 "
    "--optim AdamW --lr 0.002",
}
UNSCALED = ["--rate_flag", "--no-rate_loss_scale"]
PAIRS = {
    "BPTT, m": ["--step_mode", "m"],
    "BPTT, s": ["--step_mode", "s"],
    "rate-based, m": ["--step_mode", "m", "--rate_flag"],
    "rate-based, s": ["--step_mode", "s", "--rate_flag"],
    "rate-based without 1/T, m": ["--step_mode", "m", *UNSCALED],
    "rate-based without 1/T, s": ["--step_mode", "s", *UNSCALED],
}
PAIRS_OF = {"spikformer": ("BPTT, m", "rate-based, m")}  # of the others all
SEEDS = (0, 1, 2)

SCALE_COMMANDS = {
    "DIGITS": "experiment/cifar/main.py --dataset DIGITS --arch vggsnn_small --step_mode m",
    "DIGITS_DVS": "experiment/dvs/main.py --dataset DIGITS_DVS --arch vggsnn_small --step_mode m --train_batch_size 32",
}
SCALES = {"BPTT": [], "rate, not scaled": UNSCALED, "rate, scaled": ["--rate_flag"]}
SCALE_OF = {"BPTT, m": "BPTT", "rate-based without 1/T, m": "rate, not scaled", "rate-based, m": "rate, scaled"}
SCALE_STEPS, SCALE_EPOCHS = (10, 2, 4, 8), (3, 10)
SCALE_COLUMNS = ("data", "T", "epochs", "method", "seed", "last", "best", "train_loss", "seconds")
SCALE_CSV = Path(__file__).with_name("scale_results.csv")


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


def run_of_pair(name: str, pair: str, seed: int) -> dict[str, float]:
    """As `train`; the grid of `scale` has DIGITS_DVS in step mode m, by the same command in other words."""
    grid = {"data": "DIGITS_DVS", "T": 10, "epochs": 10, "method": SCALE_OF.get(pair), "seed": seed}
    for row in scale_rows() if name == "dvs" else ():
        if grid.items() <= row.items():
            return {column: float(row[column]) for column in ("last", "best", "train_loss", "seconds")}
    return train(COMMANDS[name], PAIRS[pair], seed)


def machine() -> str:
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    return f"{platform.machine()}, no GPU, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def by_pair(name: str) -> None:
    command, pairs = COMMANDS[name], PAIRS_OF.get(name, tuple(PAIRS))
    # As many at a time as there are cores; the pairs side by side, so that a slower hour meets all of them alike.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(pair, pool.submit(run_of_pair, name, pair, seed)) for seed in SEEDS for pair in pairs]
    runs = {pair: [job.result() for other, job in jobs if other == pair] for pair in pairs}
    source = ["Step mode `m`: the runs of [scale_results.csv](scale_results.csv) with T = 10, 10 epochs."]
    lines = [
        f"# Accuracy of {command.split()[4]} on {command.split()[2]}: method, step mode, loss scale; three seeds",
        "",
        f"Made by `python doc/results.py {name}`, which runs",
        "",
        f"    python {command}",
        "",
        f"with {', '.join(f'`{shlex.join(PAIRS[pair])}`' for pair in pairs)}, each",
        f"with `--seed` {', '.join(map(str, SEEDS))}.",
        f"Machine: {machine()}; one thread a run, {os.cpu_count()} runs at a time.",
        *(source if name == "dvs" else []),
        "",
        "Test accuracy in percent after the last epoch (360 samples: one is 0.28 %), best epoch in brackets; seconds",
        "of all epochs together, evaluation included, start-up not, whatever else the machine did: for speed see",
        "[performance.md](performance.md).",
        "",
        f"| method, mode | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean of last epochs | median seconds |",
        f"| --- |{' --- |' * (len(SEEDS) + 2)}",
    ]
    for pair, results in runs.items():
        last, best, seconds = ([run[column] for run in results] for column in ("last", "best", "seconds"))
        cells = [f"{a:.2f} ({b:.2f})" for a, b in zip(last, best, strict=True)]
        lines.append(
            f"| {pair} | {' | '.join(cells)} | {statistics.mean(last):.2f} | {statistics.median(seconds):.1f} |"
        )
    lines += ["", "Over T and epochs: [scale_results.md](scale_results.md), of vggsnn_small."]
    Path(__file__).with_name(f"{name}_results.md").write_text("\n".join(lines) + "\n")


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
    """Replaces the table at the end of doc/scale_results.md; what stands above it is written by hand."""
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


def main(name: str) -> None:
    scale() if name == "scale" else by_pair(name)


if __name__ == "__main__":
    names = [*COMMANDS, "scale"]
    if sys.argv[1:] not in ([name] for name in names):
        sys.exit(f"usage: python doc/results.py {{{','.join(names)}}}")
    main(sys.argv[1])
