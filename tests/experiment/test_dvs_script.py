"""From .aedat files to a trained network, through the scripts a user runs."""

import signal
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Frames of 40 recordings, made by prepare.py."""
    directory = tmp_path_factory.mktemp("recordings")
    write_folders(directory / "aedat", per_class=4)
    flags = ("--archives", directory / "aedat", "--out", directory / "frames", "--workers", "1")
    before = signal.getsignal(signal.SIGTERM)
    assert run_here(*flags, script=DVS.with_name("prepare.py")) == 0
    signal.signal(signal.SIGTERM, before)
    return directory / "frames"


@pytest.mark.cover(0)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_trains_on_prepared_recordings(prepared, tmp_path, capfd, pair):
    flags = [*SMALL, "--data_path", prepared, *pair_flags(*pair)]
    assert run_here(*flags, "--log_path", tmp_path, script=DVS) == 0
    (row,) = metrics(only_run(tmp_path))
    assert list(row) == METRICS
    out, err = capfd.readouterr()
    assert err == ""
    assert "T = 10" in out
    assert "30 training and 10 test samples" in out


def test_trains_on_the_published_layout_in_a_process_of_its_own(tmp_path):
    random_layout_a(tmp_path / "frames")
    flags = [*SMALL, "--data_path", "frames", "--log_path", "runs"]
    status, out, err = finish(start(*flags, cwd=tmp_path, script=DVS))
    assert (status, err) == (0, "")
    assert "20 training and 10 test samples" in out


def test_each_flag_of_events_changes_the_training(tmp_path):
    """The defaults typed make the weights of a run without them; another value makes others."""
    random_layout_a(tmp_path / "frames", time_steps=2, size=8)
    weights = []
    for i, flags in enumerate(("", "--augment --frames published", "--no-augment", "--frames counts")):
        base = [*SMALL, "--data_path", tmp_path / "frames", "--T", "2", "--log_path", tmp_path / str(i)]
        with tiny_networks("vggsnn_small"):
            assert run_here(*base, *flags.split(), script=DVS) == 0
        weights.append(load(only_run(tmp_path / str(i)) / "last.pth")["model"])
    assert [same(weights[0], other) for other in weights[1:]] == [True, False, False]


def test_a_recording_that_a_loading_process_finds_damaged_is_named_and_leaves_no_run(tmp_path, capfd):
    """Without such a process: f_cut_late of bad_inputs.py."""
    random_layout_a(tmp_path / "frames", size=8)
    path = tmp_path / "frames" / "train" / "13.pt"
    path.write_bytes(path.read_bytes()[:-100])
    flags = [*SMALL, "--data_path", tmp_path / "frames", "--num_workers", "2", "--log_path", tmp_path / "runs"]
    with tiny_networks("vggsnn_small"):
        assert run_here(*flags, script=DVS) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"{path} cannot be read" in err
    assert list((tmp_path / "runs").iterdir()) == []
