"""Bad command lines: exit status 2, one line on stderr that says what is wrong, nothing left on the disk."""

import os
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cifar_format import write_cifar10, write_cifar100
from tests.script_helpers import finish, load, run_here, snapshot, start, tiny_networks
from util import checkpoint

GIVEN = ["--num_epoch", "1", "--T", "1", "--num_workers", "0", "--log_path", "log"]
CIFAR = ["--dataset", "CIFAR10", "--data_path", "data", "--arch", "vgg11", "--image_size", "8"]  # vgg11 is tiny here


class Payload:
    """Unpickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module", autouse=True)
def _small_networks():
    with tiny_networks("vgg11", "resnet19"):
        yield


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A directory with data sets, good and bad, a run, and checkpoints that are none or others."""
    root = tmp_path_factory.mktemp("prepared")
    write_cifar10(root / "data", images_per_batch=2)
    write_cifar100(root / "data100", train_images=4, test_images=2)
    for name in ("truncated", "partly", "odd"):
        shutil.copytree(root / "data", root / name)
    (root / "partly" / "cifar-10-batches-py" / "data_batch_3").unlink()
    batch = root / "truncated" / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(batch.read_bytes()[:500])
    batch = root / "odd" / "cifar-10-batches-py" / "test_batch"
    batch.write_bytes(pickle.dumps({"data": Payload(root / "owned"), "labels": [0, 1]}, protocol=2))
    (root / "file").write_text("some text\n")
    (root / "empty").mkdir()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run_here(*GIVEN, *CIFAR, "--log_path", "runs", "--T", "2") == 0
    (directory,) = (root / "runs").iterdir()
    directory.rename(root / "run")
    (root / "runs").rmdir()
    make_checkpoints(root)
    return root


