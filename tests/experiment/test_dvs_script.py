"""From .aedat files to a trained network, through the scripts a user runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.event_files import random_layout_a, write_folders
from tests.experiment.script_helpers import METRICS, PAIRS, pair_flags

DVS = Path(__file__).resolve().parents[2] / "experiment" / "dvs"
SMALL = ("--dataset", "CIFAR10_DVS_Aug", "--arch", "vggsnn_small", "--num_epoch", "1", "--train_batch_size", "32")


def run(script: str, *args: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(DVS / script), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Frames of 40 recordings, made by prepare.py."""
    directory = tmp_path_factory.mktemp("recordings")
    write_folders(directory / "aedat", per_class=4)
    done = run("prepare.py", "--archives", directory / "aedat", "--out", directory / "frames", cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory / "frames"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_trains_on_prepared_recordings(prepared, tmp_path, pair):
    done = run("main.py", *SMALL, "--data_path", prepared, "--log_path", "runs", *pair_flags(*pair), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "runs").glob("*/metrics.jsonl")
    (row,) = map(json.loads, metrics.read_text().splitlines())
    assert list(row) == METRICS
    assert "T = 10" in done.stdout
    assert "30 training and 10 test samples" in done.stdout


def test_trains_on_the_published_layout(tmp_path):
    random_layout_a(tmp_path / "frames")
    done = run("main.py", *SMALL, "--data_path", tmp_path / "frames", "--log_path", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "20 training and 10 test samples" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--T", "8"), ("--T 8", "10 frames")),
        (("--data_path", "nowhere"), ("nowhere", "train/0.pt", "manifest.json")),
        (("--arch", "vggsnn_dvs", "--dataset", "CIFAR10"), ("CIFAR10_DVS_Aug, DIGITS_DVS",)),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(prepared, tmp_path, flags, said):
    done = run("main.py", *SMALL, "--data_path", prepared, "--log_path", "runs", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert all(word in done.stderr for word in said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_recording_that_turns_out_to_be_damaged_in_training_is_named_and_leaves_no_run(tmp_path, workers):
    random_layout_a(tmp_path / "frames")
    path = tmp_path / "frames" / "train" / "13.pt"
    path.write_bytes(path.read_bytes()[:-100])
    flags = ("--data_path", tmp_path / "frames", "--log_path", "runs", "--num_workers", workers)
    done = run("main.py", *SMALL, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"{path} cannot be read" in done.stderr
    assert list((tmp_path / "runs").iterdir()) == []
