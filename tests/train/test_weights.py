"""Weights to start from: of this project's checkpoints and of other code's files."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tests.experiment.script_helpers import same, tiny
from util.errors import UserError
from util.train import checkpoint
from util.train.weights import start_from


def save(path: Path, content: Any) -> Path:
    if isinstance(content, dict) and "format" in content:
        path.write_bytes(checkpoint.encode(content))
    else:
        torch.save(content, path)
    return path


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {name.replace(old, new, 1): value for name, value in weights.items()}


def lightning(weights: dict[str, Tensor]) -> dict[str, Any]:
    inside = {f"model.{name}": value for name, value in weights.items()}
    return {"state_dict": {"loss.weight": torch.ones(10), **inside}, "global_step": 3}


FILES = {
    "a state_dict": lambda weights: weights,
    "a checkpoint": lambda weights: {"format": checkpoint.FORMAT, "config": {}, "model": weights},
    "a run of other code": lambda weights: {"epoch": 3, "state_dict": weights},
    "PyTorch's tutorial": lambda weights: {"epoch": 3, "model_state_dict": weights},
    "DataParallel": renamed("", "module."),
    "torch.compile": renamed("", "_orig_mod."),
    "DDP of torch.compile": renamed("", "module._orig_mod."),
    "torch.compile of a part": renamed("features.", "features._orig_mod."),
    "Lightning, with a loss's own": lightning,
    "an average of weights": lambda weights: AveragedModel(network_with(weights)).state_dict(),
}


def network_with(weights: dict[str, Tensor]) -> torch.nn.Module:
    net = tiny()
    net.load_state_dict(weights)
    return net


@pytest.mark.parametrize("kind", FILES)
def test_a_network_starts_from_the_weights_of(tmp_path, kind):
    torch.manual_seed(1)
    source, net = tiny(), tiny()
    start_from(net, save(tmp_path / "weights.pth", FILES[kind](source.state_dict())))
    assert same(dict(net.state_dict()), dict(source.state_dict()))


def test_a_safetensors_file_is_read_where_the_package_is_there(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    source, net = tiny(), tiny()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    start_from(net, tmp_path / "weights.safetensors")
    assert same(dict(net.state_dict()), dict(source.state_dict()))
    (tmp_path / "weights.safetensors").write_bytes(b"text")
    with pytest.raises(UserError, match="is no safetensors file"):
        start_from(net, tmp_path / "weights.safetensors")


def test_without_the_package_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").write_bytes(bytes(16))
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        start_from(tiny(), tmp_path / "weights.safetensors")


def test_what_stood_beside_the_network_is_named(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        start_from(tiny(), save(tmp_path / "weights.pth", lightning(tiny().state_dict())))
    assert "not of this network: loss.weight" in caplog.text


def test_a_classifier_of_another_size_stays_new_and_is_named(tmp_path, caplog):
    torch.manual_seed(1)
    source, net = tiny(num_classes=100), tiny(num_classes=10)
    new = {name: value.clone() for name, value in net.state_dict().items()}
    with caplog.at_level(logging.INFO):
        start_from(net, save(tmp_path / "weights.pth", source.state_dict()))
    said = "classifier.bias of shape [100], classifier.weight of shape [100, 128]: left new"
    assert said in caplog.text
    for name, value in net.state_dict().items():
        assert torch.equal(value, (new if name.startswith("classifier") else source.state_dict())[name]), name


def test_where_a_run_has_no_best_weights_yet_its_last_checkpoint_is_named(tmp_path):
    checkpoint.save(tmp_path / "last.pth", config={}, model={})
    with pytest.raises(UserError, match=r"no checkpoint at .*model_weights.pth; .* use --weights .*last\.pth"):
        start_from(tiny(), checkpoint.best_of(str(tmp_path)))


def with_more(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**weights, "attention.weight": torch.ones(1)}


def two_networks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**renamed("", "student.")(weights), **renamed("", "teacher.")(weights)}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda _: tiny(in_channel=1).state_dict(), "size mismatch for features.0.weight"),
        (lambda _: tiny(neuron="plif").state_dict(), r"the network lacks features.2.w, features.5.w$"),
        (with_more, "the network lacks attention.weight"),
        (two_networks, r"lacks features.0.weight, features.1.weight, .* \(\d+ in all\); .* student.features.0.weight"),
        (lambda weights: {"meta": {}, "params": weights}, "no weights: .* 'model_state_dict', and holds meta, params"),
        (lambda weights: {"model": weights, "args": argparse.Namespace(lr=1)}, "holds argparse.Namespace.* torch.save"),
    ],
    ids=["grey images", "other neurons", "a further layer", "two networks", "another key", "a Namespace"],
)  # fmt: skip
def test_others_are_refused_with_what_differs(tmp_path, form, said):
    with pytest.raises(UserError, match=said):
        start_from(tiny(), save(tmp_path / "weights.pth", form(tiny().state_dict())))
