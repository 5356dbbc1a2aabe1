"""The image data: splits, augmentation, what is accepted from a disk and what is refused, reproducible epochs."""

import bz2
import functools
import gzip
import hashlib
import logging
import os
import pickle
import random
import signal
import struct
import subprocess
import tarfile
import time
import tracemalloc
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision import datasets, transforms

from tests.cifar_format import write_cifar10, write_cifar100, write_mnist
from util.dataset.array_pickle import ArrayUnpickler
from util.dataset.image_augment import Cutout, test_transform, train_transform
from util.dataset.image_sets import DATASETS, ImageSet, load_dataset
from util.dataset.torchvision_files import of_torchvision
from util.errors import UserError
from util.train.batches import data_loaders, seed_step

WRITERS = {
    "CIFAR10": write_cifar10,
    "CIFAR100": write_cifar100,
    "MNIST": write_mnist,
    "FashionMNIST": functools.partial(write_mnist, name="FashionMNIST"),
}


def written(name: str, root: Path) -> Path | None:
    """The data path of a small data set: none of digits."""
    return WRITERS[name](root) if name in WRITERS else None


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test must neither wait for a network nor depend on there being none."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def cifar(tmp_path) -> Path:
    return write_cifar10(tmp_path)


def error_of(name: str, data_path, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(name, data_path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes) -> None:
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), **changes}, protocol=2))


def publish(monkeypatch, folder: Path, published=datasets.CIFAR10) -> None:
    """Declare the files of the folder to be the published ones."""

    def md5(file: str) -> str:
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    for part in ("train_list", "test_list"):
        monkeypatch.setattr(published, part, [[file, md5(file)] for file, _ in getattr(published, part)])
    meta = published.meta
    monkeypatch.setattr(published, "meta", {**meta, "md5": md5(meta["filename"])})


# Sets and their samples


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("CIFAR10", (100, 20), (3, 32, 32)),
        ("CIFAR100", (200, 100), (3, 32, 32)),
        ("MNIST", (100, 20), (1, 32, 32)),
        ("FashionMNIST", (100, 20), (1, 28, 28)),
        ("DIGITS", (1437, 360), (1, 8, 8)),
    ],
)
def test_a_sample_is_a_float_tensor_of_the_default_size_and_an_int(tmp_path, name, sizes, shape):
    sets = load_dataset(name, written(name, tmp_path))
    assert tuple(map(len, sets)) == sizes
    for part in sets:
        image, label = part[0]
        assert (image.shape, image.dtype, type(label)) == (shape, torch.float32, int)
        assert set(part.labels.tolist()) <= set(range(DATASETS[name].num_classes))
    assert (DATASETS[name].channels, DATASETS[name].image_size) == (shape[0], shape[-1])


@pytest.mark.parametrize("name", DATASETS)
def test_image_size_resizes_both_sets(tmp_path, name):
    for part in load_dataset(name, written(name, tmp_path), image_size=20):
        assert part[0][0].shape == (DATASETS[name].channels, 20, 20)


def test_native_size_leaves_the_test_image_as_stored(cifar):
    stored = pickle.loads((cifar / "test_batch").read_bytes())
    _, test = load_dataset("CIFAR10", cifar.parent)
    image, label = test[3]
    expected = torch.from_numpy(stored["data"][3].reshape(3, 32, 32)) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (DATASETS["CIFAR10"].mean, DATASETS["CIFAR10"].std))
    torch.testing.assert_close(image, (expected - mean) / std)
    assert label == stored["labels"][3]


def test_training_batches_follow_one_another(cifar):
    train, _ = load_dataset("CIFAR10", cifar.parent)
    last = pickle.loads((cifar / "data_batch_5").read_bytes())
    assert train.labels[80:].tolist() == last["labels"]
    assert np.array_equal(train.images[80].transpose(2, 0, 1).ravel(), last["data"][0])


def test_cifar100_uses_the_fine_labels(tmp_path):
    stored = pickle.loads((write_cifar100(tmp_path) / "test").read_bytes())
    assert load_dataset("CIFAR100", tmp_path)[1].labels.tolist() == stored["fine_labels"]


def test_mnist_reads_the_idx_files(tmp_path):
    folder = write_mnist(tmp_path)
    train, test = load_dataset("MNIST", tmp_path)
    assert np.array_equal(train.images, datasets.mnist.read_image_file(str(folder / "train-images-idx3-ubyte")))
    assert test.labels.tolist() == list((folder / "t10k-labels-idx1-ubyte").read_bytes()[8:])


