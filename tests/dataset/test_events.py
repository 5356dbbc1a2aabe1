"""The event-camera data: from .aedat bytes to frames, what is refused, augmentation, and the simulated camera."""

import functools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader

from experiment.dvs import prepare
from tests.event_files import (
    CLASSES,
    HEADER,
    aedat3_bytes,
    aedat_bytes,
    atis_bytes,
    atis_events,
    events_of_class,
    random_layout_a,
    write_archives,
    write_folders,
    write_gesture,
    write_layout_a,
    write_n_caltech101,
    write_n_mnist,
    write_npz,
)
from tests.processes import finish, start_python
from util.data import load_event_dataset
from util.dataset import checksums, digits_dvs, event_data
from util.dataset.digits_dvs import SENSOR, THRESHOLD, log_intensity, read_events, record, thresholds
from util.dataset.event_data import DATASETS, FlipAndRoll
from util.dataset.event_frames import KINDS, MANIFEST, integrate_events, published_frames, resize_frames, write_split
from util.dataset.event_readers import DVS128, read_aedat2, read_aedat3, read_atis, spikingjelly_cifar10_dvs
from util.dataset.event_sources import CIFAR10_DVS_CLASSES, find_cifar10_dvs
from util.errors import UserError
from util.staging import only_reading

SCRIPT = Path(prepare.__file__)
DIGITS = 300


def start_prepare(archives: Path, out: Path, *flags: str, **more: Any) -> subprocess.Popen:
    """From another directory: the script has to find the repository by itself."""
    return start_python(SCRIPT, "--archives", archives, "--out", out, *flags, cwd=Path("/"), **more)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, monkeypatch, archives: Path, out: Path, *flags: str) -> str:
    """The one line that prepare.py ends with; the final place holds nothing then."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--archives", str(archives), "--out", str(out), *flags])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stop:
            sys.exit(prepare.main())
        assert stop.value.code == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("prepare.py: error: ")
    assert not out.exists() or {path.name for path in out.iterdir()} <= {prepare.UNFINISHED}
    assert not list(out.rglob("*.tmp"))
    return error


def error_of(name: str, data_path, time_steps: int = 10) -> str:
    with pytest.raises(UserError) as caught:
        load_event_dataset(name, data_path, time_steps)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return write_folders(tmp_path_factory.mktemp("raw") / "folders")


@pytest.fixture(scope="module")
def archives(tmp_path_factory, folders) -> Path:
    return write_archives(tmp_path_factory.mktemp("raw") / "archives", folders)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, archives) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "frames"
    status, printed, err = finish(start_prepare(archives, out, "--workers", "2"))
    assert status == 0, err
    assert "100 recordings integrated to 10x2x48x48 frames" in printed
    assert "100%" in printed  # the progress bar
    return out


@pytest.fixture
def own_folders(tmp_path, folders) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(folders, tmp_path / "own")


@pytest.fixture
def own_prepared(tmp_path, prepared) -> Path:
    return shutil.copytree(prepared, tmp_path / "frames")


@pytest.fixture(scope="module")
def digits_path(tmp_path_factory) -> Iterator[Path]:
    """DIGITS_DVS made of the first DIGITS digits alone."""
    path = tmp_path_factory.mktemp("digits")
    images, labels = load_digits().images[:DIGITS], load_digits().target[:DIGITS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_dvs, "read_digits", lambda: (images, labels))
        load_event_dataset("DIGITS_DVS", path, 10)
        yield path


# From events to frames


def test_spikingjelly_reads_back_the_events_that_were_written(tmp_path):
    events = events_of_class(3)
    path = tmp_path / "cifar10_cat_0.aedat"
    path.write_bytes(aedat_bytes(events))
    read = read_aedat2(path, "cat")
    assert all(np.array_equal(read[key], events[key]) for key in "txyp")


@pytest.mark.parametrize("count", [10, 400, 407])
def test_every_event_is_counted_once_in_the_frame_of_its_number_pixel_and_polarity(count):
    events = events_of_class(5, count=count)
    frames = integrate_events(events, 10, 128, 128, "x")
    expected = np.zeros((10, 2, 128, 128))
    for i in range(count):
        expected[min(i // (count // 10), 9), events["p"][i], events["y"][i], events["x"][i]] += 1
    assert np.array_equal(frames, expected)


@pytest.mark.parametrize("size", [20, 48, 200])
def test_resizing_keeps_the_polarities_apart_and_the_mean(size):
    frames = torch.zeros(3, 2, 128, 128)
    frames[1, 1] = torch.poisson(torch.full((128, 128), 3.0), generator=torch.Generator().manual_seed(0))
    resized = resize_frames(frames, size)
    assert resized.shape == (3, 2, size, size)
    assert resized[1, 1].mean() == pytest.approx(float(frames[1, 1].mean()), rel=0.02)
    resized[1, 1] = 0
    assert not resized.any()


def test_a_resized_frame_is_what_each_polarity_gives_alone():
    frames = torch.rand(2, 2, 64, 96) * 4
    alone = torch.stack([resize_frames(frames[:, [i, i]], 48)[:, 0] for i in range(2)], dim=1)
    assert torch.equal(resize_frames(frames, 48), alone)


def constant(first: float, second: float, size: int = 48) -> torch.Tensor:
    """[1, 2, size, size]: one value for each polarity."""
    return torch.tensor([first, second])[None, :, None, None].expand(1, 2, size, size)


@pytest.mark.parametrize(("count", "value"), [(0, 0), (1, 1), (2, 254), (3, 253), (255, 1), (256, 0), (257, 255)])
def test_published_frames_are_nearly_binary(count, value):
    """255 times the count, modulo 256, of 255; 48x48 already, so that nothing is resized."""
    expected = torch.tensor(value / 255 if count > 1 else float(value))
    for frames, polarity in ((constant(count, 0), 0), (constant(0, count), 1)):
        published = published_frames(frames, 48)
        assert published.dtype == torch.float32
        assert (published[:, polarity] == expected).all()
        assert not published[:, 1 - polarity].any()


@pytest.mark.parametrize(
    ("counts", "expected"), [((1, 0), (0, 0)), ((0, 1), (0, 1)), ((1, 1), (1, 1)), ((2, 1), (254 / 255, 1))]
)
def test_resizing_published_frames_takes_polarity_1_for_the_opacity_of_polarity_0(counts, expected):
    assert torch.equal(published_frames(constant(*counts, size=128), 48), constant(*expected).float())


def test_published_frames_mix_the_polarities_pixel_by_pixel():
    """Half the size, by hand: what remains of polarity 0 is its mean weighted by polarity 1, to a byte's rounding."""
    frames = torch.zeros(1, 2, 96, 96)
    frames[:, 0, :, :48] = 1  # left half; polarity 1: left quarter and right half
    frames[:, 1, :, :24] = frames[:, 1, :, 48:] = 1
    published = published_frames(frames, 48)
    assert (published[0, :, :, 5] == torch.tensor([[1.0], [1.0]])).all()
    assert (published[0, :, :, 18] == torch.tensor([[0.0], [0.0]])).all()  # counts 1, of full transparency
    assert (published[0, :, :, 40] == torch.tensor([[0.0], [1.0]])).all()


