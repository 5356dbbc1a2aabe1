"""Trains with BPTT and rate-based, both step modes, and three seeds, and writes the table of accuracies and times.

python doc/results.py digits            doc/digits_results.md
python doc/results.py dvs               doc/dvs_results.md
python doc/results.py spikformer        doc/spikformer_results.md, step mode m alone
"""

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
PAIRS = {
    "BPTT, m": ["--step_mode", "m"],
    "BPTT, s": ["--step_mode", "s"],
    "rate-based, m": ["--step_mode", "m", "--rate_flag"],
    "rate-based, s": ["--step_mode", "s", "--rate_flag"],
}
SEEDS = (0, 1, 2)


def train(command: str, pair: str, seed: int) -> list[dict]:
    """One run of the real script on one thread; returns its metrics, one dict an epoch."""
    with tempfile.TemporaryDirectory() as log:
        arguments = [*command.split(), *PAIRS[pair], "--seed", str(seed), "--log_path", log]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        (metrics,) = Path(log).glob("*/metrics.jsonl")
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    print(f"{pair}, seed {seed}: last epoch {rows[-1]['val_acc']:.2f} %", flush=True)
    return rows


def main(name: str) -> None:
    command = COMMANDS[name]
    pairs = [pair for pair in PAIRS if name != "spikformer" or pair.endswith("m")]
    at_a_time = len(os.sched_getaffinity(0))  # a core each
    # The pairs side by side, so that a slower hour meets all of them alike.
    with ThreadPoolExecutor(at_a_time) as pool:
        jobs = [(pair, pool.submit(train, command, pair, seed)) for seed in SEEDS for pair in pairs]
    runs = {pair: [job.result() for other, job in jobs if other == pair] for pair in pairs}
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    lines = [
        f"# Accuracy of {command.split()[4]} on {command.split()[2]}: {', '.join(pairs)}; three seeds",
        "",
        f"Made by `python doc/results.py {name}`, which runs",
        "",
        f"    python {command}",
        "",
        f"with {', '.join(f'`{shlex.join(PAIRS[pair])}`' for pair in pairs)}, and `--seed` "
        f"{', '.join(map(str, SEEDS))}.",
        f"Machine: {platform.machine()}, no GPU; one thread a run, {at_a_time} of them at a time; "
        f"Python {platform.python_version()}, {versions}.",
        "",
        "Test accuracy in percent after the last epoch (360 samples: one is 0.28 %), best epoch in brackets; seconds",
        "of all epochs together, evaluation included, start-up not, on a machine that may have had other work to do.",
        "",
        f"| method, mode | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean of last epochs | median seconds |",
        f"| --- |{' --- |' * (len(SEEDS) + 2)}",
    ]
    for pair, metrics in runs.items():
        last = [rows[-1]["val_acc"] for rows in metrics]
        best = [max(row["val_acc"] for row in rows) for rows in metrics]
        seconds = [sum(row["seconds"] for row in rows) for rows in metrics]
        cells = [f"{a:.2f} ({b:.2f})" for a, b in zip(last, best, strict=True)]
        lines.append(
            f"| {pair} | {' | '.join(cells)} | {statistics.mean(last):.2f} | {statistics.median(seconds):.1f} |"
        )
    Path(__file__).with_name(f"{name}_results.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in ([name] for name in COMMANDS):
        sys.exit(f"usage: python doc/results.py {{{','.join(COMMANDS)}}}")
    main(sys.argv[1])