def test_digits_need_no_path_and_split_by_class():
    train, test = load_dataset("DIGITS", None)
    assert (len(train), len(test)) == (1437, 360)
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert np.abs(shares - 0.2).max() < 0.005


def test_digits_split_is_the_same_whatever_the_seed():
    digests = set()
    for seed in (0, 1):
        np.random.seed(seed)
        random.seed(seed)
        torch.manual_seed(seed)
        train, test = load_dataset("DIGITS", None)
        digests.add(hashlib.sha256(test.images.tobytes() + test.labels.astype("<i8").tobytes()).hexdigest())
        assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert digests == {"a2fc2790f951761efa3de96d98e5fd3fec1bfbc4ef550eb2193c8e5117cf4c96"}


def test_digits_cover_the_range_of_bytes_and_are_normalised():
    train, _ = load_dataset("DIGITS", None)
    assert (train.images.min(), train.images.max()) == (0, 255)
    pixels = train.images / 255
    assert pixels.mean() == pytest.approx(DATASETS["DIGITS"].mean[0], abs=1e-4)
    assert pixels.std() == pytest.approx(DATASETS["DIGITS"].std[0], abs=1e-4)


@pytest.mark.parametrize("name", WRITERS)
def test_the_folder_of_the_files_itself_is_a_data_path(tmp_path, name):
    folder = WRITERS[name](tmp_path)
    for outer, inner in zip(load_dataset(name, tmp_path), load_dataset(name, folder), strict=True):
        assert np.array_equal(outer.images, inner.images)
    next(path for path in folder.iterdir()).unlink()
    assert f"{folder} lacks" in error_of(name, folder)
    assert not any(path.is_dir() for path in folder.iterdir())


# Augmentation


