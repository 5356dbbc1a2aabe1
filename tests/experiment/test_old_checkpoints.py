"""Checkpoints of earlier versions are resumed, evaluated, predicted with and analysed for good.

tests/fixtures/SCRIPT/ was left by SIGTERM in epoch 2 of 3 of these commands, run by the version of commit 5bb2948 on
`tiny_networks("vgg11")` (script_helpers.py) with ``--num_epoch 3 --T 2 --arch vgg11``; data.zip: their data.
Of a later version's checkpoints add a folder; these stay.
"""

import csv
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.experiment.script_helpers import (
    ANALYSIS,
    CIFAR,
    DVS,
    FOLDERS,
    PREDICT,
    load,
    metrics,
    run_here,
    tiny_networks,
)
from util.dataset.digits import read_digits

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
OLD = {
    # --dataset DIGITS --rate_flag --train_batch_size 256
    "cifar": CIFAR,
    # --dataset CIFAR10_DVS_Aug --step_mode s --neuron plif --surrogate atan --alpha 3 --train_batch_size 8
    "dvs": DVS,
    # --dataset FOLDER --step_mode s --rate_flag --windows 2 --model_ema --optim AdamW --lr_warmup_epochs 1
    # --image_size 16 --train_batch_size 4
    "imagenet": FOLDERS,
}


@pytest.fixture(params=OLD)
def old(request, tmp_path):
    """The name of a fixture, a copy of its run, and the flags that name its data."""
    run = Path(shutil.copytree(FIXTURES / request.param, tmp_path / "run"))
    flags = []
    if (run / "data.zip").exists():
        zipfile.ZipFile(run / "data.zip").extractall(tmp_path / "data")
        flags = ["--data_path", tmp_path / "data"]
    with tiny_networks("vgg11"):
        yield request.param, run, flags


def test_resumed(old):
    name, run, flags = old
    (before,) = [row for row, *_ in load(run / "last.pth")["logged"]]
    assert run_here("--resume", run, *flags, script=OLD[name]) == 0
    rows = metrics(run)
    assert rows[0] == before
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_evaluated(old, capfd):
    name, run, flags = old
    (row,) = [row for row, *_ in load(run / "last.pth")["logged"]]
    assert run_here("--evaluate", run, *flags, script=OLD[name]) == 0
    out = capfd.readouterr().out
    loss, accuracy = map(float, re.search(r"test loss ([\d.]+), accuracy ([\d.]+) %", out).groups())
    assert (loss, accuracy) == (pytest.approx(row["val_loss"], abs=2e-3), pytest.approx(row["val_acc"], abs=0.01))
    assert re.search("of an earlier version, without .*loss, momentum, rate_penalty, sltt_steps, tet_weight", out)


def test_predicted_with(old, tmp_path, capfd):
    name, run, _ = old
    if name == "dvs":
        file = tmp_path / "data" / "test" / "0.pt"
    elif name == "imagenet":
        file = tmp_path / "data" / "val" / "owl" / "0.jpg"
    else:
        file = tmp_path / "digit.png"
        Image.fromarray((read_digits()[0][0] * 15).astype("uint8").reshape(8, 8)).save(file)
    assert run_here(run, file, "--json", script=PREDICT) == 0
    (row,) = map(json.loads, capfd.readouterr().out.splitlines())
    assert len(row["classes"]) == min(5, len(load(run / "model_weights.pth")["classes"]))


def test_analysed(old, tmp_path):
    _, run, flags = old
    assert run_here("confusion", run, *flags, "--out", tmp_path / "out", script=ANALYSIS) == 0
    with open(tmp_path / "out" / "confusion.csv") as file:
        assert len(list(csv.DictReader(file))) == len(load(run / "model_weights.pth")["classes"])