# prepare.py


def test_the_split_is_disjoint_stratified_and_stable(prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert set(manifest["splits"]["train"]["recordings_per_class"].values()) == {9}
    assert set(manifest["splits"]["test"]["recordings_per_class"].values()) == {1}
    parts = prepare.split_of(1000, 4, seed=0)
    assert sorted([*parts["train"], *parts["test"]]) == list(range(1000))
    assert len(parts["train"]) == 900
    assert np.array_equal(parts["test"], prepare.split_of(1000, 4, seed=0)["test"])
    assert not np.array_equal(parts["test"], prepare.split_of(1000, 4, seed=1)["test"])
    assert not np.array_equal(parts["test"], prepare.split_of(1000, 5, seed=0)["test"])
    assert parts["test"][:5].tolist() == [20, 25, 26, 30, 31]  # a seed means the same split for good


def test_no_pixel_is_skipped_where_frames_are_resized():
    """Of 128 frames with one event each, at another place of a row."""
    at, frames = torch.arange(128), torch.zeros(128, 2, 128, 128)
    frames[at, 0, 64, at] = 1
    assert resize_frames(frames, 48).sum((1, 2, 3)).min() > 0.1  # 48 * 48 / (128 * 128) = 0.14


@pytest.mark.parametrize("kind", KINDS)
def test_both_layouts_give_the_same_samples(tmp_path, folders, kind):
    prepared = tmp_path / "prepared"
    prepare.prepare(folders, prepared, 10, 48, seed=0, workers=1, frame_kind=kind)
    assert json.loads((prepared / "manifest.json").read_text())["settings"]["frame_kind"] == kind
    pairs = {"train": [], "test": []}
    for source in find_cifar10_dvs(folders, DVS128):
        counts = [integrate_events(events, 10, 128, 128, name) for name, events in source.recordings(0, 10)]
        for split, chosen in prepare.split_of(10, source.label, seed=0).items():
            pairs[split] += [(torch.from_numpy(counts[i]).float(), torch.tensor([source.label])) for i in chosen]
    layout_a = write_layout_a(tmp_path / "a", pairs)
    sets = (load_event_dataset("CIFAR10_DVS_Aug", path, 10, False, kind) for path in (layout_a, prepared))
    for a, b in zip(*sets, strict=True):
        assert len(a) == len(b)
        for (frames_a, label_a), (frames_b, label_b) in zip((a[i] for i in range(len(a))), b, strict=False):
            assert torch.equal(frames_a, frames_b)
            assert label_a == label_b
            assert type(label_a) is type(label_b) is int
            assert frames_a.dtype == frames_b.dtype == torch.float32
            assert frames_a.shape == (10, 2, 48, 48)


def test_archives_and_extracted_files_give_the_same_bytes(capsys, tmp_path, folders, prepared):
    out = tmp_path / "out"
    prepare.prepare(folders, out, 10, 48, seed=0, workers=1)
    assert content(out) == content(prepared)
    prepare.prepare(folders, out, 10, 48, seed=0, workers=1)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(UserError, match="other settings"):
        prepare.prepare(folders, out, 10, 48, seed=1, workers=1)
    assert content(out) == content(prepared)


@pytest.fixture(scope="module")
def long_folders(tmp_path_factory) -> Path:
    """Recordings that take a while."""
    return write_folders(tmp_path_factory.mktemp("raw") / "long", per_class=10, count=60_000)


@pytest.fixture(scope="module")
def long_prepared(tmp_path_factory, long_folders) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("long") / "frames"
    prepare.prepare(long_folders, out, 10, 48, seed=0, workers=1)
    return content(out)


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "1"), (signal.SIGKILL, "2")])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    capsys, tmp_path, long_folders, long_prepared, stop, workers
):
    out = tmp_path / "out"
    # A background job of a shell ignores Ctrl-C, and so would its children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start_prepare(long_folders, out, "--workers", workers, preexec_fn=listen)
    unfinished = out / prepare.UNFINISHED
    while not list(unfinished.glob("*_000000.npy")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(stop)
    status, _, err = finish(process)  # when the workers, too, have let go of the pipes
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[stop]
    assert "Traceback" not in err
    assert not (out / "manifest.json").exists()
    assert "prepare.py" in error_of("CIFAR10_DVS_Aug", out)
    prepare.prepare(long_folders, out, 10, 48, seed=0, workers=1)
    assert "by an earlier run" in capsys.readouterr().out
    assert content(out) == long_prepared


def test_parts_are_skipped_unless_cut_short_or_of_other_settings(tmp_path, folders):
    sources = find_cifar10_dvs(folders, DVS128)
    settings = {"frames": 4, "size": 16, "frame_kind": "counts"}
    with prepare.open_unfinished(tmp_path, settings) as unfinished:
        assert prepare.make_parts(unfinished, sources, settings, workers=1) == 0
    part = unfinished / "cat_000000.npy"
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    (unfinished / "dog_000000.1.tmp").write_bytes(whole[:-100])
    with prepare.open_unfinished(tmp_path, settings):
        assert prepare.make_parts(unfinished, sources, settings, workers=1) == 90
    assert part.read_bytes() == whole
    assert not list(unfinished.glob("*.tmp"))


def test_parts_of_recordings_that_were_replaced_since_are_made_anew(monkeypatch, tmp_path, own_folders):
    def ends(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "assemble", ends)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(own_folders, tmp_path / "out", 4, 48, 0, workers=1)
    (own_folders / "frog" / "cifar10_frog_7.aedat").write_bytes(aedat_bytes(events_of_class(0, 9, 500)))
    for out in ("out", "whole"):
        prepare.prepare(own_folders, tmp_path / out, 4, 48, 0, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_others_began_is_left_as_it_is(tmp_path, folders):
    (tmp_path / "mine" / prepare.UNFINISHED).mkdir(parents=True)
    (tmp_path / "mine" / prepare.UNFINISHED / "thesis.txt").write_text("years of work")
    (tmp_path / "mine" / "unfinished").mkdir()
    settings = {"frames": 4, "size": 16, "frame_kind": "counts"}
    with prepare.open_unfinished(tmp_path / "begun", settings) as unfinished:
        (unfinished / "cat_000000.npy").write_bytes(b"a part")
    for out in (tmp_path / "mine", tmp_path / "begun"):
        before = content(out)
        with pytest.raises(UserError, match="was begun with other settings"):
            prepare.prepare(folders, out, 4, 48, seed=0, workers=1)
        assert {**content(out), **before} == content(out)
    assert (tmp_path / "mine" / "unfinished").is_dir()


def test_what_is_prepared_outlasts_a_power_cut(monkeypatch, tmp_path, folders):
    """Each file is on the disk before it has its name."""

    def sync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced
        rename(source, target)
        renamed.append(target.name)

    fsync, rename, synced, renamed = os.fsync, os.replace, set(), []
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    prepare.prepare(folders, tmp_path, 4, 48, seed=0, workers=1)
    assert set(renamed) > set(content(tmp_path))
    assert renamed[-1] == MANIFEST


def test_a_second_start_on_the_same_directory_is_locked_out(capsys, monkeypatch, tmp_path, folders):
    with prepare.open_unfinished(tmp_path, {"frames": 4}) as unfinished:
        error = refused(capsys, monkeypatch, folders, tmp_path)
        assert f"another prepare.py is at work on {tmp_path}" in error
        assert (unfinished / "settings.json").is_file()


def test_a_recording_that_lies_twice_in_a_class_is_refused(capsys, monkeypatch, tmp_path, own_folders):
    (own_folders / "cat" / "cat").mkdir()
    shutil.copy(own_folders / "cat" / "cifar10_cat_3.aedat", own_folders / "cat" / "cat" / "cifar10_cat_3.aedat")
    error = refused(capsys, monkeypatch, own_folders, tmp_path / "out")
    assert all(word in error for word in ("cat/cifar10_cat_3.aedat", "same recording"))
    shutil.rmtree(own_folders / "cat" / "cat")
    archives = write_archives(tmp_path / "zip", own_folders)
    with zipfile.ZipFile(archives / "dog.zip", "a") as archive:
        archive.write(own_folders / "dog" / "cifar10_dog_4.aedat", "again/cifar10_dog_4.aedat")
    error = refused(capsys, monkeypatch, archives, tmp_path / "out")
    assert all(word in error for word in ("dog.zip", "again/cifar10_dog_4.aedat", "same recording"))


def test_a_class_without_its_thousand_recordings_is_said(capsys, tmp_path, own_folders):
    (own_folders / "ship" / "cifar10_ship_3.aedat").unlink()
    prepare.prepare(own_folders, tmp_path / "out", 10, 48, 0, workers=1)
    said = capsys.readouterr().out
    assert "99 of the 10000 recordings of CIFAR10-DVS as published: " in said
    assert "horse 10, ship 9, truck 10" in said


def test_a_recording_cut_between_two_events_is_said_by_its_size(capsys, tmp_path, own_folders):
    path = own_folders / "cat" / "cifar10_cat_3.aedat"
    path.write_bytes(path.read_bytes()[: -8 * 250])  # of 400 events
    prepare.prepare(own_folders, tmp_path / "out", 10, 48, 0, workers=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "perhaps cut off" in line]
    assert len(said) == 1
    assert said[0].startswith(f"{own_folders}/cat: ")
    assert said[0].endswith(": cifar10_cat_3.aedat")


@pytest.mark.parametrize("version", ["3.1", "4.0"])
def test_another_aedat_format_is_named(tmp_path, version):
    path = tmp_path / "cifar10_cat_0.aedat"
    path.write_bytes(aedat_bytes(events_of_class(3)).replace(b"AER-DAT2.0", f"AER-DAT{version}".encode()))
    with pytest.raises(UserError, match=rf"cat is of the format AEDAT {version}"):
        read_aedat2(path, "cat")


def test_recordings_are_in_the_order_of_their_numbers_however_they_are_parted(monkeypatch, tmp_path, folders, prepared):
    bird = find_cifar10_dvs(write_folders(tmp_path / "raw", per_class=12, count=10), DVS128)[2]
    assert [name for name, _ in bird.members] == [f"cifar10_bird_{i}.aedat" for i in range(12)]
    monkeypatch.setattr(prepare, "PART", 4)
    prepare.prepare(folders, tmp_path / "out", 10, 48, seed=0, workers=1)
    assert content(tmp_path / "out") == content(prepared)


@pytest.fixture(scope="module")
def n_mnist(tmp_path_factory) -> Path:
    return write_n_mnist(tmp_path_factory.mktemp("raw") / "n_mnist")


def test_a_bin_file_is_read_as_written_and_a_mark_of_overflowing_time_is_no_event(tmp_path):
    events = atis_events(3)
    (tmp_path / "x.bin").write_bytes(atis_bytes(events))
    read = read_atis(tmp_path / "x.bin", "x")
    assert all(np.array_equal(read[key], values) for key, values in events.items())
    whole = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(whole[:500] + bytes([0, 240, 0, 0, 0]) + whole[500:])
    read = read_atis(tmp_path / "x.bin", "x")
    assert np.array_equal(read["x"], events["x"])
    assert np.array_equal(read["t"] - events["t"], np.where(np.arange(len(read["t"])) < 100, 0, 2**13))


def test_n_mnist_keeps_its_published_split_alike_from_folders_and_archives(tmp_path, n_mnist):
    for split in ("Train", "Test"):
        shutil.make_archive(str(tmp_path / "zip" / split), "zip", n_mnist, split)
    for name, archives, workers in (("a", n_mnist, 1), ("b", tmp_path / "zip", 2)):
        prepare.prepare(archives, tmp_path / name, 4, workers=workers, dataset="N_MNIST")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    train, test = load_event_dataset("N_MNIST", tmp_path / "a", 4)
    assert (len(train), len(test)) == (20, 10)
    first = read_atis(n_mnist / "Test" / "0" / "00001.bin", "x")
    assert torch.equal(test[0][0], torch.from_numpy(integrate_events(first, 4, 34, 34, "x")).float())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "00001.bin is truncated"),
        (lambda path: path.write_bytes(b""), "00001.bin is truncated or no recording (it is empty)"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "00001.bin"),
        (lambda path: shutil.rmtree(path.parent), "Test holds no recordings (.bin) in 7/"),
        (lambda path: shutil.rmtree(path.parents[1]), "lacks Test.zip"),
    ],
    ids=["truncated", "empty", "noise", "without a class", "without a split"],
)
def test_damaged_n_mnist_is_named(capsys, monkeypatch, tmp_path, n_mnist, damage, words):
    own = shutil.copytree(n_mnist, tmp_path / "own")
    damage(own / "Test" / "7" / "00001.bin")
    assert words in refused(capsys, monkeypatch, own, tmp_path / "out", "--dataset", "N_MNIST", "--workers", "1")


