"""The command line: every published flag with its published default, and what --help says of it."""

import argparse
import operator
import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch.utils.data import TensorDataset

from experiment.report import options as options_page
from tests.experiment.script_helpers import image_options, run_here
from tests.processes import finish, start_python
from util.train.options import GROUPS, TrainOptions, names_where, parse, valid_config
from util.train.setup import LoadedData, build_network, choose_device
from util.train.values import number

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[2]

# Flag -> (default, another value as typed, that value)
VALUES = {
    "seed": (0, "7", 7),
    "arch": ("resnet18", "vgg11", "vgg11"),
    "resume": (None, "/a/run", "/a/run"),
    "evaluate": (None, "/a/last.pth", "/a/last.pth"),
    "report": (None, "/a/report.json", "/a/report.json"),
    "dataset": ("DIGITS", "CIFAR100", "CIFAR100"),
    "data_path": (None, "/a/data", "/a/data"),
    "log_path": ("log", "/a/logs", "/a/logs"),
    "image_size": (None, "16", 16),
    "optim": ("SGD", "AdamW", "AdamW"),
    "scheduler": ("cosine", "constant", "constant"),
    "train_batch_size": (None, "1", 1),
    "val_batch_size": (128, "1", 1),
    "lr": (0.1, "0.2", 0.2),
    "momentum": (0.9, "0.5", 0.5),
    "early_stop": (None, "5", 5),
    "val_split": (0.0, "0.1", 0.1),
    "wd": (5e-4, "0", 0.0),
    "num_epoch": (300, "1", 1),
    "num_workers": (None, "0", 0),
    "lr_warmup_epochs": (0, "3", 3),
    "label_smoothing": (0.0, "0.1", 0.1),
    "mixup_alpha": (0.0, "0.2", 0.2),
    "cutmix_alpha": (0.0, "1", 1.0),
    "clip_grad_norm": (None, "1", 1.0),
    "model_ema_decay": (0.999, "0.9", 0.9),
    "weights": (None, "/a/weights.pth", "/a/weights.pth"),
    "neuron": ("lif", "plif", "plif"),
    "surrogate": ("sigmoid", "atan", "atan"),
    "alpha": (None, "2", 2.0),
    "decay": (0.2, "0.5", 0.5),
    "v_reset": (None, "-0.5", -0.5),
    "thresh": (1.0, "2", 2.0),
    "T": (4, "1", 1),
    "step_mode": ("m", "s", "s"),
    "device": (None, "cpu", "cpu"),
    "amp": ("off", "bf16", "bf16"),
    "save_every": (0, "100", 100),
    "grad_accum": (1, "2", 2),
    "run": (None, "try_1", "try_1"),
    "method": ("bptt", "sltt", "sltt"),
    "windows": (1, "2", 2),
    "sltt_steps": (None, "1", 1),
    "loss": ("ce", "tet", "tet"),
    "tet_weight": (0.05, "0.1", 0.1),
    "rate_penalty": (0.0, "0.1", 0.1),
    "distill_ce": (1.0, "0.7", 0.7),
    "distill_kl": (0.3, "0.1", 0.1),
}
SWITCHES = {
    "auto_aug": None, "cutout": None, "detach_reset": True, "rate_loss_scale": None,
    "compile": None, "channels_last": None, "sync_bn": None, "model_ema": False,
    "distill": False,
    "tf32": True, "cuda_graph": None, "deterministic": False,
}  # fmt: skip
NAMES = [*VALUES, *SWITCHES]


@pytest.fixture(scope="module")
def options_class():
    return image_options()


@pytest.fixture
def parsed(options_class):
    return lambda *argv: parse(options_class, "What it does.", argv)


