"""Trains by the real scripts, method beside method and seed by seed, and writes what came out.

python experiment/report/results.py digits
python experiment/report/results.py nmnist --data_path DIR     frames of T = 10, as experiment/dvs/prepare.py makes them
python experiment/report/results.py fashion --data_path DIR
python experiment/report/results.py cifar10 --data_path DIR

Each run's row goes into doc/results/NAME.csv, the table into doc/results/NAME.md. Stopped, the next call goes on from
the CSV. One thread a run, one run after another: start several NAMEs at once where there are cores.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "doc" / "results"
COLUMNS = ("method", "seed", "last", "best", "test_loss", "cpu_seconds", "peak_mib", "commit")


@dataclass(frozen=True)
class Grid:
    """Runs of one command: with each method's flags, and with each seed."""

    title: str
    command: str
    epochs: int
    windows: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    both_modes: bool = False
    sltt: bool = True

    @property
    def methods(self) -> dict[str, list[str]]:
        found = {"BPTT": [], "rate-based, K = 1, loss scale 1/T (as published)": ["--rate_flag"]}
        unscaled = ["--rate_flag", "--no-rate_loss_scale"]
        found |= {f"rate-based, K = {k}": [*unscaled, "--windows", str(k)] for k in self.windows}
        if self.both_modes:
            found |= {"rate-based, K = 1, step mode s": [*unscaled, "--step_mode", "s"]}
        if self.sltt:
            found |= {"SLTT": ["--method", "sltt", "--step_mode", "s"]}
            found |= {"SLTT-1": ["--method", "sltt", "--sltt_steps", "1", "--step_mode", "s"]}
        return found


GRIDS = {
    "digits": Grid("DIGITS", "experiment/cifar/main.py --dataset DIGITS --arch vggsnn_small --T 4", 6, (1, 2, 4)),
    "digits_dvs": Grid(
        "DIGITS_DVS",
        "experiment/dvs/main.py --dataset DIGITS_DVS --arch vggsnn_small --T 10 --train_batch_size 32",
        3, (1, 2, 5, 10),
    ),
    "nmnist": Grid(
        "N-MNIST, the first 1,000 training and 100 test recordings",
        "experiment/dvs/main.py --dataset N_MNIST --arch vggsnn_small --T 10 --train_batch_size 32", 10, (1, 2, 5, 10),
        both_modes=True,
    ),
    "fashion": Grid(
        "Fashion-MNIST", "experiment/cifar/main.py --dataset FashionMNIST --arch vggsnn_small --T 4", 3, (1, 2, 4)
    ),
    "cifar10": Grid("CIFAR-10", "experiment/cifar/main.py --dataset CIFAR10 --arch vggsnn_small --T 4", 3, (1, 2, 4)),
}  # fmt: skip


def train(grid: Grid, flags: list[str], seed: int, data_path: str | None) -> dict[str, float]:
    """One run of the script, in a process of its own, on one thread."""
    with tempfile.TemporaryDirectory() as log:
        data = ["--data_path", data_path] if data_path else []
        mode = [] if "--step_mode" in flags else ["--step_mode", "m"]
        command = [*grid.command.split(), "--num_epoch", str(grid.epochs), *mode, *flags, *data]
        command += ["--seed", str(seed), "--log_path", log, "--num_workers", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        (metrics,) = Path(log).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "last": rows[-1]["val_acc"], "best": max(row["val_acc"] for row in rows), "test_loss": rows[-1]["val_loss"],
        "cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024,
    }  # fmt: skip


def rows_of(name: str) -> list[dict[str, str]]:
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def append(name: str, row: dict[str, object]) -> None:
    path, new = RESULTS / f"{name}.csv", not (RESULTS / f"{name}.csv").exists()
    RESULTS.mkdir(exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_page(name: str) -> None:
    """The table of what the CSV has."""
    grid, rows = GRIDS[name], rows_of(name)
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    seeds = sorted({int(row["seed"]) for row in rows})
    lines = [
        f"# {grid.title}: methods side by side", "",
        f"Made by `python experiment/report/results.py {name}` (rows: [{name}.csv]({name}.csv), each with its commit; "
        f"machine: {platform.machine()}, no GPU, one thread on a shared machine; {versions}), which runs", "",
        f"    python {grid.command} --num_epoch {grid.epochs}", "",
        f"in step mode m (SLTT, which has no other, in s) with seeds {', '.join(map(str, seeds))}. Test accuracy in "
        "percent after the last epoch: mean and, of several seeds, standard deviation; CPU seconds and peak memory are "
        "those of the whole process, its start included, medians. For speed alone see the benchmark.", "",
        f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | deviation | CPU s | peak MiB |",
        f"| --- |{' --- |' * (len(seeds) + 4)}",
    ]  # fmt: skip
    for method in grid.methods:
        own = {int(row["seed"]): row for row in rows if row["method"] == method}
        if not own:
            continue
        last = {seed: float(row["last"]) for seed, row in own.items()}
        cells = [f"{last[seed]:.2f}" if seed in last else "not run" for seed in seeds]
        deviation = f"{statistics.stdev(last.values()):.2f}" if len(last) > 1 else ""
        seconds, peak = (statistics.median(float(row[c]) for row in own.values()) for c in ("cpu_seconds", "peak_mib"))
        cells += [f"{statistics.mean(last.values()):.2f}", deviation, f"{seconds:.0f}", f"{peak:.0f}"]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("--data_path", help="as of the script that trains")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: all of the table's)")
    parser.add_argument("--table", action="store_true", help="only write the table of what has been run")
    options = parser.parse_args()
    grid = GRIDS[options.name]
    data_path = options.data_path and os.path.abspath(options.data_path)
    for seed in [] if options.table else options.seeds or grid.seeds:
        for method, flags in grid.methods.items():
            if any((row["method"], int(row["seed"])) == (method, seed) for row in rows_of(options.name)):
                continue
            found = train(grid, flags, seed, data_path)
            append(options.name, {"method": method, "seed": seed, "commit": commit(),
                                  **{column: f"{value:.2f}" for column, value in found.items()}})  # fmt: skip
            print(
                f"{grid.title}, {method}, seed {seed}: {found['last']:.2f} %, {found['cpu_seconds']:.0f} s", flush=True
            )
            write_page(options.name)
    write_page(options.name)


if __name__ == "__main__":
    main()
