"""Folders of real image files, through the script a user runs."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.experiment.script_helpers import (
    FOLDERS,
    METRICS,
    PAIRS,
    check_continued,
    image_options,
    load,
    metrics,
    only_run,
    options_of,
    pair_flags,
    run_here,
    same,
    snapshot,
    tiny_networks,
)
from tests.photo_files import CLASSES, write_photos
from util.dataset.image_folder import load_folders
from util.errors import UserError
from util.train import checkpoint
from util.train.batches import Batches


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write_photos(root / "train", 6)
    write_photos(root / "val", 5)
    return root


@pytest.fixture
def images(intact, tmp_path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(intact, tmp_path / "images"))


@pytest.fixture(autouse=True)
def small():
    with tiny_networks("vgg11"):
        yield


def flags(images: Path, log_path: Path, *more: str | Path) -> list[str | Path]:
    few = ["--arch", "vgg11", "--T", "2", "--image_size", "16", "--num_epoch", "1", "--train_batch_size", "6"]
    where = ["--data_path", images, "--log_path", log_path, "--num_workers", "0"]
    return ["--dataset", "FOLDER", *few, *where, *more]


def refused(capfd, *args: str | Path) -> str:
    """The one line that the script ends with."""
    assert run_here(*args, script=FOLDERS) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_the_defaults_are_the_published_settings():
    options = options_of(FOLDERS)()
    published = {
        "arch": "sew_resnet34", "T": 4, "optim": "SGD", "lr": 0.2, "scheduler": "cosine", "wd": 2e-5,
        "train_batch_size": 512, "num_epoch": 100, "image_size": 224,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in published} == published
    assert image_options()().lr == 0.1  # the other scripts' are their own


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_trains_on_folders_of_images(intact, tmp_path, pair):
    assert run_here(*flags(intact, tmp_path, *pair_flags(*pair)), script=FOLDERS) == 0
    (row,) = metrics(only_run(tmp_path))
    assert list(row) == METRICS
    assert load(only_run(tmp_path) / "last.pth")["model"]["classifier.weight"].shape[0] == len(CLASSES)


def test_the_size_of_images_changes_the_training(intact, tmp_path):
    for name, more in (("16", []), ("again", ["--image_size", "16"]), ("24", ["--image_size", "24"])):
        assert run_here(*flags(intact, tmp_path / name, *more), script=FOLDERS) == 0
    first, again, other = (load(only_run(tmp_path / name) / "last.pth")["model"] for name in ("16", "again", "24"))
    assert same(first, again)
    assert not same(first, other)


def test_imagenet_is_read_from_train_and_val(intact, tmp_path, capfd):
    assert run_here(*flags(intact, tmp_path, "--dataset", "IMAGENET"), script=FOLDERS) == 0
    assert "18 training and 15 test samples of IMAGENET" in capfd.readouterr().out


def test_folders_may_have_test_in_place_of_val_but_imagenet_has_val(images, tmp_path, capfd):
    (images / "val").rename(images / "test")
    assert run_here(*flags(images, tmp_path / "runs"), script=FOLDERS) == 0
    capfd.readouterr()
    assert f"{images} holds no val/" in refused(capfd, *flags(images, tmp_path, "--dataset", "IMAGENET"))


def test_a_continued_run_is_the_uninterrupted_one(intact, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "forget_previous", lambda directory: None)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_here(*flags(intact, whole, "--num_epoch", "2", "--save_every", "2"), script=FOLDERS) == 0
    directory = shutil.copytree(only_run(whole), parts / "run")
    assert run_here("--resume", directory / "previous.pth", script=FOLDERS) == 0
    check_continued(directory, only_run(whole), 2)


def test_samples_are_rgb_of_the_size_asked_for_and_a_function_of_the_key(intact):
    train, test = load_folders(intact, ("val",), image_size=16)
    assert {tuple(image.shape) for image, _ in [*train, *test]} == {(3, 16, 16)}
    assert [label for _, label in test] == sorted([0, 1, 2] * 5)
    batches = Batches(train)
    first, again, other = (batches[(0, epoch, 0), [range(3)], [0, 1, 2]][0] for epoch in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(test[0][0], test[0][0])


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_named_before_training(images, tmp_path, capfd, content):
    path = images / "val" / "dog" / "1.jpg"
    path.write_bytes(content)
    assert str(path) in refused(capfd, *flags(images, tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named_when_it_is_read(images, tmp_path, capfd, workers):
    path = images / "train" / "owl" / "5.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert run_here(*flags(images, tmp_path / "runs", "--num_workers", workers), script=FOLDERS) == 2
    assert f"{path} cannot be read (image file is truncated" in capfd.readouterr().err


def empty_class(images: Path) -> None:
    (images / "train" / "ant").mkdir()


def no_classes(images: Path) -> None:
    shutil.rmtree(images / "val")
    (images / "val").mkdir()


def one_class_more(images: Path) -> None:
    shutil.copytree(images / "val" / "owl", images / "val" / "yak")


def one_class_less(images: Path) -> None:
    shutil.rmtree(images / "val" / "owl")


def no_train(images: Path) -> None:
    shutil.rmtree(images / "train")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty_class, ("train", "ant")),
        (no_classes, ("val", "class")),
        (one_class_more, ("val/yak", "same classes")),
        (one_class_less, ("train/owl", "same classes")),
        (no_train, ("holds no train/",)),
    ],
)
def test_what_is_wrong_with_the_folders_is_said_in_one_line(images, tmp_path, capfd, spoil, said):
    spoil(images)
    line = refused(capfd, *flags(images, tmp_path / "runs"))
    assert all(words in line for words in said)
    assert not (tmp_path / "runs").exists()


def test_the_folders_have_to_be_named(tmp_path, capfd):
    before = snapshot(tmp_path)
    assert "--data_path" in refused(capfd, "--dataset", "FOLDER", "--log_path", tmp_path / "runs")
    assert snapshot(tmp_path) == before


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load_folders(tmp_path / "nowhere", ("val",))