def refused(parsed, capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed(*argv)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    return err


def test_the_tables_of_this_file_hold_every_flag(options_class):
    assert set(NAMES) == {f.name for f in fields(options_class)}


def test_without_flags_the_defaults_are_the_published_ones(parsed):
    options, typed = parsed()
    assert vars(options) == {**{name: default for name, (default, _, _) in VALUES.items()}, **SWITCHES}
    assert typed == frozenset()


@pytest.mark.parametrize("name", VALUES)
def test_a_flag_sets_its_option_and_no_other(parsed, name):
    _, text, value = VALUES[name]
    for argv in ([f"--{name}", text], [f"--{name}={text}"]):
        options, typed = parsed(*argv)
        assert vars(options) == {**vars(parsed()[0]), name: value}
        assert type(getattr(options, name)) is type(value)
        assert typed == {name}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [True, False])
def test_a_boolean_has_both_forms_and_the_last_one_holds(parsed, name, value):
    form = {True: f"--{name}", False: f"--no-{name}"}
    options, typed = parsed(form[value])
    assert vars(options) == {**vars(parsed()[0]), name: value}
    assert typed == {name}
    assert getattr(parsed(form[not value], form[value])[0], name) is value


@pytest.mark.parametrize(("form", "method"), [("--rate_flag", "rate"), ("--no-rate_flag", "bptt")])
def test_the_published_flag_names_the_method(parsed, form, method):
    assert parsed(form) == parsed("--method", method)


@pytest.mark.parametrize("name", [*SWITCHES, "rate_flag"])
def test_a_boolean_takes_no_value(parsed, capsys, name):
    """`--rate_flag False` must not switch it on."""
    assert "False" in refused(parsed, capsys, f"--{name}", "False")
    assert "False" in refused(parsed, capsys, f"--{name}=False")


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("arch", "ResNet18", "resnet18"),
        ("arch", "VGGSNN_CIFAR", "vggsnn_cifar"),
        ("dataset", "cifar10", "CIFAR10"),
        ("dataset", "Digits", "DIGITS"),
        ("optim", "sgd", "SGD"),
        ("optim", "SGDM", "SGD"),
        ("scheduler", "COSINE", "cosine"),
        ("optim", "ADAM", "Adam"),
        ("scheduler", "Cosine", "cosine"),
        ("step_mode", "M", "m"),
        ("v_reset", "None", None),
    ],
)
def test_names_are_understood_in_any_case_and_as_the_published_code_has_them(parsed, flag, text, value):
    assert getattr(parsed(f"--{flag}", text)[0], flag) == value


@pytest.mark.parametrize("name", NAMES)
def test_no_abbreviations(parsed, capsys, name):
    """A later flag could make a shortened one mean something else."""
    if len(name) > 2:
        assert f"--{name[:-1]}" in refused(parsed, capsys, f"--{name[:-1]}", "1")


@pytest.mark.parametrize("flag", ["data_path", "log_path", "weights", "resume", "evaluate", "report"])
def test_a_path_means_the_same_from_another_directory(parsed, monkeypatch, tmp_path, flag):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("HOME", "/home/somebody")
    for text, expected in (("x", tmp_path / "below" / "x"), ("../x", tmp_path / "x"), ("~/x", "/home/somebody/x")):
        assert getattr(parsed(f"--{flag}", text)[0], flag) == str(expected)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("T", "1"), ("train_batch_size", "1"), ("num_workers", "0"), ("num_epoch", "1"), ("seed", "-1"),
        ("seed", str(2**32 - 1)), ("wd", "0"), ("decay", "0.999"), ("decay", "0.001"), ("thresh", "1e-3"),
        ("lr", "1e-8"), ("v_reset", "0"),
    ],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_taken(parsed, flag, text):
    assert getattr(parsed(f"--{flag}", text)[0], flag) == float(text)