def test_cutout_erases_the_square_around_its_centre_clipped_at_the_border():
    torch.manual_seed(0)
    image = torch.ones(3, 32, 32)
    squares = {(max(c - 8, 0), min(c + 8, 32)): c for c in range(32)}  # first and last row (or column) -> centre
    centres = []
    for _ in range(400):
        erased = Cutout(16)(image) == 0
        rows, columns = (erased.any(0).any(d).nonzero().flatten().tolist() for d in (1, 0))
        assert erased[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert erased.sum() == 3 * len(rows) * len(columns)
        centres.append([squares[line[0], line[-1] + 1] for line in (rows, columns)])
    assert all(set(found) == set(range(32)) for found in zip(*centres, strict=True))
    assert (image == 1).all()


def test_cutout_centres_are_uniform_over_the_image():
    torch.manual_seed(0)
    counts = torch.zeros(8, 8)
    for _ in range(6400):
        counts += Cutout(1)(torch.ones(1, 8, 8))[0] == 0
    assert counts.sum() == 6400
    assert counts.min() > 60  # 100 expected, standard deviation 10
    assert counts.max() < 140


def kinds(transform) -> dict:
    return {type(step): step for step in transform.transforms}


def test_published_augmentation_of_cifar():
    steps = train_transform(DATASETS["CIFAR10"], 32, True, True).transforms
    assert [type(step) for step in steps] == [
        transforms.RandomCrop,
        transforms.RandomHorizontalFlip,
        transforms.AutoAugment,
        transforms.ToTensor,
        Cutout,
        transforms.Normalize,
    ]
    assert (steps[0].size, steps[0].padding, steps[4].size) == ((32, 32), 4, 16)
    assert (steps[2].policy, steps[2].fill) == (transforms.AutoAugmentPolicy.CIFAR10, 128)


@pytest.mark.parametrize("name", DATASETS)
def test_the_hole_of_cutout_is_black(name):
    spec = replace(DATASETS[name], crop=False)  # whose padding is black, too
    white = Image.new("RGB" if spec.channels == 3 else "L", (spec.stored_size,) * 2, "white")
    image = train_transform(spec, spec.image_size, False, True)(white)
    black, bright = ((value - torch.tensor(spec.mean)) / torch.tensor(spec.std) for value in (0, 1))
    for channel, low, high in zip(image, black, bright, strict=True):
        assert torch.isclose(channel.min(), low)
        assert torch.isclose(channel.max(), high)
    hole = torch.isclose(image, black[:, None, None]).all(dim=0)
    assert 0 < hole.sum() < hole.numel()


@pytest.mark.parametrize(("mode", "grey"), [("RGB", (128,) * 3), ("L", 128)])
def test_autoaugment_fills_with_grey(monkeypatch, mode, grey):
    """A shift by AutoAugment itself, of a white image: what comes in is grey."""
    spec = DATASETS["CIFAR10" if mode == "RGB" else "DIGITS"]
    (augment,) = (step for step in train_transform(spec, 32, True, False).transforms if hasattr(step, "policies"))
    augment.policies = [(("TranslateX", 1.0, 9), ("Identity", 0.0, None))]
    colours = {pixel for _, pixel in augment(Image.new(mode, (32, 32), "white")).getcolors()}
    assert colours == {Image.new(mode, (1, 1), "white").getpixel((0, 0)), grey}


@pytest.mark.parametrize(
    ("name", "published"), [("CIFAR10", True), ("CIFAR100", True), ("MNIST", False), ("DIGITS", False)]
)
@pytest.mark.parametrize(("option", "step"), [("auto_aug", transforms.AutoAugment), ("cutout", Cutout)])
def test_options_are_the_default_unless_given(tmp_path, name, published, option, step):
    data_path = written(name, tmp_path)
    for value, expected in ((None, published), (True, True), (False, False)):
        train, test = load_dataset(name, data_path, **{option: value})
        assert (step in kinds(train.transform)) == expected
        assert step not in kinds(test.transform)


@pytest.mark.parametrize(
    ("name", "flips"), [("CIFAR10", True), ("CIFAR100", True), ("MNIST", False), ("DIGITS", False)]
)
def test_digits_are_never_mirrored(name, flips):
    spec = DATASETS[name]
    half = np.zeros((spec.stored_size, spec.stored_size), np.uint8)
    half[:, : spec.stored_size // 2] = 255
    image = Image.fromarray(half).convert("RGB" if spec.channels == 3 else "L")
    transform = train_transform(spec, spec.image_size, False, False)
    torch.manual_seed(0)
    columns = [transform(image).mean(dim=(0, 1)) for _ in range(40)]
    middle = spec.image_size // 2
    mirrored = [bool(column[:middle].mean() < column[middle:].mean()) for column in columns]
    assert any(mirrored) == flips


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("image_size", [4, 8, 32])
def test_torch_seed_fixes_an_augmented_image(name, image_size):
    spec = DATASETS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (spec.stored_size, spec.stored_size, 3), np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if spec.channels == 3 else "L")
    transform = train_transform(spec, image_size, True, True)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([transform(image) for _ in range(20)])

    random.seed(1)
    np.random.seed(1)
    first = draw(0)
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert first.shape == (20, spec.channels, image_size, image_size)


@pytest.mark.parametrize("name", DATASETS)
def test_test_transform_draws_nothing(name):
    spec = DATASETS[name]
    image = Image.new("RGB" if spec.channels == 3 else "L", (spec.stored_size,) * 2, "white")
    before = torch.get_rng_state()
    result = test_transform(spec, spec.image_size)(image)
    assert torch.equal(before, torch.get_rng_state())
    expected = (1 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(result, expected[:, None, None].expand_as(result))


# A data set in one row


def write_usps(root: Path, monkeypatch) -> None:
    """USPS's two files, of which torchvision checks the MD5s: a label from 1 and 256 values from -1 to 1 a line."""
    for split, (_, file, _) in datasets.USPS.split_list.items():
        rows = [f"{i % 10 + 1} " + " ".join(f"{j}:{(i + j) % 3 - 1}" for j in range(1, 257)) for i in range(20)]
        content = bz2.compress("\n".join(rows).encode())
        (root / file).write_bytes(content)
        monkeypatch.setitem(datasets.USPS.split_list, split, ["", file, hashlib.md5(content).hexdigest()])


def row(of, **changes) -> ImageSet:
    return replace(DATASETS["FashionMNIST"], read=of_torchvision(of), **changes)


def test_a_data_set_of_torchvision_is_one_row(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "KMNIST", row(datasets.KMNIST))
    monkeypatch.setitem(DATASETS, "USPS", row(datasets.USPS, stored_size=16, image_size=16))
    write_mnist(tmp_path, name="KMNIST")
    write_usps(tmp_path, monkeypatch)
    assert load_dataset("KMNIST", tmp_path)[0].classes[1] == "ki"
    train, test = load_dataset("USPS", tmp_path)
    assert (len(train), len(test), train[3][0].shape, test[3][1]) == (20, 20, (1, 16, 16), 3)


def test_what_torchvision_cannot_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "USPS", row(datasets.USPS))
    assert f"{tmp_path} does not hold USPS, or it is damaged" in error_of("USPS", tmp_path)
    assert "USPS needs --data_path" in error_of("USPS", None)


# What is refused, and in which words


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar-10-python.tar.gz", "its checksum is not the published one"),
        ("cifar-10-batches-bin/data_batch_1.bin", "CIFAR's binary version"),
        ("cifar-10-matlab.tar.gz", "CIFAR's matlab version"),
        ("train/cat/1.png", "experiment/imagenet/main.py --dataset FOLDER"),
    ],
)
def test_what_lies_there_in_another_form_is_named_before_any_network_is_tried(tmp_path, name, words):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    message = error_of("CIFAR10", tmp_path)
    assert str(tmp_path / name.split("/")[0]) in message
    assert words in message


