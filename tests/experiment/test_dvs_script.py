"""From .aedat files to a trained network, through the scripts a user runs."""

from pathlib import Path

import pytest

from tests.event_files import random_layout_a, write_folders
from tests.experiment.script_helpers import (
    DVS,
    METRICS,
    PAIRS,
    load,
    metrics,
    only_run,
    pair_flags,
    run_here,
    same,
    start,
    tiny_networks,
)
from tests.processes import finish

SMALL = ("--dataset", "CIFAR10_DVS_Aug", "--arch", "vggsnn_small", "--num_epoch", "1", "--train_batch_size", "32")


def run(*args: str | Path, cwd: Path) -> tuple[int, str, str]:
    return finish(start(*SMALL, *args, "--log_path", "runs", cwd=cwd, script=DVS))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Frames of 40 recordings, made by prepare.py."""
    directory = tmp_path_factory.mktemp("recordings")
    write_folders(directory / "aedat", per_class=4)
    flags = ("--archives", directory / "aedat", "--out", directory / "frames")
    status, _, err = finish(start(*flags, cwd=directory, script=DVS.with_name("prepare.py")))
    assert status == 0, err
    return directory / "frames"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_trains_on_prepared_recordings(prepared, tmp_path, pair):
    status, out, err = run("--data_path", prepared, *pair_flags(*pair), cwd=tmp_path)
    assert status == 0, err
    (row,) = metrics(only_run(tmp_path / "runs"))
    assert list(row) == METRICS
    assert "T = 10" in out
    assert "30 training and 10 test samples" in out


def test_trains_on_the_published_layout(tmp_path):
    random_layout_a(tmp_path / "frames")
    status, out, err = run("--data_path", tmp_path / "frames", cwd=tmp_path)
    assert status == 0, err
    assert "20 training and 10 test samples" in out


@pytest.mark.parametrize(
    ("default", "other"), [("--augment", "--no-augment"), ("--frames published", "--frames counts")]
)
def test_each_flag_of_events_changes_the_training(tmp_path, default, other):
    """Its default typed makes the weights of a run without it; the other value makes others."""
    random_layout_a(tmp_path / "frames", time_steps=2, size=8)
    base = [*SMALL, "--data_path", tmp_path / "frames", "--T", "2"]
    for name, more in (("without", ""), ("default", default), ("other", other)):
        with tiny_networks("vggsnn_small"):
            assert run_here(*base, *more.split(), "--log_path", tmp_path / name, script=DVS) == 0
    weights = {name: load(only_run(tmp_path / name) / "last.pth")["model"] for name in ("without", "default", "other")}
    assert same(weights["without"], weights["default"])
    assert not same(weights["default"], weights["other"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--T", "8"), ("--T 8", "10 frames")),
        (("--data_path", "nowhere"), ("nowhere", "train/0.pt", "manifest.json")),
        (("--arch", "vggsnn_dvs", "--dataset", "CIFAR10"), ("CIFAR10_DVS_Aug, DIGITS_DVS",)),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(prepared, tmp_path, flags, said):
    status, _, err = run("--data_path", prepared, *flags, cwd=tmp_path)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert all(word in err for word in said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_recording_that_turns_out_to_be_damaged_in_training_is_named_and_leaves_no_run(tmp_path, workers):
    random_layout_a(tmp_path / "frames")
    path = tmp_path / "frames" / "train" / "13.pt"
    path.write_bytes(path.read_bytes()[:-100])
    status, _, err = run("--data_path", tmp_path / "frames", "--num_workers", workers, cwd=tmp_path)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert f"{path} cannot be read" in err
    assert list((tmp_path / "runs").iterdir()) == []
