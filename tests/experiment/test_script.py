"""The training script as a user runs it: what it leaves behind, what it says, how it continues and how it learns."""

import io
import itertools
import json
import os
import re
import runpy
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import neuron
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util import tensor_util

from model import MODELS
from tests.cifar_format import write_cifar10, write_cifar100, write_mnist
from tests.experiment.script_helpers import (
    CIFAR,
    METRICS,
    PAIRS,
    check_continued,
    firing_rates,
    history,
    image_options,
    load,
    metrics,
    only_run,
    pair_flags,
    run_here,
    same,
    scalars,
    snapshot,
    start,
    tiny_networks,
    unmeasured,
)
from tests.processes import finish
from util.train import checkpoint
from util.train.options import OF_THIS_START
from util.train.run_log import RunLog, new_run_directory

pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
BATCHES = ["--train_batch_size", "10", "--val_batch_size", "10", "--num_workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """CIFAR-10 (20 + 4 images), CIFAR-100 (20 + 10) and MNIST (20 + 10) in the published formats."""
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root, images_per_batch=4)
    write_cifar100(root, train_images=20, test_images=10)
    write_mnist(root, train_images=20, test_images=10)
    return root


def cifar10(data: Path, *more: str) -> list[str]:
    return ["--dataset", "CIFAR10", "--data_path", str(data), *BATCHES, *more]


# The four gradients


@pytest.fixture(scope="module")
def four_runs(data, tmp_path_factory) -> dict[tuple[str, str], tuple[Path, str, str]]:
    """(method, step mode) -> run directory, stdout and stderr of two epochs of resnet18 on a CIFAR-10 directory.

    The last one in a process of its own, started from elsewhere.
    """
    cwd = tmp_path_factory.mktemp("elsewhere")
    flags = ["--arch", "resnet18", "--T", "2", "--image_size", "8", "--num_epoch", "2"]
    runs = {}
    for pair in PAIRS:
        name = "-".join(pair)
        command = cifar10(data, *flags, *pair_flags(*pair))
        if pair == PAIRS[-1]:
            status, out, err = finish(start(*command, "--log_path", name, cwd=cwd))
        else:
            with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
                status = run_here(*command, "--log_path", cwd / name)
            out, err = stdout.getvalue(), stderr.getvalue()
        assert status == 0, err
        runs[pair] = (only_run(cwd / name), out, err)
    return runs


@pairs
def test_a_run_leaves_its_files(four_runs, pair):
    directory, _, _ = four_runs[pair]
    files = sorted(path.name for path in directory.iterdir())
    assert files == sorted(
        ["config.json", "train.log", "metrics.jsonl", "model_weights.pth", "last.pth", "train", "test"]
    )
    for curve in ("train", "test"):
        assert [path.name.startswith("events.out.tfevents") for path in (directory / curve).iterdir()] == [True]
    for word in ("CIFAR10", "resnet18", *pair, "T2", "seed0"):
        assert word in directory.name


@pairs
def test_metrics_are_one_object_an_epoch(four_runs, pair):
    rows = metrics(four_runs[pair][0])
    assert [list(row) for row in rows] == [METRICS] * 2
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([0.1, 0.05])
    for row in rows:
        assert row["train_acc"] in [100 * k / 20 for k in range(21)]  # percent, of 20 images
        assert row["val_acc"] in [100 * k / 4 for k in range(5)]
        assert 0 < row["train_loss"] < 20
        assert 0 < row["val_loss"] < 20
        assert 0 < row["seconds"] < 300
        assert 20 / row["seconds"] < row["images_per_second"] < 1e5
        assert 1e8 < row["peak_memory_bytes"] < 1e11


@pairs
def test_tensorboard_shows_the_metrics_and_the_firing_rate_of_every_layer(four_runs, pair):
    directory, _, _ = four_runs[pair]
    shown, rows = scalars(directory), metrics(directory)
    layers = [name for name, m in MODELS["resnet18"]().named_modules() if isinstance(m, neuron.BaseNode)]
    assert len(layers) == 17
    rates = {f"train/neurons/firing_rate/{name}" for name in layers}
    both = {f"{split}/{tag}" for tag in ("loss", "accuracy/top1", "accuracy/top5") for split in ("train", "test")}
    assert shown.keys() == {*rates, *both, "train/lr", "train/speed/images_per_second"}
    assert all([step for step, _ in points] == [1, 2] for points in shown.values())
    same_numbers = {"train/loss": "train_loss", "test/loss": "val_loss", "train/accuracy/top1": "train_acc",
                    "test/accuracy/top1": "val_acc", "train/lr": "lr",
                    "train/speed/images_per_second": "images_per_second"}  # fmt: skip
    for tag, name in same_numbers.items():
        assert [value for _, value in shown[tag]] == pytest.approx([row[name] for row in rows], rel=1e-6), tag
    for split in ("train", "test"):
        points = zip(shown[f"{split}/accuracy/top1"], shown[f"{split}/accuracy/top5"], strict=True)
        assert all(top1 <= top5 <= 100 for (_, top1), (_, top5) in points)
    assert all(0 <= value <= 1 for tag in rates for _, value in shown[tag])
    assert all(value > 0 for _, value in shown["train/neurons/firing_rate/features.2"])


@pairs
def test_the_firing_rates_stand_in_the_metrics_too(four_runs, pair):
    directory, _, _ = four_runs[pair]
    shown = scalars(directory)
    for epoch, rates in enumerate(firing_rates(directory)):
        assert len(rates) == 17
        for layer, rate in rates.items():
            assert rate == pytest.approx(shown[f"train/neurons/firing_rate/{layer}"][epoch][1], rel=1e-6)


def test_tensorboard_serves_train_and_test_in_one_chart_and_the_configuration_as_text(four_runs):
    """What its page asks for: runs and tags, of which a group is what stands before the first slash."""
    directory, _, _ = four_runs["rate", "m"]
    runs = EventMultiplexer().AddRunsFromDirectory(str(directory))
    runs.Reload()
    tags = runs.PluginRunToTagToContent("scalars")
    assert set(tags["test"]) == {"loss", "accuracy/top1", "accuracy/top5"} <= set(tags["train"])
    groups = sorted({tag.partition("/")[0] for tag in tags["train"]})
    assert groups == ["accuracy", "loss", "lr", "neurons", "speed"]
    (text,) = runs.Tensors("train", "configuration/text_summary")
    (markdown,) = tensor_util.make_ndarray(text.tensor_proto)
    assert "| T | `2` |" in markdown.decode()
    assert "--arch resnet18" in markdown.decode()


@pairs
def test_the_configuration_is_complete_and_resolved(four_runs, data, pair):
    directory, _, _ = four_runs[pair]
    config = json.loads((directory / "config.json").read_text())
    gpu = torch.cuda.is_available()
    expected = {
        "arch": "resnet18", "T": 2, "step_mode": pair[1], "method": pair[0], "rate_loss_scale": None,
        "windows": 1, "sltt_steps": None, "loss": "ce", "tet_weight": 0.05, "rate_penalty": 0.0,
        "distill": False, "distill_ce": 1.0, "distill_kl": 0.3,
        "neuron": "lif", "surrogate": "sigmoid", "alpha": 4.0, "decay": 0.2, "thresh": 1.0, "v_reset": None,
        "detach_reset": True, "num_epoch": 2, "train_batch_size": 10,
        "val_batch_size": 10, "optim": "SGD", "lr": 0.1, "momentum": 0.9, "early_stop": None, "val_split": 0.0,
        "wd": 5e-4, "scheduler": "cosine", "data_path": str(data),
        "num_workers": 0, "seed": 0, "dataset": "CIFAR10", "image_size": 8, "auto_aug": True, "cutout": True,
        "log_path": str(directory.parent), "device": "cuda" if gpu else "cpu", "save_every": 0,
        "grad_accum": 1, "sync_bn": False,
        "amp": "off", "compile": gpu and pair[0] == "rate", "channels_last": gpu, "tf32": gpu, "cuda_graph": gpu,
        "deterministic": False,
        "lr_warmup_epochs": 0, "label_smoothing": 0.0,
        "mixup_alpha": 0.0, "cutmix_alpha": 0.0, "clip_grad_norm": None, "model_ema": False, "model_ema_decay": 0.999,
        "weights": None,
    }  # fmt: skip
    assert config["options"] == expected
    assert expected.keys() == {f.name for f in fields(image_options())} - OF_THIS_START
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"torchvision", "spikingjelly", "numpy", "tensorboard"} <= config["versions"].keys()
    assert None not in config["versions"].values()
    assert config["command"][1:3] == ["--dataset", "CIFAR10"]
    assert re.fullmatch(r"[0-9a-f]{40}\+?", config["code"])
    open_ = {"sync_bn": None, "compile": None, "channels_last": None, "cuda_graph": None, "tf32": True}
    assert load(directory / "last.pth")["config"] == {**config["options"], **open_}  # another machine may continue it


@pairs
def test_stdout_ends_with_the_best_accuracy_and_where_things_are(four_runs, pair):
    directory, out, err = four_runs[pair]
    rows = metrics(directory)
    best = max(rows, key=lambda row: row["val_acc"])
    accuracy, weights, board = out.splitlines()[-3:]
    assert accuracy == f"best test accuracy {best['val_acc']:.2f} % in epoch {best['epoch']} of 2"
    assert weights.endswith(str(directory / "model_weights.pth"))
    assert board.endswith(f"tensorboard --logdir {directory}")
    for row in rows:
        (line,) = [line for line in out.splitlines() if line.startswith(f"epoch {row['epoch']}/2")]
        assert f"{row['train_acc']:.2f} %" in line
        assert f"{row['val_acc']:.2f} %" in line
    assert str(directory) in out
    assert err == ""


@pairs
def test_train_log_keeps_what_was_said(four_runs, pair):
    directory, out, _ = four_runs[pair]
    log = (directory / "train.log").read_text()
    said = out.splitlines()
    for line in said[next(i for i, line in enumerate(said) if line.startswith("resnet18")) :]:
        assert line in log
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", log)


@pairs
def test_checkpoints_are_of_the_best_and_of_the_last_epoch(four_runs, pair):
    directory, _, _ = four_runs[pair]
    rows = metrics(directory)
    last, best = load(directory / "last.pth"), load(directory / "model_weights.pth")
    assert history(last) == rows
    assert len(history(best)) == max(rows, key=lambda row: row["val_acc"])["epoch"]
    net = MODELS["resnet18"]()
    for content in (last, best):
        net.load_state_dict(content["model"])
    assert same(last["model"], best["model"]) == (len(history(best)) == 2)
    assert not list(directory.glob("*.tmp"))


def test_the_four_commands_train_four_ways(four_runs):
    """Multi-step BatchNorm pools the time steps, so step modes differ too."""
    weights = [load(directory / "last.pth")["model"] for directory, _, _ in four_runs.values()]
    assert not any(same(a, b) for a, b in itertools.combinations(weights, 2))


# Every network and every data set


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size"),
    [("resnet19", 8), ("vggsnn_cifar", 8), ("vggsnn_dvs", 48), ("vggsnn_small", 8), ("vgg11", 16), ("vgg13", 16),
     ("sew_resnet34", 32), ("preact_resnet34", 32), ("spikformer", 8), ("spikformer_small", 8)],
)  # fmt: skip
def test_every_network_trains(data, tmp_path, capfd, arch, size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    flags = ["--arch", arch, "--image_size", str(size), "--T", "1", "--num_epoch", "1", "--rate_flag"]
    try:
        assert run_here(*cifar10(data, *flags), "--train_batch_size", "20", "--log_path", tmp_path) == 0
    finally:
        torch.set_num_threads(threads)
    directory = only_run(tmp_path)
    assert len(metrics(directory)) == 1
    assert all(value.isfinite().all() for value in load(directory / "last.pth")["model"].values())


def test_the_table_above_lacks_no_network():
    (mark,) = [mark for mark in test_every_network_trains.pytestmark if mark.name == "parametrize"]
    assert {arch for arch, _ in mark.args[1]} | {"resnet18"} == set(MODELS)


@pytest.fixture
def small():
    """vgg11 is `tests.experiment.script_helpers.tiny`."""
    with tiny_networks("vgg11"):
        yield ["--arch", "vgg11"]


@pairs
@pytest.mark.parametrize(
    ("dataset", "classes", "channels"), [("CIFAR10", 10, 3), ("CIFAR100", 100, 3), ("MNIST", 10, 1)]
)
def test_every_data_set_trains(small, data, tmp_path, dataset, classes, channels, pair):
    flags = ["--dataset", dataset, "--data_path", data, *BATCHES, "--num_epoch", "1", "--T", "2", *pair_flags(*pair)]
    assert run_here(*small, *flags, "--log_path", tmp_path) == 0
    directory = only_run(tmp_path)
    weights = load(directory / "last.pth")["model"]
    assert weights["classifier.weight"].shape[0] == classes
    assert weights["features.0.weight"].shape[1] == channels
    assert json.loads((directory / "config.json").read_text())["options"]["image_size"] == 32


@pytest.mark.cover(0)
@pairs
def test_digits_are_learned(small, tmp_path, pair):
    """Real data: 9 of 10 unseen handwritten digits are told after two epochs of a network of two small layers."""
    flags = ["--num_epoch", "2", "--T", "2", "--train_batch_size", "32", "--lr", "0.2", *pair_flags(*pair)]
    assert run_here(*small, *flags, "--log_path", tmp_path) == 0
    rows = metrics(only_run(tmp_path))
    assert rows[-1]["val_acc"] > 90
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def test_a_run_repeats_to_the_last_bit_and_another_seed_does_not(small, data, tmp_path):
    for name, seed in (("first", "3"), ("again", "3"), ("other", "4")):
        flags = [*small, "--num_epoch", "1", "--T", "2", "--seed", seed, "--log_path", tmp_path / name]
        assert run_here(*cifar10(data), *flags) == 0
    first, again, other = (load(only_run(tmp_path / name) / "last.pth") for name in ("first", "again", "other"))
    assert same(first["model"], again["model"])
    assert unmeasured(history(first)) == unmeasured(history(again))
    assert not same(first["model"], other["model"])


def test_a_seed_drawn_at_random_is_stored(small, data, tmp_path, capfd):
    """The run can be made again with the seed that it names."""
    flags = [*small, "--num_epoch", "1", "--T", "2"]
    assert run_here(*cifar10(data), *flags, "--seed", "-1", "--log_path", tmp_path / "drawn") == 0
    directory = only_run(tmp_path / "drawn")
    seed = json.loads((directory / "config.json").read_text())["options"]["seed"]
    assert 0 <= seed < 2**32
    assert f"seed {seed}" in capfd.readouterr().out
    assert run_here(*cifar10(data), *flags, "--seed", str(seed), "--log_path", tmp_path / "named") == 0
    drawn, named = (load(only_run(tmp_path / name) / "last.pth") for name in ("drawn", "named"))
    assert same(drawn["model"], named["model"])


OFF = ["--no-auto_aug", "--no-cutout", "--no-detach_reset", "--no-rate_loss_scale"]


@pytest.mark.parametrize("flag", OFF)
def test_each_switch_changes_the_training(small, data, tmp_path, flag):
    base = [*cifar10(data), *small, "--num_epoch", "1", "--T", "3", "--wd", "0"]
    base += [] if flag == "--no-detach_reset" else ["--rate_flag"]
    for name, more in (("on", []), ("off", [flag])):
        assert run_here(*base, *more, "--log_path", tmp_path / name) == 0
    on, off = (load(only_run(tmp_path / name) / "last.pth")["model"] for name in ("on", "off"))
    assert not same(on, off)


OTHERS = [
    "--T 3", "--step_mode s", "--method bptt", "--windows 2", "--loss mse", "--rate_penalty 0.5", "--neuron plif",
    "--neuron if", "--surrogate atan", "--alpha 2", "--decay 0.5", "--thresh 0.5", "--v_reset 0", "--optim AdamW",
    "--lr 0.05", "--wd 5e-2", "--momentum 0", "--scheduler constant", "--grad_accum 2", "--train_batch_size 20",
    "--num_epoch 1", "--image_size 16", "--lr_warmup_epochs 1", "--label_smoothing 0.1", "--mixup_alpha 0.5",
    "--cutmix_alpha 0.5", "--model_ema", "--clip_grad_norm 0.01", "--weights {weights}",
]  # fmt: skip


@pytest.fixture(scope="module")
def without_flags(data, tmp_path_factory) -> Path:
    """Run directory of two epochs of the small network."""
    log_path = tmp_path_factory.mktemp("without")
    with tiny_networks("vgg11"):
        assert run_here(*two_epochs(data), "--log_path", log_path) == 0
    return only_run(log_path)


def two_epochs(data: Path) -> list[str]:
    return cifar10(data, "--arch", "vgg11", "--num_epoch", "2", "--T", "2", "--rate_flag")


@pytest.mark.parametrize("other", OTHERS)
def test_each_flag_with_another_value_changes_the_training(small, data, tmp_path, without_flags, other):
    """That the default typed is the default, test_options.py holds."""
    assert run_here(*two_epochs(data), *other.format(weights=without_flags).split(), "--log_path", tmp_path) == 0
    assert not same(load(without_flags / "last.pth")["model"], load(only_run(tmp_path) / "last.pth")["model"])


def test_another_decay_makes_another_average_of_the_same_weights(small, data, tmp_path, without_flags):
    def content(decay: str) -> dict[str, Any]:
        flags = ["--model_ema", "--model_ema_decay", decay, "--log_path", tmp_path / decay]
        assert run_here(*two_epochs(data), *flags) == 0
        return load(only_run(tmp_path / decay) / "last.pth")

    default, other, without = content("0.999"), content("0.5"), load(without_flags / "last.pth")
    assert same(default["trained"], without["model"])
    assert not same(default["model"], other["model"])


NO_VALUE_HERE = {
    "arch": "every network", "dataset": "every data set", "seed": "a run repeats", "data_path": "every data set",
    "log_path": "every test", "val_batch_size num_workers device": "ones that change no result",
    "resume evaluate report": "below", "run": "test_distributed.py, test_interrupts.py",
    "save_every early_stop": "test_interrupts.py", "val_split": "test_val_split.py",
    "amp compile channels_last tf32 deterministic": "test_speed_options.py",
    "cuda_graph": "test_graphed.py", "tet_weight": "test_loss.py", "sltt_steps": "test_method.py",
    "sync_bn": "test_distributed.py", "distill distill_ce distill_kl": "test_distillation.py",
}  # fmt: skip


def test_no_flag_is_without_a_test_of_what_it_changes():
    flags = re.findall(r"--(?:no-)?(\w+)", " ".join([*OFF, *OTHERS, "--model_ema_decay"]))
    elsewhere = " ".join(NO_VALUE_HERE).split()
    assert sorted({*flags, *elsewhere}) == sorted(f.name for f in fields(image_options()))


def test_by_default_as_many_processes_load_as_the_machine_has_cores(data, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(20)), raising=False)
    script = runpy.run_path(str(CIFAR), run_name="imported")
    path = str(data)
    for options, expected in (
        ({"dataset": "CIFAR10", "data_path": path}, 20),
        ({"dataset": "CIFAR10", "data_path": path, "num_workers": 1}, 1),
        ({"dataset": "DIGITS"}, 0),
    ):
        assert script["load_data"](script["ImageOptions"](**options)).options["num_workers"] == expected


def test_runs_that_begin_at_the_same_moment_get_directories_of_their_own(tmp_path, monkeypatch):
    """Each waits for all others before its directory gets its name."""
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    numbers, together = range(8), threading.Barrier(8)

    def begin(number: int) -> Path:
        def fill(directory: Path) -> None:
            (directory / "number").write_text(str(number))
            together.wait(60)

        with new_run_directory(tmp_path, "run", fill) as directory:
            return directory

    with ThreadPoolExecutor(len(numbers)) as pool:
        directories = list(pool.map(begin, numbers))
    assert [int((directory / "number").read_text()) for directory in directories] == list(numbers)


def test_what_a_killed_start_of_a_named_run_has_left_goes_after_a_day(tmp_path):
    old, young, other = (tmp_path / f".{name}-0123456{i}" for i, name in enumerate(("mine", "mine", "yours")))
    for path in (old, young, other):
        path.mkdir()
    for path in (old, other):
        os.utime(path, (0, 0))
    with new_run_directory(str(tmp_path), "mine", lambda directory: None, stamped=False):
        pass
    assert [old.exists(), young.exists(), other.exists()] == [False, True, True]


def test_a_run_of_batches_of_one_is_tested_step_by_step(small, data, tmp_path):
    flags = ["--num_epoch", "1", "--T", "2", "--train_batch_size", "1"]
    assert run_here(*cifar10(data), *small, *flags, "--log_path", tmp_path) == 0
    assert run_here("--evaluate", only_run(tmp_path), "--step_mode", "s") == 0


def test_runs_of_the_same_second_get_directories_of_their_own(small, data, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    for _ in range(3):
        assert run_here(*cifar10(data), *small, "--num_epoch", "1", "--T", "1", "--log_path", tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert all(len(metrics(directory)) == 1 for directory in tmp_path.iterdir())


# --resume


def test_a_killed_run_continues_as_if_nothing_had_been(data, tmp_path, monkeypatch, capfd):
    """SIGKILL in the third of four epochs, augmentation on, two workers; continued from another directory."""
    flags = ["--arch", "vggsnn_small", "--image_size", "16", "--num_epoch", "4", "--T", "2", "--rate_flag"]
    command = ["--dataset", "CIFAR10", "--data_path", os.path.relpath(data, tmp_path), *BATCHES, "--num_workers", "2"]
    monkeypatch.chdir(tmp_path)
    assert run_here(*command, *flags, "--log_path", "whole") == 0
    capfd.readouterr()
    killed = start(*command, *flags, "--log_path", "killed", cwd=tmp_path)
    logged, deadline = "killed/*/metrics.jsonl", time.monotonic() + 200
    while not any(path.read_text().count("\n") >= 2 for path in tmp_path.glob(logged)):
        assert killed.poll() is None, killed.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert finish(killed)[0] == -signal.SIGKILL
    directory = only_run(tmp_path / "killed")
    assert len(history(load(directory / "last.pth"))) < 4

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_here("--resume", "../killed/" + directory.name) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "continuing after epoch" in out
    check_continued(directory, only_run(tmp_path / "whole"), 4)
    assert list((tmp_path / "elsewhere").iterdir()) == []


class Killed(BaseException):
    """Ends the script where it is raised, as SIGKILL would: nothing is written afterwards."""


def kill_at(monkeypatch, moment: str, epoch: int) -> None:
    """``moment``: before or after an epoch is logged or a checkpoint is saved."""
    when, what = moment.split()

    def deadly(function, is_it) -> Any:
        def call(*args, **kwargs):
            if is_it(*args, **kwargs) and when == "before":
                raise Killed
            function(*args, **kwargs)
            if is_it(*args, **kwargs):
                raise Killed

        return call

    if what == "log":
        monkeypatch.setattr(RunLog, "epoch", deadly(RunLog.epoch, lambda log, logged: logged.metrics["epoch"] == epoch))
    else:

        def is_it(path: Path, **content: Any) -> bool:
            return path.name == what and len(history(content)) == epoch

        monkeypatch.setattr(checkpoint, "save", deadly(checkpoint.save, is_it))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Run directories of three epochs of the small network, for each pair."""
    directories = {}
    for pair in PAIRS:
        log_path = tmp_path_factory.mktemp("uninterrupted")
        with tiny_networks("vgg11"):
            assert run_here(*resumable(data, pair), "--log_path", log_path) == 0
        directories[pair] = only_run(log_path)
    return directories


def resumable(data: Path, pair: tuple[str, str]) -> list[str]:
    return cifar10(data, "--arch", "vgg11", "--image_size", "8", "--num_epoch", "3", "--T", "2", *pair_flags(*pair))


def interrupted(data: Path, pair: tuple[str, str], moment: str, epoch: int, log_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, moment, epoch)
        with pytest.raises(Killed):
            run_here(*resumable(data, pair), "--log_path", log_path)
    return only_run(log_path)


MOMENTS = [f"{when} {what}" for what in ("log", checkpoint.BEST, checkpoint.LAST) for when in ("before", "after")]


@pytest.mark.parametrize(
    ("pair", "moment", "epoch"),
    [
        *((("rate", "m"), moment, 2) for moment in MOMENTS if checkpoint.BEST not in moment),
        *((pair, "after last.pth", 1) for pair in PAIRS),
        *((pair, "before last.pth", 3) for pair in PAIRS),
    ],
)
def test_whenever_a_run_is_killed_it_continues_exactly(small, data, tmp_path, uninterrupted, pair, moment, epoch):
    directory = interrupted(data, pair, moment, epoch, tmp_path)
    assert run_here("--resume", directory) == 0
    check_continued(directory, uninterrupted[pair], 3)


def test_a_run_killed_around_its_best_weights_continues_exactly(small, data, tmp_path, uninterrupted):
    pair = ("rate", "s")
    best = len(history(load(uninterrupted[pair] / checkpoint.BEST)))
    for moment in ("before", "after"):
        directory = interrupted(data, pair, f"{moment} {checkpoint.BEST}", best, tmp_path / moment)
        assert run_here("--resume", directory) == 0
        check_continued(directory, uninterrupted[pair], 3)


def test_a_run_can_be_killed_and_continued_again_and_again(small, data, tmp_path, uninterrupted):
    pair = ("bptt", "m")
    directory = interrupted(data, pair, "after log", 2, tmp_path)
    for moment, epoch in (("before log", 2), ("before last.pth", 2), ("after last.pth", 2), ("after log", 3)):
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment, epoch)
            with pytest.raises(Killed):
                run_here("--resume", directory / "last.pth")
    assert run_here("--resume", directory / "last.pth") == 0
    check_continued(directory, uninterrupted[pair], 3)


