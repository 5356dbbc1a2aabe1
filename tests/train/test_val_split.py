"""--val_split: the best epoch is chosen on samples held out of the training set, and the test set is tested once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import util.train.engine
import util.train.report
import util.train.script
from tests.event_files import write_npz
from tests.experiment.script_helpers import check_continued, metrics, run_here, tiny_networks
from tests.experiment.test_script import Killed, kill_at
from util.data import load_dataset, load_event_dataset
from util.errors import UserError
from util.train.evaluation import evaluate
from util.train.script import TEST
from util.train.setup import LoadedData, held_out

FLAGS = ("--dataset", "DIGITS", "--arch", "vgg11", "--T", "1", "--num_epoch", "3", "--val_split", "0.1")


@pytest.fixture(scope="module", autouse=True)
def small():
    with tiny_networks("vgg11"):
        yield


def test_each_class_is_shared_alike_and_the_held_out_are_seen_as_in_a_test():
    train, test = load_dataset("DIGITS", None)
    train.transform = lambda image: torch.zeros(1)  # what augments
    data = LoadedData(train, test, 10, {})
    learned, held = held_out(data, 0.1, seed=0)
    assert sorted([*learned.indices, *held.indices]) == list(range(len(train)))
    counts = np.bincount(train.labels[held.indices])
    np.testing.assert_allclose(counts, np.bincount(train.labels) / 10, atol=1)
    assert learned[0][0].numel() == 1
    image, label = held[3]
    assert torch.equal(image, load_dataset("DIGITS", None)[0][int(held.indices[3])][0])
    assert label == train.labels[held.indices[3]]
    assert held.fingerprint() == train.fingerprint()
    assert held_out(data, 0.1, seed=0)[1].indices.tolist() == held.indices.tolist()
    assert held_out(data, 0.1, seed=1)[1].indices.tolist() != held.indices.tolist()


def test_frames_are_held_out_without_augmentation(tmp_path):
    train, test = load_event_dataset("FRAMES", write_npz(tmp_path), 4)
    learned, held = held_out(LoadedData(train, test, 3, {}), 0.5, seed=0)
    assert learned.dataset.transform is not None
    assert torch.equal(held[0][0], train.recordings[int(held.indices[0])][0])
    assert {label for _, label in held} == {0, 1, 2}


def test_data_of_one_s_own_without_labels_are_refused():
    with pytest.raises(UserError, match="--val_split needs training samples with labels and a transform"):
        held_out(LoadedData([(torch.zeros(1), 0)], [], 1, {}), 0.1, seed=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[int]]:
    """A run of three epochs, and on how many samples it was tested each time."""
    sizes = []

    def counted(net, method, precision, loader, *args, **kwargs):
        sizes.append(len(loader.dataset))
        return evaluate(net, method, precision, loader, *args, **kwargs)

    log_path = tmp_path_factory.mktemp("log")
    with pytest.MonkeyPatch.context() as patch:
        for module in (util.train.engine, util.train.report):
            patch.setattr(module, "evaluate", counted)
        assert run_here(*FLAGS, "--log_path", log_path, "--run", "whole") == 0
    return log_path / "whole", sizes


def test_the_test_set_is_tested_once_with_the_epoch_that_the_held_out_chose(whole, tmp_path, capfd):
    run, sizes = whole
    assert sizes == [144, 144, 144, 360]
    best = max(metrics(run), key=lambda row: row["val_acc"])
    assert best["val_acc"] * 144 / 100 == pytest.approx(round(best["val_acc"] * 144 / 100))
    log = (run / "train.log").read_text()
    assert "1293 training and 144 validation samples" in log
    assert f"best validation accuracy {best['val_acc']:.2f} % in epoch {best['epoch']} of 3" in log
    assert run_here("--evaluate", run, "--report", tmp_path / "report.json") == 0
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads((run / TEST).read_text())
    assert log.splitlines()[-1].endswith(capfd.readouterr().out.splitlines()[-1])


def test_a_run_continues_exactly_and_is_tested_if_that_is_left(whole, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        kill_at(patch, "before log", 2)
        with pytest.raises(Killed):
            run_here(*FLAGS, "--log_path", tmp_path, "--run", "again")

    def killed(*args):
        raise Killed

    again = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(util.train.script, "report_of", killed)
        with pytest.raises(Killed):
            run_here("--resume", again)
    assert not (again / TEST).exists()
    assert run_here("--resume", again) == 0
    check_continued(again, whole[0], 3)
    found, expected = (json.loads((run / TEST).read_text()) for run in (again, whole[0]))
    assert {**found, "checkpoint": ""} == {**expected, "checkpoint": ""}
    capfd.readouterr()
    assert run_here("--resume", again) == 0
    assert "nothing to continue" in capfd.readouterr().out