def test_unknown_name_lists_the_known_ones():
    assert "CIFAR10, CIFAR100, MNIST, FashionMNIST, DIGITS" in error_of("CIFAR11", None)


@pytest.mark.parametrize("size", [3, 0, -1, 1025])
def test_image_size_out_of_range(size):
    assert f"image size {size}" in error_of("DIGITS", None, image_size=size)


@pytest.mark.parametrize("name", WRITERS)
def test_missing_data_path(name):
    assert f"{name} needs --data_path" in error_of(name, None)


def test_data_path_that_is_a_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert f"{path} is not a directory" in error_of("CIFAR10", path)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-py"])
def test_unreadable_directory(cifar, monkeypatch, folder):
    locked = cifar.parent / folder
    allowed = os.access  # as root every directory is readable, so the answer is played
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and allowed(path, mode))
    assert f"{locked} cannot be read" in error_of("CIFAR10", cifar.parent)


def test_unreadable_file(cifar, monkeypatch):
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "data_batch_2":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert f"{cifar / 'data_batch_2'} cannot be read (Permission denied)" in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize(
    ("name", "folder"), [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python"), ("MNIST", "MNIST/raw")]
)
@pytest.mark.parametrize("data_path", ["", "new", "new/deeper"])
def test_failed_download_says_what_was_looked_for_and_leaves_nothing(tmp_path, capfd, name, folder, data_path):
    message = error_of(name, tmp_path / data_path)
    assert f"{tmp_path / data_path / folder} does not hold {name} and the download failed" in message
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_failed_download_leaves_the_users_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert "download failed" in error_of("CIFAR10", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "notes.txt"]


def test_download_moves_the_complete_set_into_place(tmp_path, monkeypatch):
    def fake_download(self) -> None:
        print("a progress bar")
        publish(monkeypatch, write_cifar10(self.root))

    monkeypatch.setattr(datasets.CIFAR10, "download", fake_download)
    train, _ = load_dataset("CIFAR10", tmp_path / "new")
    assert len(train) == 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-10-batches-py"]


def test_local_archive_needs_no_network(tmp_path, monkeypatch):
    folder = write_cifar10(tmp_path / "source")
    publish(monkeypatch, folder)
    archive = tmp_path / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load_dataset("CIFAR10", tmp_path)[0]) == 100
    assert archive.is_file()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("CIFAR10", "data_batch_3"),
        ("CIFAR10", "batches.meta"),
        ("CIFAR100", "test"),
        ("MNIST", "t10k-labels-idx1-ubyte"),
    ],
)
def test_partly_present_set_names_what_is_missing(tmp_path, name, file):
    folder = WRITERS[name](tmp_path)
    (folder / file).unlink()
    assert f"{folder} lacks {file}:" in error_of(name, tmp_path)


# Checksums


def test_published_checksums_are_accepted_in_silence(cifar, monkeypatch, caplog):
    publish(monkeypatch, cifar)
    load_dataset("CIFAR10", cifar.parent)
    assert not caplog.records


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_data_of_ones_own_is_accepted_and_said_so(tmp_path, caplog, name):
    folder = WRITERS[name](tmp_path)
    load_dataset(name, tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"{folder}: checksums differ from the published {name}")