@pytest.mark.parametrize("name", ["", "last.pth"])
def test_a_finished_run_says_so_and_stays_as_it_is(small, uninterrupted, tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    directory = uninterrupted["rate", "m"]
    before = snapshot(directory)
    assert run_here("--resume", directory / name) == 0
    out, err = capfd.readouterr()
    assert "all 3 epochs are done" in out
    assert f"--weights {directory}" in out
    assert f"best test accuracy {max(row['val_acc'] for row in metrics(directory)):.2f} %" in out
    assert err == ""
    assert snapshot(directory) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [[], ["--val_batch_size", "3"], ["--num_workers", "0"], ["--device", "cpu"]])
def test_the_same_flags_again_or_ones_that_change_no_result_may_be_typed(small, data, tmp_path, uninterrupted, change):
    pair = ("rate", "m")
    directory = interrupted(data, pair, "after last.pth", 2, tmp_path)
    assert run_here(*resumable(data, pair), "--log_path", tmp_path, "--resume", directory, *change) == 0
    result, expected = load(directory / "last.pth"), load(uninterrupted[pair] / "last.pth")
    assert same(result["model"], expected["model"])
    assert unmeasured(history(result))[2] == pytest.approx(unmeasured(history(expected))[2])


def test_the_default_log_path_may_be_typed_again(small, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, "after last.pth", 1)
        with pytest.raises(Killed):
            run_here(*resumable(data, ("rate", "m")))
    assert run_here("--resume", only_run(tmp_path / "log"), "--log_path", "log") == 0


