"""From a checkpoint and a file to names: what was seen in training is seen again, whatever the file's size."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.event_files import aedat_bytes, events_of_class
from tests.experiment.script_helpers import DVS, FOLDERS, PREDICT, metrics, only_run, run_here, tiny_networks
from tests.photo_files import write_photos
from util.data import load_dataset
from util.train import checkpoint
from util.train.predictor import Predictor


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The run directory of a network of DIGITS; beside it the test set as PNG files, named after their digit."""
    root = tmp_path_factory.mktemp("digits")
    with tiny_networks("vgg11"):
        few = ["--arch", "vgg11", "--T", "2", "--num_epoch", "2", "--step_mode", "s", "--rate_flag"]
        assert run_here("--dataset", "DIGITS", *few, "--log_path", root / "log") == 0
    test = load_dataset("DIGITS", None)[1]
    for i, (pixels, label) in enumerate(zip(test.images, test.labels, strict=True)):
        (root / "images" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / "images" / str(label) / f"{i}.png")
    return only_run(root / "log")


@pytest.fixture(autouse=True)
def small():
    with tiny_networks("vgg11"):
        yield


def predicted(capfd, *args: str | Path) -> list[dict]:
    """The objects that the script prints with --json."""
    capfd.readouterr()
    assert run_here(*args, "--json", script=PREDICT) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_the_test_set_as_files_gets_the_test_accuracy(digits, capfd):
    found = predicted(capfd, digits, digits.parents[1] / "images", "--top", "1")
    right = [Path(row["file"]).parent.name == row["classes"][0]["class"] for row in found]
    best = max(row["val_acc"] for row in metrics(digits))
    assert 100 * np.mean(right) == pytest.approx(best)


def test_a_digit_of_another_size_is_resized(digits, tmp_path):
    predictor = Predictor(digits)
    pixels = np.rint(load_digits().images[0] * (255 / 16)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.fromarray(pixels).convert("RGB").resize((64, 48), Image.BICUBIC).save(tmp_path / "large.png")
    small, large = (predictor.read(tmp_path / name) for name in ("small.png", "large.png"))
    assert small.shape == large.shape == (1, 8, 8)


def test_probabilities_are_those_of_the_mean_output(digits):
    predictor = Predictor(digits / "last.pth")
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        mean = sum(predictor.net(x) for _ in range(2)) / 2
    torch.testing.assert_close(predictor.probabilities(list(x)), mean.softmax(1))


def test_a_line_names_the_classes_by_probability(digits, capfd):
    image = next((digits.parents[1] / "images" / "3").iterdir())
    capfd.readouterr()
    assert run_here(digits, image, "--top", "2", script=PREDICT) == 0
    (line,) = capfd.readouterr().out.splitlines()
    file, _, classes = line.partition(": ")
    probabilities = [float(part.split()[1]) for part in classes.split(", ")]
    assert file == str(image)
    assert len(probabilities) == 2
    assert probabilities == sorted(probabilities, reverse=True)


def test_folders_give_their_names_to_the_classes(tmp_path, capfd):
    write_photos(tmp_path / "train", 6)
    write_photos(tmp_path / "val", 5)
    few = ["--arch", "vgg11", "--T", "2", "--image_size", "16", "--num_epoch", "1", "--train_batch_size", "6"]
    where = ["--dataset", "FOLDER", "--data_path", tmp_path, "--num_workers", "0", "--log_path", tmp_path / "log"]
    assert run_here(*few, *where, script=FOLDERS) == 0
    (row,) = predicted(capfd, only_run(tmp_path / "log"), tmp_path / "val" / "owl" / "0.jpg")
    assert {entry["class"] for entry in row["classes"]} == {"cat", "dog", "owl"}
    assert sum(entry["probability"] for entry in row["classes"]) == pytest.approx(1, abs=1e-5)


def test_recordings_are_integrated_as_in_training(tmp_path, capfd):
    frames = tmp_path / "frames"
    for split in ("train", "test"):
        (frames / split).mkdir(parents=True)
        for i in range(4):
            torch.save((torch.rand(2, 2, 48, 48), i), frames / split / f"{i}.pt")
    few = ["--arch", "vgg11", "--T", "2", "--num_epoch", "1", "--log_path", tmp_path / "log"]
    assert run_here("--dataset", "CIFAR10_DVS_Aug", "--data_path", frames, *few, script=DVS) == 0
    run = only_run(tmp_path / "log")
    recording = tmp_path / "truck.aedat"
    recording.write_bytes(aedat_bytes(events_of_class(9)))
    rows = predicted(capfd, run, recording, frames / "test", "--top", "10")
    assert len(rows) == 5
    assert {entry["class"] for entry in rows[0]["classes"]} >= {"airplane", "truck"}
    assert Predictor(run).read(recording).shape == (2, 2, 48, 48)


def test_classes_without_names_are_numbers(digits, tmp_path):
    """As in checkpoints of earlier versions."""
    saved = checkpoint.load(digits / "last.pth")
    del saved["classes"]
    checkpoint.save(tmp_path / "earlier.pth", **saved)
    assert Predictor(tmp_path / "earlier.pth").classes == Predictor(digits).classes


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda file: None, "is not there"),
        (lambda file: file.write_bytes(b"no image"), "no image file"),
        (lambda file: file.mkdir(), "holds no file"),
    ],
    ids=["missing", "no image", "empty folder"],
)
def test_a_file_that_cannot_be_used_is_named(digits, tmp_path, capfd, make, words):
    make(tmp_path / "x.png")
    capfd.readouterr()
    assert run_here(digits, tmp_path / "x.png", script=PREDICT) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert str(tmp_path / "x.png") in line
    assert words in line


def test_a_reader_that_has_read_enough_is_no_error(digits, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_here(digits, digits.parents[1] / "images", script=PREDICT) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ""


def test_a_name_that_no_file_can_have_is_named(digits, tmp_path, capfd):
    assert run_here(digits, tmp_path / ("x" * 300), script=PREDICT) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "xxx: File name too long" in line


def test_a_checkpoint_of_no_script_is_refused(digits, tmp_path, capfd):
    saved = checkpoint.load(digits / "last.pth")
    for name, change, words in [
        ("config.pth", {"config": {}}, "no configuration"),
        ("data.pth", {"config": {**saved["config"], "dataset": "MINE"}}, "name it with --script"),
        ("classes.pth", {"classes": [1]}, "class names"),
        ("weights.pth", {"model": {}}, "do not fit"),
        ("neither.pth", {"model": 1, "classes": None}, "class names"),
    ]:
        checkpoint.save(tmp_path / name, **{**saved, **change})
        capfd.readouterr()
        assert run_here(tmp_path / name, tmp_path, script=PREDICT) == 2
        assert words in capfd.readouterr().err