def test_own_data_may_keep_the_published_label_names(cifar, monkeypatch, caplog):
    publish(monkeypatch, cifar)
    for file, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        edit(cifar / file, batch_label="mine")
    load_dataset("CIFAR10", cifar.parent)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("file", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_mixture_of_published_and_other_files_is_corrupt(cifar, monkeypatch, file):
    publish(monkeypatch, cifar)
    edit(cifar / file, num_vis=1)
    message = error_of("CIFAR10", cifar.parent)
    assert str(cifar / file) in message
    assert "checksum differs" in message
    assert "data_batch_1" not in message


# The content of files


class Payload:
    """Unpickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_code_in_a_file_does_not_run(cifar, tmp_path, file):
    edit(cifar / file, extra=Payload(tmp_path / "owned"))
    assert f"{cifar / file} is not usable: it contains code (" in error_of("CIFAR10", tmp_path)
    assert not (tmp_path / "owned").exists()


HOSTILE = {
    "memo index": pickle.NONE + b"r\xff\xff\xff\x02" + pickle.STOP,
    "slow codec": b"c_codecs\nencode\n(X"
    + struct.pack("<I", 60_000)
    + b"\xc3\xa4" * 30_000
    + b"X\x08\0\0\0punycodetR.",
    "the same text again and again": b"\x80\x02X"
    + struct.pack("<I", 10_000)
    + b"x" * 10_000
    + b"q\0"
    + b"c_codecs\nencode\n(h\0X\x06\0\0\0latin1tR" * 1000
    + b".",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_small_pickle_takes_neither_much_memory_nor_time(content):
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(ValueError, match=r"memo index|no array is written"):
            ArrayUnpickler(content).load()
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 2


def test_an_array_of_forged_object_pointers_is_never_made(cifar):
    forged = b"cnumpy\nndarray\n((K\x01tU\x01OU\x08" + b"\x01" * 8 + b"tR."
    (cifar / "test_batch").write_bytes(b"\x80\x02" + forged)
    assert str(cifar / "test_batch") in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": np.zeros((20, 3071), np.uint8)}, "shape (20, 3071)"),
        ({"data": np.zeros((20, 3, 32, 32), np.uint8)}, "shape (20, 3, 32, 32)"),
        ({"data": np.zeros((20, 3072), np.float32)}, "no array of bytes"),
        ({"data": np.full((20, 3072), None)}, "no array of bytes"),
        ({"data": None}, "no array of bytes"),
        ({"data": np.zeros((19, 3072), np.uint8)}, "19 images and 20 labels"),
        ({"labels": [0] * 19 + [10]}, "label 10 is out of range"),
        ({"labels": [-1] + [0] * 19}, "label -1 is out of range"),
        ({"labels": [0.0] * 20}, "no list of integers"),
        ({"labels": None}, "no list of integers"),
    ],
)
def test_batch_of_the_wrong_content_is_named(cifar, changes, reason):
    edit(cifar / "data_batch_2", **changes)
    message = error_of("CIFAR10", cifar.parent)
    assert str(cifar / "data_batch_2") in message
    assert reason in message


def test_batch_without_images_is_named(cifar):
    entry = {"data": np.zeros((0, 3072), np.uint8), "labels": []}
    (cifar / "data_batch_2").write_bytes(pickle.dumps(entry, protocol=4))
    assert f"{cifar / 'data_batch_2'} is not usable: it holds 0 images" in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize("names", [["a"] * 9, None, "abcdefghij"])
def test_label_names_are_a_list_of_one_for_each_class(cifar, names):
    edit(cifar / "batches.meta", label_names=names)
    assert f"{cifar / 'batches.meta'} is not usable: label_names" in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_truncated_batch_is_named(cifar, keep):
    path = cifar / "data_batch_5"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not usable: it is truncated or no pickle" in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize("content", [b"not a pickle", pickle.dumps([1, 2])])
def test_other_content_is_named(cifar, content):
    (cifar / "test_batch").write_bytes(content)
    assert f"{cifar / 'test_batch'} is not usable" in error_of("CIFAR10", cifar.parent)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("key", ["data", b"data"])
def test_every_pickle_protocol_is_read(cifar, protocol, order, key):
    stored = pickle.loads((cifar / "test_batch").read_bytes())
    entry = {"labels": stored["labels"], key: np.asarray(stored["data"], order=order)}
    (cifar / "test_batch").write_bytes(pickle.dumps(entry, protocol=protocol))
    _, test = load_dataset("CIFAR10", cifar.parent)
    assert np.array_equal(test.images.transpose(0, 3, 1, 2).reshape(20, 3072), stored["data"])


def test_a_batch_as_python_2_wrote_it_is_read(cifar):
    """The published files are of this kind: byte strings without a type of their own, numpy's oldest names."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3072), np.uint8)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    state = b"(K\x01(K\x02M\x00\x0ct" + dtype + b"\x89" + raw + b"tb"
    content = b"\x80\x02}(U\x04data" + array + state + b"U\x06labels](K\x07K\x03eu."
    (cifar / "test_batch").write_bytes(content)
    _, test = load_dataset("CIFAR10", cifar.parent)
    assert np.array_equal(test.images.transpose(0, 3, 1, 2).reshape(2, 3072), pixels)
    assert test.labels.tolist() == [7, 3]


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage", [lambda content: b"", lambda content: content[:-1], lambda content: b"\x00" * 4 + content[4:]]
)
def test_damaged_mnist_file_is_named(tmp_path, file, damage):
    path = write_mnist(tmp_path) / file
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is not usable" in error_of("MNIST", tmp_path)


