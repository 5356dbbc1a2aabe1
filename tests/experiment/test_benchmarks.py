"""The scripts beside the training scripts: benchmarks in small, and what none of them can use is one line.

Two processes compared, by scaling.py: tests/train/test_distributed.py; gpu.py: test_gpu.py.
"""

import csv
from pathlib import Path

import pytest

from experiment.benchmark.main import RIVALS
from tests.experiment.script_helpers import (
    ANALYSIS,
    DVS,
    LOADER,
    PREDICT,
    SCALING,
    STEPS,
    run_here,
    snapshot,
    tiny_networks,
)
from tests.photo_files import write_photos

PREPARE, THROUGHPUT = (DVS.with_name(f"{name}.py") for name in ("prepare", "read_throughput"))
GPU = STEPS.with_name("gpu.py")


def test_steps_are_measured_for_each_contender(tmp_path, capfd):
    with tiny_networks("vgg11"):
        small = ["--arch", "vgg11", "--T", "2", "--batch_size", "2", "--image_size", "8", "--repeats", "1"]
        assert run_here(*small, "--windows", "2", "--out", tmp_path / "new", script=STEPS) == 0
    with open(tmp_path / "new" / "cpu.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    printed = capfd.readouterr().out
    names = ["BPTT, m", "BPTT, s", *RIVALS, "rate-based, m", "rate-based, s", "rate-based, m, K = 2"]
    assert [row["name"] for row in rows] == names
    assert all(row["name"] in printed and float(row["median"]) > 0 for row in rows)
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".md", ".csv", ".png"}


def test_images_are_counted_for_each_number_of_workers(capfd):
    small = ["--workers", "0", "--batch_size", "2", "--batches", "3", "--epochs", "1"]
    assert run_here(*small, script=LOADER) == 0
    name, workers, speed = capfd.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert (name, workers) == ("in memory", "0")
    assert float(speed.split()[0]) > 0


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        (STEPS, "--no_such", ["unrecognized arguments: --no_such"]),
        (STEPS, "--T 1 --repeats 1 --out /dev/null/x", ["/dev/null/x: Not a directory"]),
        (LOADER, "--workers -1", ["--workers", "at least 0", "-1"]),
        (LOADER, "--folder absent", ["absent: No such file"]),
        (LOADER, "--folder few/cat", ["one folder of images a class"]),
        (LOADER, "--workers 0 --batch_size 40 --batches 3 --folder few", ["1 batches", "smaller --batch_size"]),
        (SCALING, "--T 0", ["--T", "at least 1"]),
        (SCALING, "", ["there is one process", "torchrun --nproc_per_node 2"]),
        (GPU, "--out DIR --stage right --seconds soon", ["--seconds", "'soon'"]),
        (THROUGHPUT, "--recordings none", ["--recordings", "'none'"]),
        (PREPARE, "", ["--archives, --out"]),
        (PREDICT, "", ["CHECKPOINT, FILE"]),
        (ANALYSIS, "", ["gradients, shuffle, rates, energy, confusion"]),
        (ANALYSIS, "heat log/RUN", ["invalid choice: 'heat'"]),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, capfd, script, line, words):
    write_photos(tmp_path / "few", 2)
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert run_here(*line.split(), script=script) == 2
    out, err = capfd.readouterr()
    assert err.startswith(f"{script.name}: error: ")
    assert err.count("\n") == 1, err
    assert [word for word in words if word not in err] == [], err
    assert (out, snapshot(tmp_path)) == ("", before)