def test_a_run_directory_that_was_moved_continues_there(small, data, tmp_path, uninterrupted):
    pair = ("rate", "m")
    moved = interrupted(data, pair, "after last.pth", 2, tmp_path / "old").rename(tmp_path / "moved")
    assert run_here("--resume", moved) == 0
    check_continued(moved, uninterrupted[pair], 3)
    assert list((tmp_path / "old").iterdir()) == []


# --evaluate


def accuracy_said(out: str) -> str:
    (accuracy,) = re.findall(r"accuracy (\S+) %", out.splitlines()[-1])
    return accuracy


@pairs
def test_evaluation_gives_the_accuracy_of_the_run(small, uninterrupted, tmp_path, monkeypatch, capfd, pair):
    monkeypatch.chdir(tmp_path)
    directory = uninterrupted[pair]
    rows, before = metrics(directory), snapshot(directory)
    for name, row in (("last.pth", rows[-1]), ("model_weights.pth", max(rows, key=lambda row: row["val_acc"]))):
        assert run_here("--evaluate", directory / name) == 0
        out, err = capfd.readouterr()
        assert err == ""
        assert accuracy_said(out) == f"{row['val_acc']:.2f}"
        assert f"loss {row['val_loss']:.4f}" in out
    assert snapshot(directory) == before
    assert list(tmp_path.iterdir()) == []