def make_checkpoints(root: Path) -> None:
    good = load(root / "run" / "last.pth")
    config = good["config"]

    def save(name: str, content: Any) -> None:
        (root / f"{name}.pth").write_bytes(checkpoint.encode(content))

    def altered(**changes: Any) -> dict[str, Any]:
        return {**good, **changes}

    whole = (root / "run" / "last.pth").read_bytes()
    (root / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (root / "none.pth").write_bytes(b"")
    (root / "code.pth").write_bytes(pickle.dumps(Payload(root / "owned")))
    save("code_inside", altered(extra=Payload(root / "owned")))
    save("tensor", torch.zeros(3))
    save("bare_weights", good["model"])
    save("newer", altered(format=good["format"] + 1))
    save("unknown_arch", altered(config={**config, "arch": "resnet9000"}))
    save("no_arch", altered(config={name: value for name, value in config.items() if name != "arch"}))
    save("config_no_dict", altered(config=[1, 2]))
    save("config_of_text", altered(config={**config, "T": "four"}))
    save("config_of_quoted_numbers", altered(config={**config, "T": "4"}))
    save("config_without_arch", altered(config={**config, "arch": None}))
    save("config_of_numbered_keys", altered(config={**config, 7: 7}))
    save("config_of_another_script", altered(config={**config, "polarity": "both"}))
    save("other_weights", altered(model=dict(list(good["model"].items())[:-1])))
    save("other_shapes", altered(model={name: value[..., None] for name, value in good["model"].items()}))
    save("no_weights", altered(model="weights"))
    save("other_optimizer", altered(optimizer={"state": {}, "param_groups": []}))
    save("no_optimizer", {name: value for name, value in good.items() if name != "optimizer"})
    save("no_history", altered(logged=None))
    save("lacking_format", {name: value for name, value in good.items() if name != "format"})


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


MODELS = "resnet18, resnet19, vggsnn_cifar, vggsnn_dvs"
DATASETS = "CIFAR10, CIFAR100, MNIST, DIGITS"
HUGE = "9" * 20
LONG = "a" * 300

# Command line -> what the message must say
FLAGS: list[tuple[str, list[str]]] = [
    ("--arch resnet99", ["--arch", "'resnet99'", MODELS]),
    ("--arch os.system", ["--arch", "'os.system'", MODELS]),
    ("--dataset CIFAR11", ["--dataset", "'CIFAR11'", DATASETS]),
    ("--optim LBFGS", ["--optim", "'LBFGS'", "SGD, Adam, AdamW"]),
    ("--scheduler linear", ["--scheduler", "'linear'", "cosine, step, constant"]),
    ("--step_mode x", ["--step_mode", "'x'", "m, s"]),
    ("--T 0", ["--T", "'0'", "at least 1"]),
    ("--T -3", ["--T", "'-3'", "at least 1"]),
    ("--T 2.5", ["--T", "'2.5'", "whole number"]),
    ("--T four", ["--T", "'four'", "whole number"]),
    ("--T nan", ["--T", "'nan'", "whole number"]),
    (f"--T {HUGE}", ["--T", HUGE, "at most"]),
    ("--T", ["--T", "expected one argument"]),
    ("--train_batch_size 0", ["--train_batch_size", "'0'", "at least 1"]),
    ("--train_batch_size -8", ["--train_batch_size", "'-8'", "at least 1"]),
    (f"--train_batch_size {HUGE}", ["--train_batch_size", HUGE, "at most"]),
    ("--val_batch_size 0", ["--val_batch_size", "'0'", "at least 1"]),
    (f"--val_batch_size {HUGE}", ["--val_batch_size", HUGE, "at most"]),
    ("--num_epoch 0", ["--num_epoch", "'0'", "at least 1"]),
    ("--num_workers -1", ["--num_workers", "'-1'", "at least 0"]),
    (f"--num_workers {HUGE}", ["--num_workers", HUGE, "at most"]),
    ("--lr 0", ["--lr", "'0'", "above 0"]),
    ("--lr -0.1", ["--lr", "'-0.1'", "above 0"]),
    ("--lr nan", ["--lr", "'nan'", "above 0"]),
    ("--lr inf", ["--lr", "'inf'", "above 0"]),
    ("--lr 1e300", ["--lr", "'1e300'", "at most"]),
    ("--lr 0,1", ["--lr", "'0,1'", "a number"]),
    ("--wd -1", ["--wd", "'-1'", "at least 0"]),
    ("--wd nan", ["--wd", "'nan'"]),
    ("--decay 0", ["--decay", "'0'", "below 1"]),
    ("--decay 1", ["--decay", "'1'", "below 1"]),
    ("--decay -0.2", ["--decay", "'-0.2'", "below 1"]),
    ("--decay 1.5", ["--decay", "'1.5'", "below 1"]),
    ("--decay 1e-17", ["decay", "1e-17"]),
    ("--decay nan", ["--decay", "'nan'"]),
    ("--thresh 0", ["--thresh", "'0'", "above 0"]),
    ("--thresh -1", ["--thresh", "'-1'", "above 0"]),
    ("--thresh inf", ["--thresh", "'inf'"]),
    ("--thresh 1e300", ["--thresh", "'1e300'", "at most"]),
    ("--v_reset nan", ["--v_reset", "'nan'", "a number"]),
    ("--v_reset inf", ["--v_reset", "'inf'", "a number"]),
    ("--v_reset zero", ["--v_reset", "'zero'", "a number"]),
    ("--seed -2", ["--seed", "'-2'", "at least -1"]),
    (f"--seed {2**32}", ["--seed", str(2**32), "at most"]),
    ("--seed 1.5", ["--seed", "'1.5'", "whole number"]),
    ("--image_size 0", ["--image_size", "'0'", "at least"]),
    ("--image_size 2", ["image", "2", "4", "1024"]),
    ("--image_size 5000", ["image", "5000", "4", "1024"]),
    ("--nonsense 3", ["unrecognized", "--nonsense"]),
    ("--batch_size 3", ["unrecognized", "--batch_size"]),
    ("--arc vgg11", ["unrecognized", "--arc"]),
    ("word", ["unrecognized", "word"]),
    ("--no-T", ["unrecognized", "--no-T"]),
    ("--rate_flag=yes", ["--rate_flag", "yes"]),
    ("--rate_flag False", ["unrecognized", "False"]),
    ("--device nonsense", ["--device nonsense", "no such device"]),
    ("--device meta", ["--device meta"]),
    ("--device cuda:99", ["--device cuda:99", "no such device"]),
]  # fmt: skip
DATA: list[tuple[str, list[str]]] = [
    ("--dataset CIFAR10", ["CIFAR10 needs --data_path"]),
    ("--dataset CIFAR10 --data_path empty", ["empty/cifar-10-batches-py", "download failed", "no network"]),
    ("--dataset CIFAR10 --data_path absent/deeper", ["absent/deeper/cifar-10-batches-py", "download failed"]),
    ("--dataset MNIST --data_path empty", ["empty/MNIST/raw", "download failed"]),
    ("--dataset CIFAR10 --data_path file", ["file", "not a directory"]),
    ("--dataset CIFAR10 --data_path file/below", ["file"]),
    ("--dataset CIFAR10 --data_path run/last.pth", ["run/last.pth", "not a directory"]),
    ("--dataset CIFAR10 --data_path ~nobody_of_that_name/data", ["~nobody_of_that_name"]),
    (f"--dataset CIFAR10 --data_path {LONG}", ["--data_path", "name too long"]),
    ("--dataset CIFAR100 --data_path data", ["data/cifar-100-python", "download failed"]),
    ("--dataset CIFAR10 --data_path truncated", ["truncated/cifar-10-batches-py/data_batch_2", "truncated or"]),
    ("--dataset CIFAR10 --data_path partly", ["partly/cifar-10-batches-py", "lacks data_batch_3"]),
    ("--dataset CIFAR10 --data_path odd", ["odd/cifar-10-batches-py/test_batch", "contains code"]),
]  # fmt: skip
FITS: list[tuple[str, list[str]]] = [
    ("--dataset DIGITS --arch vgg13", ["vgg13", "8x8", "16x16"]),
    ("--dataset DIGITS --arch vggsnn_dvs", ["vggsnn_dvs", "8x8", "48x48"]),
    ("--dataset DIGITS --arch vggsnn_dvs --image_size 96", ["vggsnn_dvs", "96x96", "48x48"]),
    ("--dataset CIFAR10 --data_path data --arch vggsnn_cifar --image_size 4", ["vggsnn_cifar", "4x4", "8x8"]),
    ("--dataset DIGITS --arch resnet18 --train_batch_size 1", ["--train_batch_size", "single value"]),
    ("--dataset DIGITS --arch resnet18 --train_batch_size 1 --T 4 --step_mode s", ["--train_batch_size"]),
]
LOG_PATHS: list[tuple[str, list[str]]] = [
    ("--log_path file", ["--log_path", "file"]),
    ("--log_path file/below", ["--log_path", "file/below"]),
    (f"--log_path {LONG}", ["--log_path", "name too long"]),
    ("--log_path /proc/nowhere", ["--log_path", "/proc/nowhere"]),
]
CHECKPOINTS: list[tuple[str, list[str]]] = [  # for --resume and for --evaluate alike
    ("absent.pth", ["no checkpoint at", "absent.pth"]),
    ("absent/run", ["no checkpoint at", "absent/run"]),
    ("empty", ["no checkpoint at", "empty"]),
    (LONG, ["name too long"]),
    ("", ["''"]),
    ("file", ["file", "not a checkpoint"]),
    ("none.pth", ["none.pth", "not a checkpoint"]),
    ("cut.pth", ["cut.pth", "truncated"]),
    ("run/config.json", ["run/config.json", "not a checkpoint"]),
    ("data/cifar-10-batches-py/test_batch", ["test_batch", "not a checkpoint"]),
    ("code.pth", ["code.pth", "not a checkpoint"]),
    ("code_inside.pth", ["code_inside.pth", "not a checkpoint"]),
    ("tensor.pth", ["tensor.pth", "not a checkpoint of this project"]),
    ("bare_weights.pth", ["bare_weights.pth", "not a checkpoint of this project"]),
    ("lacking_format.pth", ["lacking_format.pth", "not a checkpoint of this project"]),
    ("newer.pth", ["newer.pth", "format 3", "format 2"]),
    ("unknown_arch.pth", ["unknown_arch.pth"]),
    ("no_arch.pth", ["no_arch.pth"]),
    ("config_no_dict.pth", ["config_no_dict.pth"]),
    ("config_of_text.pth", ["config_of_text.pth"]),
    ("config_of_quoted_numbers.pth", ["config_of_quoted_numbers.pth"]),
    ("config_without_arch.pth", ["config_without_arch.pth"]),
    ("config_of_numbered_keys.pth", ["config_of_numbered_keys.pth"]),
    ("other_weights.pth", ["other_weights.pth", "classifier.bias"]),
    ("other_shapes.pth", ["other_shapes.pth", "do not fit"]),
    ("no_weights.pth", ["no_weights.pth"]),
]


def flag_name(flags: str) -> str:
    return flags.split()[0].removeprefix("--").removeprefix("no-")


RESUME: list[tuple[str, list[str]]] = [
    ("--resume run --evaluate run/last.pth", ["--resume", "--evaluate", "exclude"]),
    ("--resume run/model_weights.pth", ["run/model_weights.pth", "last.pth"]),
    ("--resume other_optimizer.pth", ["other_optimizer.pth"]),
    ("--resume no_optimizer.pth", ["no_optimizer.pth"]),
    ("--resume no_history.pth", ["no_history.pth"]),
    ("--resume config_of_another_script.pth", ["config_of_another_script.pth", "polarity"]),
    *((f"--resume run {flags}", [flag_name(flags), *words]) for flags, words in {
        "--arch resnet19": ["resnet19", "vgg11"],
        "--dataset CIFAR100 --data_path data100": ["CIFAR100", "CIFAR10"],
        "--decay 0.5": ["0.5", "0.2"],
        "--thresh 2": ["2.0", "1.0"],
        "--v_reset 0": ["0.0"],
        "--no-detach_reset": ["run"],
        "--rate_flag": ["run"],
        "--T 8": ["8", "2"],
        "--step_mode s": ["s", "m"],
        "--lr 0.5": ["0.5", "0.1"],
        "--num_epoch 9": ["9", "1"],
        "--seed 5": ["5", "0"],
        "--image_size 16": ["16", "8"],
        "--train_batch_size 3": ["3", "128"],
        "--no-auto_aug": ["run"],
        "--log_path elsewhere": ["elsewhere"],
    }.items()),
    *((f"--evaluate run/last.pth {flags}", [flag_name(flags), *words]) for flags, words in {
        "--arch resnet19": ["resnet19", "vgg11"],
        "--dataset CIFAR100 --data_path data100": ["CIFAR100", "CIFAR10"],
        "--decay 0.5": ["0.5", "0.2"],
        "--thresh 2": ["2.0", "1.0"],
        "--v_reset 0": ["0.0"],
        "--image_size 16": ["16", "8"],
    }.items()),
]  # fmt: skip


def table() -> list:
    rows = [(line, [*CIFAR, *GIVEN, *line.split()], words) for line, words in FLAGS + LOG_PATHS]
    rows += [(line, [*GIVEN, *line.split()], words) for line, words in DATA + FITS]
    rows += [
        (f"{flag} {file or 'nothing'}", [flag, file], words)
        for flag in ("--resume", "--evaluate")
        for file, words in CHECKPOINTS
    ]
    rows += [(line, line.split(), words) for line, words in RESUME]
    return [pytest.param(argv, words, id=line.replace(LONG, "LONG")) for line, argv, words in rows]


def check(root: Path, before: dict, status: int, err: str, words: list[str]) -> None:
    assert status == 2, err
    assert err.startswith("main.py: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == [], err
    assert snapshot(root) == before
    assert "owned" not in before


@pytest.mark.parametrize(("argv", "words"), table())
def test_bad_input_is_one_line_on_stderr_and_status_2(prepared, monkeypatch, capfd, recwarn, argv, words):
    monkeypatch.chdir(prepared)
    before = snapshot(prepared)
    status = run_here(*argv)
    check(prepared, before, status, capfd.readouterr().err, words)
    # pytest keeps warnings off stderr, which a user would see there
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_so(prepared, monkeypatch, capfd):
    monkeypatch.chdir(prepared)
    before = snapshot(prepared)
    status = run_here(*GIVEN, *CIFAR, "--device", "cuda")
    check(prepared, before, status, capfd.readouterr().err, ["--device cuda", "no such device", "--device cpu"])


def test_the_same_in_processes_of_their_own(prepared):
    """Nothing that Python, torch or argparse prints by itself stands beside the one line."""
    before = snapshot(prepared)
    lines: dict[str, list[str]] = {
        "--arch resnet99": ["resnet99", MODELS],
        "--dataset CIFAR10 --data_path absent --num_workers 0": ["absent/cifar-10-batches-py", "download failed"],
        "--evaluate code.pth": ["code.pth"],
    }
    processes = [start(*line.split(), cwd=prepared) for line in lines]
    for process, words in zip(processes, lines.values(), strict=True):
        status, _, err = finish(process)
        check(prepared, before, status, err, words)


@pytest.mark.parametrize("text", ["two\nlines", "tab\tand\rreturn"])
@pytest.mark.parametrize("flag", ["--arch", "--data_path", "--resume", "--evaluate", "--device"])
def test_line_breaks_in_a_value_make_no_second_line(prepared, monkeypatch, capfd, flag, text):
    monkeypatch.chdir(prepared)
    before = snapshot(prepared)
    status = run_here("--dataset", "CIFAR10", flag, text)
    check(prepared, before, status, capfd.readouterr().err, ["two" if "two" in text else "tab"])


# What may be changed is not refused


@pytest.mark.parametrize(
    "flags",
    ["", "--arch VGG11 --dataset cifar10 --decay 0.2", "--T 3 --step_mode s", "--val_batch_size 1", "--rate_flag"],
)
def test_evaluation_takes_what_does_not_contradict(prepared, monkeypatch, capfd, flags):
    monkeypatch.chdir(prepared)
    before = snapshot(prepared)
    assert run_here("--evaluate", "run/last.pth", *flags.split()) == 0
    out, err = capfd.readouterr()
    assert "accuracy" in out
    assert err == ""
    assert snapshot(prepared) == before
