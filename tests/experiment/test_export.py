"""The blocks of doc/guide/export.md, run one after the other."""

import re
from pathlib import Path

import pytest
import torch

from tests.experiment.script_helpers import only_run, run_here, tiny_networks

PAGE = Path(__file__).resolve().parents[2] / "doc" / "guide" / "export.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict:
    """What the blocks know: the run, and then what the first block makes of it."""
    root = tmp_path_factory.mktemp("export")
    few = [
        "--dataset",
        "DIGITS",
        "--arch",
        "vgg11",
        "--T",
        "4",
        "--num_epoch",
        "1",
        "--rate_flag",
        "--surrogate",
        "atan",
        "--alpha",
        "3",
    ]
    with tiny_networks("vgg11"):
        assert run_here(*few, "--log_path", root / "log") == 0
    names = {"run": str(only_run(root / "log"))}
    with tiny_networks("vgg11"):
        exec(block("Weights in plain"), names)
    return names


def block(title: str) -> str:
    """The code under a heading that begins with ``title``."""
    return re.search(rf"^## {title}.*?```python\n(.*?)```", PAGE.read_text(), re.M | re.S)[1]


@pytest.fixture
def exported(names, tmp_path, monkeypatch) -> dict:
    if not hasattr(torch.export, "load") or torch.__version__ < "2.6":
        pytest.skip("an older torch.export")
    monkeypatch.chdir(tmp_path)
    with tiny_networks("vgg11"):
        exec(block("torch.export"), names)
    return names


def test_the_weights_load_into_the_network_without_hooks(names):
    assert names["classes"] == [str(digit) for digit in range(10)]
    assert names["net"](torch.rand(1, 1, 8, 8)).shape == (1, 10)
    fired = names["net"].features[2].surrogate_function
    assert (type(fired).__name__, fired.alpha) == ("ATan", 3.0)


def test_the_exported_program_serves_other_batches(exported):
    x = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(torch.export.load("network.pt2").module()(x), exported["averaged"](x))


@pytest.mark.slow
def test_onnx_agrees(exported):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    exec(block("ONNX"), exported)
    x = torch.rand(5, 1, 8, 8)
    session = reference.ReferenceEvaluator("network.onnx")
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), exported["averaged"](x), atol=1e-4, rtol=0)