@pytest.mark.parametrize(
    ("labels", "reason"), [(bytes([0] * 19 + [10]), "label 10 is out of range"), (bytes(19), "19 labels of 20 images")]
)
def test_mnist_labels_are_checked(tmp_path, labels, reason):
    path = write_mnist(tmp_path) / "t10k-labels-idx1-ubyte"
    path.write_bytes(struct.pack(">2I", 0x0801, len(labels)) + labels)
    message = error_of("MNIST", tmp_path)
    assert str(path) in message
    assert reason in message


def compress(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return packed


def test_mnist_is_read_from_its_gz_files_as_from_unpacked_ones(tmp_path):
    folder = write_mnist(tmp_path, name="FashionMNIST")
    unpacked = load_dataset("FashionMNIST", tmp_path)
    for path in list(folder.iterdir()):
        compress(path)
    for before, after in zip(unpacked, load_dataset("FashionMNIST", folder), strict=True):
        assert before.fingerprint() == after.fingerprint()
        assert after.classes[9] == "Ankle boot"


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda _: b"no gzip", lambda _: b""])
def test_a_damaged_gz_file_is_named(tmp_path, damage):
    path = compress(write_mnist(tmp_path) / "t10k-images-idx3-ubyte")
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is not usable" in error_of("MNIST", tmp_path)