def test_evaluation_tells_accuracy_by_class_and_firing_rates_and_writes_them(small, uninterrupted, tmp_path, capfd):
    directory, path = uninterrupted["rate", "m"], tmp_path / "report.json"
    before = snapshot(directory)
    assert run_here("--evaluate", directory, "--report", path) == 0
    out, found = capfd.readouterr().out, json.loads(path.read_text())
    assert snapshot(directory) == before
    best = max(metrics(directory), key=lambda row: row["val_acc"])
    assert (found["accuracy"], found["loss"]) == pytest.approx((best["val_acc"], best["val_loss"]))
    rows = found["accuracy_by_class"]
    assert [row["class"] for row in rows] == load(directory / "model_weights.pth")["classes"]
    assert sum(row["samples"] for row in rows) == 4
    seen = [row for row in rows if row["samples"]]
    assert sum(row["accuracy"] * row["samples"] for row in seen) == pytest.approx(4 * found["accuracy"])
    assert all(row["accuracy"] is None for row in rows if not row["samples"])
    for row in seen:
        assert re.search(rf"^  {row['class']} +{row['accuracy']:.2f} % of {row['samples']}$", out, re.MULTILINE)
    assert list(found["firing_rates"]) == ["features.2", "features.5"]
    assert max(found["firing_rates"].values()) > 0
    for layer, rate in found["firing_rates"].items():
        assert 0 <= rate < 1
        assert f"  {layer}" in out
        assert f"  {rate:.4f}\n" in out