@pytest.mark.parametrize(
    ("kind", "limits", "bad", "words"),
    [
        (int, (1,), "0", ["a whole number", "at least 1"]),
        (int, (1, 5), "1.5", ["a whole number", "at least 1", "at most 5"]),
        (float, (0, 1, True, True), "1", ["a number", "above 0", "below 1"]),
        (float, (), "nan", ["a number"]),
        (float, (), "inf", ["a number"]),
        (float, (0,), "-1", ["a number", "at least 0"]),
    ],
)
def test_a_number_out_of_range_is_told_its_range(kind, limits, bad, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(kind, *limits)(bad)
    message = str(caught.value)
    assert all(word in message for word in [*words, f", not {bad!r}"])
    assert not re.search(r" ,|  ", message)


# --help


@pytest.fixture
def help_text(parsed, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    out, err = capsys.readouterr()
    assert (stop.value.code, err) == (0, "")
    return out


def entries(help_text: str) -> dict[str, str]:
    """Flag -> its explanation, all lines of it joined by newlines."""
    typed = r"--(\w+)(?: \S+?)?(?:, --[\w-]+(?: \S+)?)?"
    found = re.findall(rf"^  {typed}\s{{2,}}(\S.*(?:\n {{8,}}\S.*)*)$", help_text, re.MULTILINE)
    return {name: re.sub(r"\n +", "\n", text) for name, text in found}


def test_help_explains_every_flag_in_one_line(help_text):
    explained = entries(help_text)
    assert explained.keys() == {*NAMES, "rate_flag"}
    for name, text in explained.items():
        assert "\n" not in text, name
        assert len(text.split()) > 1, name


@pytest.mark.parametrize("name", NAMES)
def test_help_names_the_default(help_text, name):
    text = entries(help_text)[name]
    if name in ("data_path", "weights", "resume", "evaluate", "report", "run"):
        assert "default" not in text
        return
    default = VALUES[name][0] if name in VALUES else {True: "yes", False: "no"}.get(SWITCHES[name])
    said = {"v_reset": "none"}.get(name, "" if default is None else str(default))
    assert f"(default: {said}" in text
    assert text.endswith(")")
    assert text.count("(default") == 1


def test_help_is_grouped(help_text):
    titles = [f"\n{title}:\n  {text}\n" for title, text in GROUPS.items()]
    assert [help_text.find(title) for title in titles] == sorted(help_text.find(title) for title in titles)
    assert all(help_text.count(title) == 1 for title in titles)
    assert "What it does." in help_text
    sections = re.split(r"\n(?=\w+:\n)", help_text)
    of = {name: section.split(":")[0] for section in sections for name in entries(section)}
    for group, names in {
        "data": "dataset data_path num_workers image_size auto_aug cutout",
        "network": "arch T step_mode neuron surrogate alpha decay thresh v_reset detach_reset",
        "method": "method rate_flag windows rate_loss_scale sltt_steps",
        "optimization": "num_epoch train_batch_size val_batch_size optim lr momentum wd scheduler early_stop "
        "lr_warmup_epochs label_smoothing mixup_alpha cutmix_alpha clip_grad_norm model_ema model_ema_decay weights",
        "run": "seed device log_path resume evaluate report",
    }.items():
        assert {of[name] for name in names.split()} == {group}


def test_help_lists_the_known_names(help_text):
    for name in ("resnet18", "resnet19", "vggsnn_cifar", "vggsnn_dvs", "vgg11", "vgg13", "CIFAR10", "CIFAR100", "MNIST",
                 "DIGITS", "SGD", "cosine"):  # fmt: skip
        assert re.search(rf"\b{name}\b", help_text), name


# The options reach the network


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"tau": 1.25, "v_threshold": 1.0, "v_reset": None, "detach_reset": True}),
        (["--decay", "0.5"], {"tau": 2.0}),
        (["--thresh", "0.75"], {"v_threshold": 0.75}),
        (["--v_reset", "-0.5"], {"v_reset": -0.5}),
        (["--v_reset", "0"], {"v_reset": 0.0}),
        (["--no-detach_reset"], {"detach_reset": False}),
        (["--detach_reset"], {"detach_reset": True}),
        (["--neuron", "plif"], {"__class__": neuron.ParametricLIFNode}),
        (["--neuron", "if"], {"__class__": neuron.IFNode}),
        (["--surrogate", "atan"], {"surrogate_function.__class__": surrogate.ATan, "surrogate_function.alpha": 2.0}),
        (["--alpha", "3"], {"surrogate_function.__class__": surrogate.Sigmoid, "surrogate_function.alpha": 3.0}),
    ],
)
def test_neuron_flags_reach_every_neuron(parsed, argv, expected):
    options, _ = parsed("--arch", "vggsnn_cifar", "--train_batch_size", "4", *argv)
    images = TensorDataset(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    net = build_network(options, LoadedData(images, images, num_classes=7, options={}))
    nodes = [module for module in net.modules() if isinstance(module, neuron.BaseNode)]
    assert len(nodes) == 8
    for node in nodes:
        assert {name: operator.attrgetter(name)(node) for name in expected} == pytest.approx(expected)
    assert net.classifier.out_features == 7


def test_a_gpu_by_number_becomes_the_current_one(monkeypatch):
    zeros, chosen = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device("cuda") == torch.device("cuda")
    assert chosen == [torch.device("cuda:1")]


def test_what_a_continued_run_may_change_stands_with_each_option(options_class):
    new = {"device", "cuda_graph"}
    assert names_where(options_class, "resume", "new") == new
    free = {"data_path", "num_workers", "val_batch_size", "save_every", "early_stop"}
    assert names_where(options_class, "resume", "free") == free
    assert names_where(options_class, "resume", "fixed") == set(NAMES) - free - new


def test_what_makes_another_test_of_a_checkpoint_stands_with_each_option(options_class):
    network_and_data = {"arch", "dataset", "image_size", "neuron", "surrogate", "alpha", "decay", "thresh",
                        "v_reset"}  # fmt: skip
    assert names_where(options_class, "evaluate", "fixed") == network_and_data
    training = {"val_split", "num_epoch", "optim", "lr", "momentum", "early_stop", "wd", "scheduler",
                "rate_loss_scale", "save_every", "lr_warmup_epochs",
                "label_smoothing", "mixup_alpha", "cutmix_alpha", "clip_grad_norm", "model_ema", "model_ema_decay",
                "weights", "grad_accum", "sync_bn", "run", "windows", "sltt_steps", "tet_weight",
                "rate_penalty", "distill", "distill_ce", "distill_kl"}  # fmt: skip
    assert names_where(options_class, "evaluate", "idle") == training


@pytest.mark.parametrize(("size", "said"), [(8, True), (32, False)])
def test_images_smaller_than_the_networks_stride_are_told_of(caplog, size, said):
    options, _ = parse(image_options(), None, ["--arch", "sew_resnet34", "--train_batch_size", "8"])
    samples = TensorDataset(torch.zeros(1, 1, size, size), torch.zeros(1))
    with caplog.at_level("INFO"):
        build_network(options, LoadedData(samples, samples, 10, {}))
    assert ("shrinks 8x8 inputs to one pixel" in caplog.text) == ("--image_size of 32" in caplog.text) == said


def nested(levels: int) -> list:
    return [nested(levels - 1)] if levels else []


@pytest.mark.parametrize(
    "value", [10**5000, nested(400), float("nan"), None, True, {}, "4"], ids=lambda x: type(x).__name__
)
def test_a_configuration_in_a_file_holds_only_what_the_command_line_could_have_given(value):
    assert valid_config(TrainOptions, {"T": 4})
    assert not valid_config(TrainOptions, {"T": value})


BEFORE_TORCH = """
import importlib.abc, os, runpy, sys
class AtTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *more):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            os._exit(0)
sys.meta_path.insert(0, AtTorch())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", sorted((ROOT / "experiment").glob("*/main.py")), ids=lambda path: path.parent.name)
@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(script, given):
    """Set before torch is loaded: OpenMP reads it once."""
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = others if given is None else {**others, "OMP_WAIT_POLICY": given}
    _, out, err = finish(start_python("-c", BEFORE_TORCH, script, env=environment))
    assert out.split() == [given or "PASSIVE"], err


def test_the_page_of_options_is_what_help_says(capsys):
    said = {}
    for name in options_page.SCRIPTS:
        run_here("--help", script=options_page.ROOT / "experiment" / name / "main.py")
        said[name] = capsys.readouterr().out
    assert options_page.PAGE.read_text() == options_page.page(said)