def test_a_small_gz_file_of_much_memory_is_refused(tmp_path):
    path = write_mnist(tmp_path) / "t10k-images-idx3-ubyte"
    path.write_bytes(struct.pack(">4I", 0x0803, 200_000, 28, 28) + bytes(200_000 * 28 * 28))
    packed = compress(path)
    tracemalloc.start()
    try:
        assert f"{packed} is not usable: it expands more than 50-fold" in error_of("MNIST", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


# Loaders


def loaders(size: int = 60, batch: int = 16, workers: int = 0, device: str = "cpu", seed: int = 5):
    train, test = load_dataset("DIGITS", None, auto_aug=True, cutout=True)
    train.images, train.labels = train.images[:size], train.labels[:size]
    return data_loaders(train, test, batch, 128, workers, device, seed)


def epoch_batches(loader, epoch: int, step: int = 0) -> list[torch.Tensor]:
    loader.sampler.start_at(epoch, step)
    return [part for images, labels in loader for part in (images, labels)]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_depends_on_seed_and_number_alone(workers):
    running, test_loader = loaders(workers=workers)
    history = []
    for epoch in range(4):
        history.append(epoch_batches(running, epoch))
        torch.rand(epoch + 1)  # as a model, a validation, an evaluation of something else would
        next(iter(test_loader))
    resumed, _ = loaders(workers=workers)
    assert equal(epoch_batches(resumed, 3), history[3])
    assert not equal(history[2], history[3])
    other_seed, _ = loaders(workers=workers, seed=6)
    assert not equal(epoch_batches(other_seed, 3), history[3])


class Drawn(TensorDataset):
    """A sample's number, and behind the point what is drawn for it."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        (number,) = super().__getitem__(index)
        return number + torch.rand((), dtype=torch.float64), number


def test_each_epoch_has_an_order_and_each_sample_draws_of_its_own():
    samples = Drawn(torch.arange(32, dtype=torch.float64))
    loader, _ = data_loaders(samples, samples, 8, 8, 0, "cpu", 5)
    first, second = (torch.cat(epoch_batches(loader, epoch)[::2]) for epoch in (1, 2))
    assert first.floor().sort()[0].tolist() == second.floor().sort()[0].tolist() == list(range(32))
    assert not torch.equal(first.floor(), second.floor())
    assert len(torch.cat([first, second]).frac().unique()) == 64


@pytest.mark.cover(1)
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_an_epoch_can_be_entered_at_any_step_with_any_number_of_workers(workers, step):
    """Images, labels and augmentation; step 4 of 4 is its end."""
    whole = epoch_batches(loaders()[0], 2)
    assert len(whole) == 2 * 4
    loader, _ = loaders(workers=workers)
    next(iter(loader))  # a first iteration, given up
    assert equal(epoch_batches(loader, 2, step), whole[2 * step :])


def test_loading_a_batch_leaves_the_global_generators():
    """So that the network's own draws are the same with workers and without."""
    draws = []
    for workers in (0, 2):
        seed_step(1, 2, 3)
        next(iter(loaders(workers=workers)[0]))
        draws.append((torch.rand(()).item(), np.random.rand(), random.random()))
    assert draws[0] == draws[1]


def test_a_step_fixes_the_global_generators():
    def draw(*key: int) -> tuple:
        seed_step(*key)
        return torch.rand(()).item(), np.random.rand(), random.random()

    first = draw(1, 2, 3)
    assert draw(1, 2, 3) == first
    for other in (draw(2, 1, 3), draw(1, 3, 2), draw(1, 2, 4), draw(1, 2, 0)):
        assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_is_the_parents_to_act_on(number):
    """Ctrl-C goes to the workers as well: they must go on loading, lest the step not be finished."""
    loader, _ = loaders(workers=2)
    batches = iter(loader)
    next(batches)
    for worker in loader._iterator._workers:
        # By a process that is not the parent, as a terminal or a job scheduler is none.
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
    assert len(list(batches)) == 3


def test_a_worker_ends_when_its_parent_ends_it():
    loader, _ = loaders(workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_starting_the_test_loader_leaves_the_global_generator():
    _, test_loader = loaders()
    before = torch.get_rng_state()
    assert sum(len(labels) for _, labels in test_loader) == 360
    assert torch.equal(before, torch.get_rng_state())


def test_test_loader_keeps_the_order_and_training_is_shuffled():
    train_loader, test_loader = loaders()
    test_labels = torch.cat([labels for _, labels in test_loader])
    train_labels = torch.cat([labels for _, labels in train_loader])
    assert test_labels.tolist() == test_loader.dataset.labels.tolist()
    assert train_labels.tolist() != train_loader.dataset.samples.labels.tolist()
    assert sorted(train_labels.tolist()) == sorted(train_loader.dataset.samples.labels.tolist())


@pytest.mark.parametrize(
    ("size", "batch", "batches"),
    [(33, 16, [16, 16]), (34, 16, [16, 16, 2]), (32, 16, [16, 16]), (1, 16, [1]), (3, 1, [1, 1, 1]), (17, 17, [17])],
)
def test_only_a_last_batch_of_one_sample_is_dropped(size, batch, batches):
    data = TensorDataset(torch.zeros(size, 1))
    train_loader, test_loader = data_loaders(data, data, batch, batch, 0, "cpu", 0)
    assert [len(values) for (values,) in train_loader] == batches
    assert sum(len(values) for (values,) in test_loader) == size


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda:0", True)])
def test_memory_is_pinned_for_cuda_alone(device, pinned):
    data = TensorDataset(torch.zeros(4, 1))
    assert [loader.pin_memory for loader in data_loaders(data, data, 2, 2, 0, device, 0)] == [pinned, pinned]


def test_the_published_batch_size_is_the_default_of_the_published_data_sets():
    assert {name: spec.train_batch_size for name, spec in DATASETS.items()} == {
        "CIFAR10": 128,
        "CIFAR100": 128,
        "MNIST": 128,
        "FashionMNIST": 128,
        "DIGITS": 32,
    }