def test_an_aedat3_file_is_read_as_spikingjelly_does(tmp_path):
    from spikingjelly.datasets import load_aedat_v3

    path = tmp_path / "x.aedat"
    path.write_bytes(aedat3_bytes(events_of_class(4)))
    ours, theirs = read_aedat3(path, "x"), load_aedat_v3(str(path))
    assert all(np.array_equal(ours[key], theirs[key]) for key in "txyp")
    assert np.array_equal(ours["x"], events_of_class(4)["x"])
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="x is truncated or corrupt"):
        read_aedat3(path, "x")


def test_gestures_are_the_trials_of_the_tables_in_the_published_split(tmp_path):
    raw = write_gesture(tmp_path / "raw")
    prepare.prepare(raw, tmp_path / "out", 4, dataset="DVS128_GESTURE")
    train, test = load_event_dataset("DVS128_GESTURE", tmp_path / "out", 4, augment=False)
    assert [label for _, label in (train[i] for i in range(3))] == [0, 10, 3]
    events = events_of_class(1)
    inside = (events["t"] >= 550_000) & (events["t"] < 900_000)
    assert train[2][0].sum() == inside.sum()
    assert (len(test), test[0][0].shape, train.classes[10]) == (3, (4, 2, 128, 128), "other")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda place: (place / "user01_led_labels.csv").unlink(), "lacks user01_led_labels.csv"),
        (lambda place: (place / "user01_led_labels.csv").write_text("class\n12,0,5\n"), "'12,0,5'"),
        (lambda place: (place / "trials_to_test.txt").unlink(), "lacks trials_to_test.txt"),
        (lambda place: (place / "user24_led.aedat").write_bytes(HEADER), "no header of AEDAT 3"),
        (lambda place: (place / "user24_led.aedat").unlink(), "lacks user24_led.aedat"),
    ],
    ids=["without table", "class 12", "without split", "AEDAT 2", "without session"],
)
def test_damaged_gestures_are_named(capsys, monkeypatch, tmp_path, damage, words):
    raw = write_gesture(tmp_path / "raw")
    damage(raw / "DvsGesture")
    flags = ("--dataset", "DVS128_GESTURE", "--workers", "1")
    assert words in refused(capsys, monkeypatch, raw, tmp_path / "out", *flags)