def test_weights_can_be_evaluated_away_from_their_run(small, data, uninterrupted, tmp_path, capfd):
    """A file of weights says by itself what network and data it is for; the data may lie elsewhere by now."""
    weights, rows = tmp_path / "mine.pth", metrics(uninterrupted["bptt", "m"])
    weights.write_bytes((uninterrupted["bptt", "m"] / "model_weights.pth").read_bytes())
    (tmp_path / "data").symlink_to(data)
    assert run_here("--evaluate", weights, "--data_path", tmp_path / "data") == 0
    assert accuracy_said(capfd.readouterr().out) == f"{max(row['val_acc'] for row in rows):.2f}"


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_where_a_checkpoint_says_that_data_are_nothing_is_made(uninterrupted, tmp_path, capfd, flag):
    """It may be a stranger's: no download begins, no directory appears."""
    weights, named = tmp_path / "weights.pth", tmp_path / "named"
    content = load(uninterrupted["rate", "m"] / "last.pth")
    content["config"]["data_path"] = str(named)
    checkpoint.save(weights, **content)
    assert run_here(flag, weights) == 2
    out, err = capfd.readouterr()
    assert out == f"data: {named}, as {weights} says\n"
    assert f"{weights} says that its data are in {named}" in err
    assert "--data_path" in err
    assert not named.exists()
