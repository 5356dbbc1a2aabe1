"""experiment/example: each runs, and learns."""

import os
import re
import runpy
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from tests.processes import finish, start_python

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "experiment" / "example"


def last_accuracy(said: str) -> float:
    return float(re.findall(r"epoch 3: test accuracy ([\d.]+)%", said)[0])


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example by name, with `rate_backprop` as pip installs it; what it printed."""
    monkeypatch.setitem(sys.modules, "rate_backprop", import_module("util.rate"))

    def named(name: str) -> str:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return named


def test_a_plain_loop(run):
    assert last_accuracy(run("loop")) > 85


@pytest.mark.skipif(not util.find_spec("pytorch_lightning"), reason="no Lightning here")
def test_lightning(run):
    assert last_accuracy(run("lightning_loop")) > 85


def test_membrane_readouts(run):
    errors = re.findall(r": .* ([\d.]+)$", run("readout"), re.MULTILINE)
    assert float(errors[0]) < 0.05  # predicting the mean: 0.17
    assert float(errors[1]) < 0.12  # predicting the mean: 0.23


@pytest.mark.slow
def test_two_processes(tmp_path):
    (tmp_path / "rate_backprop").symlink_to(ROOT / "util" / "rate")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", EXAMPLES / "ddp.py")
    status, out, err = finish(start_python(*command, env={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert status == 0, err
    assert last_accuracy(out) > 85


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(example):
    assert len(example.read_text().splitlines()) < 60