def test_n_caltech101_names_its_classes_by_its_folders(tmp_path):
    prepare.prepare(write_n_caltech101(tmp_path / "raw"), tmp_path / "out", 4, dataset="N_CALTECH101")
    train, test = load_event_dataset("N_CALTECH101", tmp_path / "out", 4)
    assert (list(train.classes), len(train), len(test)) == (["BACKGROUND_Google", "accordion"], 4, 2)
    assert test[0][0].shape == (4, 2, 48, 48)
    assert "holds frames of N-Caltech101, not of N-MNIST" in error_of("N_MNIST", tmp_path / "out", 4)


# What SpikingJelly caches


def test_frames_of_spikingjelly_are_read_as_they_are(tmp_path):
    write_npz(tmp_path)
    train, test = load_event_dataset("FRAMES", tmp_path, 4, augment=False)
    assert (train.classes, len(train), len(test)) == (["0", "2", "10"], 6, 6)
    expected = np.load(tmp_path / "test" / "10" / "1.npz")["frames"]
    assert np.array_equal(test[5][0].numpy(), expected)
    assert test[5][1] == 2


def other_size(path: Path) -> None:
    np.savez(path, frames=np.ones((4, 2, 8, 8), np.float32))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: shutil.rmtree(path.parents[2] / "test"), "lacks test/"),
        (lambda path: shutil.rmtree(path.parents[1] / "10"), "the class 10 is in one of train/ and test/ alone"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "0.npz is truncated or corrupt"),
        (lambda path: np.savez(path, t=np.ones(3)), "0.npz holds events"),
        (lambda path: np.savez_compressed(path, frames=np.zeros((4, 2, 999, 999))), "size does not fit"),
        (lambda path: np.savez(path, frames=np.array([None])), "0.npz is truncated or corrupt"),
        (other_size, "8x8"),
        (lambda path: [file.unlink() for file in path.parent.glob("*")], "holds no .npz file"),
    ],
    ids=["split", "class", "truncated", "events", "bomb", "objects", "sizes", "empty class"],
)
def test_a_bad_folder_of_frames_is_one_line(tmp_path, damage, words):
    damage(write_npz(tmp_path) / "train" / "0" / "0.npz")
    assert words in error_of("FRAMES", tmp_path, 4)


def test_frames_of_another_number_name_both(tmp_path):
    write_npz(tmp_path)
    assert "--T 5 asked for" in error_of("FRAMES", tmp_path, 5)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("a.aedat4", "AEDAT 4"),
        ("x.h5", "HDF5"),
        ("train/0/a.npz", "--dataset FRAMES"),
        ("cat/a.aedat", "experiment/dvs/prepare.py"),
        ("Train.zip", "experiment/dvs/prepare.py"),
    ],
)
def test_recordings_in_another_form_are_named_with_what_takes_them(tmp_path, file, words):
    for path in (tmp_path / file, tmp_path / "test" / "0" / "b.npz" if "train" in file else tmp_path / file):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    message = error_of("N_MNIST", tmp_path)
    assert words in message
    assert Path(file).name in message or "b.npz" in message


def truncated(content: bytes) -> bytes:
    return content[:-3]


def odd(content: bytes) -> bytes:
    return content[:-4]


def empty(content: bytes) -> bytes:
    return b""


def without_events(content: bytes) -> bytes:
    return HEADER


def too_few(content: bytes) -> bytes:
    return content[: len(HEADER) + 9 * 8]


def noise(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(4000)


def noise_after_header(content: bytes) -> bytes:
    return HEADER + bytes(4) + np.random.default_rng(0).bytes(3996)


DAMAGES = [truncated, odd, empty, without_events, too_few, noise, noise_after_header]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_recording_is_named_and_can_be_mended(capsys, monkeypatch, tmp_path, own_folders, damage):
    path = own_folders / "frog" / "cifar10_frog_7.aedat"
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert str(path) in refused(capsys, monkeypatch, own_folders, tmp_path / "out", "--workers", "1")
    path.write_bytes(intact)
    prepare.prepare(own_folders, tmp_path / "out", 10, 48, 0, workers=1)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_a_damaged_recording_in_an_archive_ends_the_script_with_its_name(capfd, monkeypatch, tmp_path, own_folders):
    path = own_folders / "frog" / "cifar10_frog_7.aedat"
    path.write_bytes(path.read_bytes()[:-3])
    archives = write_archives(tmp_path / "zip", own_folders)
    error = refused(capfd, monkeypatch, archives, tmp_path / "out", "--workers", "2")
    assert "frog.zip: frog/cifar10_frog_7.aedat is truncated or corrupt" in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {prepare.UNFINISHED}


def test_a_damaged_archive_is_named(capsys, monkeypatch, tmp_path, archives):
    own = shutil.copytree(archives, tmp_path / "own")
    intact = (own / "ship.zip").read_bytes()
    middle = intact.index(b"cifar10_ship_0.aedat") + 200
    for damaged in (intact[: len(intact) // 2], b"", intact[:middle] + bytes(20) + intact[middle + 20 :]):
        (own / "ship.zip").write_bytes(damaged)
        assert f"{own}/ship.zip" in refused(capsys, monkeypatch, own, tmp_path / "out", "--workers", "1")


def test_missing_archives_are_named_with_their_source(capsys, monkeypatch, tmp_path, own_folders):
    shutil.rmtree(own_folders / "deer")
    shutil.rmtree(own_folders / "truck")
    error = refused(capsys, monkeypatch, own_folders, tmp_path / "out")
    assert "deer.zip (https://ndownloader.figshare.com/" in error
    assert "truck.zip (" in error
    assert "cat.zip" not in error
    assert "figshare" in error
    assert "nowhere" in refused(capsys, monkeypatch, tmp_path / "nowhere", tmp_path / "out")


def test_wrong_labels_are_named(capsys, monkeypatch, tmp_path, own_folders):
    (own_folders / "cat" / "cifar10_cat_3.aedat").rename(own_folders / "dog" / "cifar10_cat_3.aedat")
    error = refused(capsys, monkeypatch, own_folders, tmp_path / "out")
    assert "dog: cifar10_cat_3.aedat is a recording of cat" in error


def test_a_class_without_recordings_is_named(capsys, monkeypatch, tmp_path, own_folders):
    shutil.rmtree(own_folders / "horse")
    (own_folders / "horse").mkdir()
    assert "horse holds 0 recordings" in refused(capsys, monkeypatch, own_folders, tmp_path / "out")


@pytest.mark.parametrize("flags", [["--frames", "0"], ["--size", "x"], ["--workers", "-1"], ["--nonsense", "1"]])
def test_a_wrong_flag_is_one_line(capsys, monkeypatch, tmp_path, folders, flags):
    assert flags[0] in refused(capsys, monkeypatch, folders, tmp_path / "out", *flags)


def test_an_archive_writes_nothing_outside(tmp_path, archives):
    own = shutil.copytree(archives, tmp_path / "deep" / "own")
    with zipfile.ZipFile(own / "bird.zip", "a") as archive:
        archive.writestr("../../../cifar10_bird_outside.aedat", aedat_bytes(events_of_class(2, 10)))
        archive.writestr("__MACOSX/bird/._cifar10_bird_1.aedat", b"not a recording")
    prepare.prepare(own, tmp_path / "out", 10, 48, 0, workers=1)
    assert not list(tmp_path.parent.rglob("*outside.aedat"))
    shape = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]["train"]["shape"]
    assert shape[0] == 91  # the eleventh is a recording like any other


# Layouts that are refused


def test_a_wrong_directory_gets_told_what_was_looked_for(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", None):
        error = error_of("CIFAR10_DVS_Aug", path)
        assert "train/0.pt" in error
        assert "manifest.json" in error
        assert "prepare.py" in error
    assert "unknown data set 'CIFAR'" in error_of("CIFAR", tmp_path)


def test_another_number_of_frames_names_both(tmp_path, prepared):
    random_layout_a(tmp_path)
    for path in (tmp_path, prepared):
        error = error_of("CIFAR10_DVS_Aug", path, time_steps=8)
        assert "--T 8 asked for" in error
        assert "has 10 frames" in error


class _Evil:
    def __reduce__(self):
        return (Path("evil").touch, ())


FRAMES = torch.ones(10, 2, 48, 48)
BAD_PAIRS = {
    "no pair": FRAMES,
    "three": (FRAMES, 1, 2),
    "no tensor": ([1, 2], 1),
    "one channel": (FRAMES[:, :1], 1),
    "three dimensions": (FRAMES[0], 1),
    "no pixels": (FRAMES[..., :0], 1),
    "no frames": (FRAMES[:0], 1),
    "label 10": (FRAMES, 10),
    "label -1": (FRAMES, torch.tensor(-1)),
    "label 1.5": (FRAMES, 1.5),
    "two labels": (FRAMES, torch.tensor([1, 2])),
    "label as text": (FRAMES, "cat"),
    "NaN": (FRAMES * torch.nan, 1),
    "infinite": (FRAMES * torch.inf, 1),
    "negative": (-FRAMES, 1),
    "11 frames": (FRAMES[[*range(10), 0]], 1),
    "code": (_Evil(), 1),
    "numpy": (FRAMES.numpy(), 1),
}


@pytest.mark.parametrize("pair", BAD_PAIRS.values(), ids=BAD_PAIRS)
@pytest.mark.parametrize("file", ["test/0.pt", "train/2.pt"])
def test_a_bad_pair_is_named(tmp_path, monkeypatch, pair, file):
    monkeypatch.chdir(tmp_path)
    write_layout_a(tmp_path, {"train": [(FRAMES, 1)] * 3, "test": [(FRAMES, 1)]})
    torch.save(pair, tmp_path / file)
    with pytest.raises(UserError, match=file) as caught:
        load_event_dataset("CIFAR10_DVS_Aug", tmp_path, 10)[0][2]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("damage", [lambda c: c[:-100], lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"x" * 99])
def test_a_damaged_pt_file_is_named(tmp_path, damage):
    write_layout_a(tmp_path, {"train": [(FRAMES, 1)], "test": [(FRAMES, 1)]})
    path = tmp_path / "test" / "0.pt"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in error_of("CIFAR10_DVS_Aug", tmp_path)


def test_gaps_and_empty_splits_are_named(tmp_path):
    write_layout_a(tmp_path, {"train": [(FRAMES, 1)] * 3, "test": []})
    assert "test/0.pt is missing" in error_of("CIFAR10_DVS_Aug", tmp_path)
    (tmp_path / "train" / "1.pt").unlink()
    assert "train/1.pt is missing" in error_of("CIFAR10_DVS_Aug", tmp_path)


def test_a_small_file_of_much_memory_is_refused(tmp_path):
    frames = torch.ones(1).expand(10, 2, 48, 48)
    write_layout_a(tmp_path, {"train": [(frames, 1)], "test": [(FRAMES, 1)]})
    path = tmp_path / "train" / "0.pt"
    assert "0.pt holds frames that share their memory" in error_of("CIFAR10_DVS_Aug", tmp_path)
    with zipfile.ZipFile(tmp_path / "test" / "0.pt") as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name in stored.namelist():
            z.writestr(name, stored.read(name))
    assert f"{path} is a compressed archive" in error_of("CIFAR10_DVS_Aug", tmp_path)
    path.unlink()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in error_of("CIFAR10_DVS_Aug", tmp_path)


def test_a_recording_of_much_memory_or_none_is_refused(capsys, monkeypatch, tmp_path, own_folders):
    archives = write_archives(tmp_path / "zip", own_folders)
    with zipfile.ZipFile(archives / "cat.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/cifar10_cat_99.aedat", HEADER + bytes(1_000_000))
    error = refused(capsys, monkeypatch, archives, tmp_path / "out")
    assert "cat.zip: cat/cifar10_cat_99.aedat expands more than 50-fold" in error
    os.mkfifo(own_folders / "cat" / "cifar10_cat_99.aedat")
    assert len(find_cifar10_dvs(own_folders, DVS128)[3].members) == 10


def test_numpy_is_left_as_it_is_for_an_older_spikingjelly(monkeypatch):
    monkeypatch.setattr(spikingjelly_cifar10_dvs(), "np", np)
    monkeypatch.delattr(np, "bool", raising=False)  # as NumPy 1.24 to 1.26
    for_spikingjelly = spikingjelly_cifar10_dvs.__wrapped__().np
    assert for_spikingjelly.bool is np.bool_
    assert for_spikingjelly.zeros is np.zeros
    assert "bool" not in vars(np)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_cache_has_the_mode_that_the_users_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        made = digits_dvs._made_once(tmp_path / "cache", lambda folder: None)
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("label", [0, np.int32(3), torch.tensor(3), torch.tensor([3]), torch.tensor(3.0)])
def test_labels_as_published_code_writes_them_are_taken(tmp_path, label):
    label = int(label) if isinstance(label, np.integer) else label
    write_layout_a(tmp_path, {"train": [(FRAMES, label)], "test": [(FRAMES.to(torch.uint8), label)]})
    for split in load_event_dataset("CIFAR10_DVS_Aug", tmp_path, 10):
        frames, read = split[0]
        assert (frames.dtype, type(read), read) == (torch.float32, int, int(label))


@pytest.mark.parametrize("name", ["train_frames.npy", "test_labels.npy", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda c: c[:-100], lambda c: b"", lambda c: c + b"x"])
def test_a_damaged_prepared_file_is_named(own_prepared, name, damage):
    path = own_prepared / name
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in error_of("CIFAR10_DVS_Aug", own_prepared)
    path.unlink()
    assert name in error_of("CIFAR10_DVS_Aug", own_prepared)


def rewrite(path: Path, change) -> None:
    """Changes an array in place, its size and so the manifest's word for it untouched."""
    array = np.load(path)
    change(array)
    np.save(path, array)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_prepared_values_that_are_no_counts_are_named(own_counts, value, monkeypatch):
    monkeypatch.setattr(event_data, "check_content", lambda folder: None)
    rewrite(own_counts / "test_frames.npy", lambda array: array[3, 9, 1].fill(value))
    _, test = load_event_dataset("CIFAR10_DVS_Aug", own_counts, 10, frames="counts")
    with pytest.raises(UserError, match=r"test_frames.npy \(recording 3\)"):
        test[3]


def flipped(path: Path) -> None:
    """One bit of the last recording, its size and so the manifest's word for it untouched."""
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("known", [False, True])
def test_a_flipped_bit_in_prepared_frames_is_noticed(own_prepared, known):
    if known:
        load_event_dataset("CIFAR10_DVS_Aug", own_prepared, 10)
    flipped(own_prepared / "train_frames.npy")
    assert "train_frames.npy is not what was written" in error_of("CIFAR10_DVS_Aug", own_prepared)


def test_prepared_frames_are_read_through_once_until_they_change(own_prepared, monkeypatch):
    load_event_dataset("CIFAR10_DVS_Aug", own_prepared, 10)
    before = content(own_prepared)
    read = []
    monkeypatch.setattr(checksums, "file_digest", lambda path: read.append(path.name))
    load_event_dataset("CIFAR10_DVS_Aug", own_prepared, 10)
    assert (read, content(own_prepared)) == ([], before)
    os.utime(own_prepared / "train_frames.npy")
    error_of("CIFAR10_DVS_Aug", own_prepared)
    assert read


@pytest.mark.parametrize("value", [10, -1])
def test_prepared_labels_out_of_range_are_named(own_prepared, value):
    rewrite(own_prepared / "train_labels.npy", lambda array: array[5:6].fill(value))
    error = error_of("CIFAR10_DVS_Aug", own_prepared)
    assert f"train_labels.npy has the label {value}" in error


def test_a_pickled_array_is_not_loaded(own_prepared):
    path = own_prepared / "train_labels.npy"
    np.save(path, np.array([_Evil()] * 3, dtype=object))
    manifest = json.loads((own_prepared / "manifest.json").read_text())
    manifest["files"]["train_labels.npy"]["bytes"] = path.stat().st_size
    (own_prepared / "manifest.json").write_text(json.dumps(manifest))
    assert str(path) in error_of("CIFAR10_DVS_Aug", own_prepared)


def test_a_deeply_nested_manifest_is_named(own_prepared):
    (own_prepared / "manifest.json").write_text("[" * 100_000)
    assert "manifest.json is no manifest" in error_of("CIFAR10_DVS_Aug", own_prepared)


@pytest.mark.parametrize("change", [{"version": 2}, {"format": "x"}, {"splits": {}}, {"files": []}])
def test_a_manifest_of_another_kind_is_named(own_prepared, change):
    path = own_prepared / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert str(path) in error_of("CIFAR10_DVS_Aug", own_prepared)


def test_prepared_frames_are_read_lazily_also_by_workers(prepared):
    _, test = load_event_dataset("CIFAR10_DVS_Aug", prepared, 10)
    assert isinstance(test.recordings.frames, np.memmap)
    assert len(pickle.dumps(test)) < 10_000
    for (frames, _), (read, _) in zip(DataLoader(test, None, num_workers=1), test, strict=False):
        assert torch.equal(frames, read)


def test_prepared_frames_of_another_kind_are_refused_by_both_names(capsys, monkeypatch, tmp_path, folders, prepared):
    with pytest.raises(UserError, match=r"--frames counts asked for, but .* was prepared as published"):
        load_event_dataset("CIFAR10_DVS_Aug", prepared, 10, frames="counts")
    before = content(prepared)
    with pytest.raises(UserError, match=r"--frame_kind counts asked for, but .* holds published"):
        prepare.prepare(folders, prepared, 10, 48, 0, 1, frame_kind="counts")
    assert content(prepared) == before
    prepare.prepare(folders, tmp_path / "out", 10, 48, 0, 1, frame_kind="counts")
    with pytest.raises(UserError, match="was prepared as counts: use --frames counts"):
        load_event_dataset("CIFAR10_DVS_Aug", tmp_path / "out", 10, frames="published")
    assert load_event_dataset("CIFAR10_DVS_Aug", tmp_path / "out", 10)[0].kind == "counts"
    with pytest.raises(UserError, match="unknown kind of frames 'both': choose one of published, counts"):
        load_event_dataset("CIFAR10_DVS_Aug", prepared, 10, frames="both")
    flags = ("--size", "20", "--frame_kind", "published")
    assert "--size 20" in refused(capsys, monkeypatch, folders, tmp_path / "small", *flags)


@pytest.fixture
def own_counts(tmp_path, folders) -> Path:
    prepare.prepare(folders, tmp_path / "counts", 10, 48, 0, 1, frame_kind="counts")
    return tmp_path / "counts"


def test_frames_prepared_before_there_were_kinds_are_counts(own_counts):
    path = own_counts / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["frame_kind"]
    path.write_text(json.dumps(manifest))
    assert load_event_dataset("CIFAR10_DVS_Aug", own_counts, 10)[0].kind == "counts"


@pytest.mark.parametrize(("name", "kind"), [("CIFAR10_DVS_Aug", "published"), ("DIGITS_DVS", "counts")])
def test_the_kind_of_frames_is_the_data_sets_own_unless_given(tmp_path, digits_path, name, kind):
    path = digits_path if name == "DIGITS_DVS" else random_layout_a(tmp_path, size=48)
    default, named = (load_event_dataset(name, path, 10, False, *frames)[1][0][0] for frames in ((), (kind,)))
    assert torch.equal(default, named)
    counts, published = (load_event_dataset(name, path, 10, False, kind)[1][0][0] for kind in ("counts", "published"))
    assert torch.equal(published, published_frames(counts, 48))
    assert not torch.equal(published, counts)


# Augmentation


def test_augmentation_moves_all_frames_of_a_recording_alike():
    frames = torch.rand(1, 1, 48, 48).expand(10, 2, 48, 48)
    torch.manual_seed(0)
    augment = FlipAndRoll(flip=True, roll=5)
    assert all((moved == moved[:1, :1]).all() for moved in (augment(frames) for _ in range(50)))


@pytest.mark.parametrize("name", DATASETS)
def test_augmentation_flips_and_rolls_as_far_as_the_data_set_says(name):
    spec = DATASETS[name]
    augment = FlipAndRoll(spec.flip, spec.roll)
    frames = torch.zeros(2, 2, 48, 48)
    frames[..., 20, 10:12] = torch.tensor([1.0, 2.0])  # lighter on the left
    torch.manual_seed(0)
    seen = set()
    for _ in range(3000):
        y, x = divmod(int(augment(frames)[0, 0].argmax()), 48)
        flipped = x > 24
        seen.add((flipped, y - 20, x - (47 - 11 if flipped else 11)))
    shifts = range(-spec.roll, spec.roll + 1)
    flips = (False, True) if spec.flip else (False,)
    assert seen == {(flipped, y, x) for flipped in flips for y in shifts for x in shifts}


def test_augmentation_draws_from_torch_alone_and_spares_the_test_split(prepared):
    train, test = load_event_dataset("CIFAR10_DVS_Aug", prepared, 10)
    plain, _ = load_event_dataset("CIFAR10_DVS_Aug", prepared, 10, augment=False)
    torch.manual_seed(1)
    first = [train[0][0] for _ in range(4)]
    torch.manual_seed(1)
    assert all(torch.equal(train[0][0], frames) for frames in first)
    assert not all(torch.equal(first[0], frames) for frames in first[1:])
    state = torch.get_rng_state()
    assert torch.equal(test[0][0], test[0][0])
    assert torch.equal(plain[0][0], plain[0][0])
    assert torch.equal(torch.get_rng_state(), state)


# The simulated camera


def one_pixel_at_a_time(digit: np.ndarray) -> list[tuple[int, int, int]]:
    """(y, x, polarity) of the events in the order of pixels, then of time, from the definition alone."""
    intensity = np.stack([log_intensity(digit[None], step)[0] for step in range(digits_dvs.STEPS + 1)])
    events = []
    for y, x in np.ndindex(SENSOR, SENSOR):
        threshold = thresholds()[y, x]
        last_event = intensity[0, y, x]
        for value in intensity[1:, y, x]:
            while abs(value - last_event) >= threshold:
                up = value > last_event
                last_event += threshold if up else -threshold
                events.append((y, x, int(up)))
    return events


def test_a_pixel_fires_where_its_log_intensity_has_changed_by_the_threshold_since_its_last_event():
    digit = load_digits().images[5] / 16
    (events,) = record(digit[None])
    by_pixel = events[np.lexsort((events["t"], events["x"], events["y"]))]
    assert [(int(e["y"]), int(e["x"]), int(e["p"])) for e in by_pixel] == one_pixel_at_a_time(digit)
    assert (np.diff(events["t"].astype(int)) >= 0).all()
    # At the time of an event the intensity has come as far as the events so far say.
    level = log_intensity(digit[None], 0)[0].copy()
    for event in events:
        y, x = event["y"], event["x"]
        level[y, x] += thresholds()[y, x] * (1 if event["p"] else -1)
        step, rest = divmod(event["t"] / 300_000 * digits_dvs.STEPS, 1)
        ends = (log_intensity(digit[None], min(int(step) + i, digits_dvs.STEPS))[0, y, x] for i in (0, 1))
        before, after = ends
        assert level[y, x] == pytest.approx(before + rest * (after - before), abs=0.01 * THRESHOLD)
        if event["t"] > 20_000:  # enough of them
            break


def test_a_still_or_blank_scene_gives_no_events(monkeypatch):
    assert not len(record(np.zeros((1, 8, 8)))[0])
    monkeypatch.setattr(digits_dvs, "CORNERS", np.zeros((4, 2)))
    assert not len(record(load_digits().images[:1] / 16)[0])


def test_digits_have_the_split_and_labels_of_the_images_and_the_counts_of_their_events(digits_path):
    labels = load_digits().target[:DIGITS]
    parts = train_test_split(np.arange(len(labels)), stratify=labels, test_size=0.2, random_state=0)
    events = read_events(digits_path / f"DIGITS_DVS_v{digits_dvs.VERSION}" / "events")
    for split, members in zip(load_event_dataset("DIGITS_DVS", digits_path, 10, augment=False), parts, strict=True):
        assert split.recordings.labels.tolist() == labels[members].tolist()
        for i in (0, 30, 59):
            frames, label = split[i]
            recording = events[members[i]]
            assert label == labels[members[i]]
            assert frames.shape == (10, 2, 48, 48)
            assert frames.sum() == len(recording)
            assert frames[:, 1].sum() == recording["p"].sum()


def test_digits_are_deterministic_and_cached(digits_path):
    before = content(digits_path)
    times = {path: path.stat().st_mtime_ns for path in digits_path.rglob("*")}
    load_event_dataset("DIGITS_DVS", digits_path, 10)
    assert {path: path.stat().st_mtime_ns for path in digits_path.rglob("*")} == times
    digits = load_digits().images[64:96] / 16
    again = np.concatenate(record(digits))
    events = read_events(digits_path / f"DIGITS_DVS_v{digits_dvs.VERSION}" / "events")
    assert again.tobytes() == np.concatenate(events[64:96]).tobytes()
    for folder in digits_path.rglob("frames_T10"):
        shutil.rmtree(folder)
    load_event_dataset("DIGITS_DVS", digits_path, 10)
    assert content(digits_path) == before


def test_the_cache_is_not_made_where_a_checkpoint_alone_says(tmp_path):
    with pytest.raises(UserError, match=r"run/last.pth says that its data are in .*name their --data_path"):
        only_reading(load_event_dataset, Path("run/last.pth"))("DIGITS_DVS", tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("time_steps", [1, 4])
def test_digits_come_in_any_number_of_frames(digits_path, time_steps):
    train, test = load_event_dataset("DIGITS_DVS", digits_path, time_steps)
    assert (len(train), len(test)) == (0.8 * DIGITS, 0.2 * DIGITS)
    assert test[0][0].shape == (time_steps, 2, 48, 48)
    shutil.rmtree(next(digits_path.rglob(f"frames_T{time_steps}")))


def test_processes_that_make_the_cache_at_once_agree(tmp_path):
    both_write = threading.Barrier(2)

    def write(folder: Path) -> None:
        (folder / "frames").write_text("the same")
        both_write.wait(timeout=10)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: digits_dvs._made_once(tmp_path / "cache", write), range(2)))
    assert made == [tmp_path / "cache"] * 2
    assert content(tmp_path) == {"cache/frames": b"the same"}


def test_a_failed_cache_leaves_nothing_and_a_later_one_wins(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        digits_dvs._made_once(tmp_path / "cache", fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--data_path"):
        load_event_dataset("DIGITS_DVS", tmp_path / "file", 10)


@pytest.mark.parametrize(("age_s", "kept"), [(3600, True), (25 * 3600, False)])
def test_what_a_killed_making_left_is_swept_when_it_is_a_day_old(digits_path, age_s, kept):
    left = digits_path / f"DIGITS_DVS_v{digits_dvs.VERSION}" / ".frames_T10-0123"
    left.mkdir()
    (left / "train_frames.npy").write_bytes(b"half")
    os.utime(left, (time.time() - age_s,) * 2)
    load_event_dataset("DIGITS_DVS", digits_path, 10)
    assert left.exists() == kept
    shutil.rmtree(left, ignore_errors=True)


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert event_data.cache_root() == tmp_path / "rate_based_backpropagation"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert event_data.cache_root() == tmp_path / ".cache" / "rate_based_backpropagation"


def test_classes_and_sensor_are_those_of_the_published_archives():
    published = spikingjelly_cifar10_dvs().CIFAR10DVS
    archives = [archive for archive, *_ in published.resource_url_md5()]
    assert tuple(sorted(archive.removesuffix(".zip") for archive in archives)) == CIFAR10_DVS_CLASSES == CLASSES
    assert published.get_H_W() == (DVS128.height, DVS128.width)


@pytest.mark.parametrize(
    "damage",
    [
        lambda frames: (frames.to_sparse(), torch.tensor(1)),
        lambda frames: (frames.to("meta"), torch.tensor(1)),
        lambda frames: (torch.quantize_per_tensor(frames, 0.1, 0, torch.quint8), torch.tensor(1)),
        lambda frames: (frames, torch.empty((), device="meta")),
    ],
    ids=["sparse", "without values", "quantized", "label without value"],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, damage):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        torch.save(damage(torch.ones(10, 2, 48, 48)), tmp_path / split / "0.pt")
    assert str(tmp_path / "train" / "0.pt") in error_of("CIFAR10_DVS_Aug", tmp_path)


def test_frames_that_find_no_room_are_an_error_that_names_the_file(tmp_path):
    """A full disk, here a limit on the size of files, must not end the process by a signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"train_frames\.npy"):
            write_split(tmp_path, "train", [np.ones((2, 2, 48, 48))] * 4, [0] * 4, (2, 2, 48, 48))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
