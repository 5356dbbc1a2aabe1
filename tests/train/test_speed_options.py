"""--amp, --channels_last and --compile: what they change, and that it is not the result."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from tests.experiment.script_helpers import PAIRS, image_options, load, metrics, only_run, run_here, tiny, tiny_networks
from util.rate import compiled
from util.rate.function import Linearised
from util.train.method import Bptt, Method, Precision, Rate
from util.train.options import parse
from util.train.setup import set_backends

CPU = torch.device("cpu")


@pytest.fixture
def eligibilities(monkeypatch) -> list[Tensor]:
    """Those that neurons hand to `Linearised` from now on."""
    seen, apply = [], Linearised.apply
    monkeypatch.setattr(Linearised, "apply", lambda *args: seen.append(args[1][0]) or apply(*args))
    return seen


@pytest.mark.parametrize(("method", "step_mode"), PAIRS)
def test_with_bf16_layers_compute_in_it_and_neurons_in_float32(method, step_mode, eligibilities):
    net, dtypes = tiny(), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, args, out, name=name: dtypes.update({name: out.dtype}))
    training, precision = (Rate if method == "rate" else Bptt)(3, step_mode), Precision("bf16", CPU)
    training.attach(net)
    precision.attach(net)
    torch.manual_seed(0)
    with precision.autocast():
        loss = F.cross_entropy(training.forward(net.train(), torch.randn(4, 3, 8, 8)), torch.arange(4))
    training.backward(loss)
    assert set(dtypes.values()) == {torch.bfloat16}
    assert len(eligibilities) == (2 if method == "rate" else 0)
    assert all(e.dtype == torch.float32 for e in eligibilities)
    assert {m.v.dtype for m in net.modules() if isinstance(m, neuron.BaseNode)} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in net.parameters())


def test_outputs_in_bfloat16_are_averaged_over_many_steps_in_float32():
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    assert Bptt(300, "s").forward(nn.Identity(), x).item() == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[..., Path]:
    """(step mode, flags) -> the run directory of an epoch."""

    @cache
    def train(step_mode: str, *flags: str) -> Path:
        log = tmp_path_factory.mktemp("log")
        common = ["--rate_flag", "--step_mode", step_mode, "--T", "2", "--num_epoch", "1", "--log_path", log]
        with tiny_networks("resnet18"):
            assert run_here("--dataset", "DIGITS", *common, *flags) == 0
        return only_run(log)

    return train


@pytest.fixture
def traced(monkeypatch) -> list[Callable]:
    """What is compiled from now on; it is traced, but no C++ compiler is waited for: test_compiled.py has one."""
    functions: list[Callable] = []

    @cache
    def compiled_by_torch(function: Callable) -> Callable:
        functions.append(function)
        return torch.compile(function, dynamic=True, backend="aot_eager")

    monkeypatch.setattr(compiled, "_compiled", compiled_by_torch)
    return functions


@pytest.mark.parametrize(
    ("flag", "step_mode"),
    [("--amp=bf16", "s"), ("--channels_last", "s"), pytest.param("--compile", "m", marks=pytest.mark.slow)],
    ids=["amp", "channels_last", "compile"],
)
def test_the_script_learns_the_same_with_it(trained, traced, flag, step_mode):
    """The loss of an epoch, up to what rounding does to spikes: within 2 %."""
    without, loss = (metrics(trained(step_mode, *flags))[0]["train_loss"] for flags in ([], [flag]))
    assert without < 2.2  # of 2.3 where nothing is learned
    assert loss == pytest.approx(without, rel=0.02)
    assert bool(traced) == (flag == "--compile")


@pytest.mark.parametrize("flags", [[], ["--channels_last"]], ids=["without", "with"])
def test_channels_last_is_the_layout_of_weights(trained, flags):
    """Which decides that of what convolutions put out."""
    weight = load(trained("s", *flags) / "last.pth")["model"]["features.3.weight"]  # [32, 16, 3, 3]
    assert weight.is_contiguous(memory_format=torch.channels_last) == bool(flags)


@pytest.fixture
def backends(monkeypatch):
    """What PyTorch is set to is put back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cublas.allow_tf32, cudnn.allow_tf32
    yield
    cublas.allow_tf32, cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("flags", "tf32", "deterministic"), [([], True, False), (["--no-tf32", "--deterministic"], False, True)]
)
def test_tf32_and_deterministic_are_set_for_the_process(backends, flags, tf32, deterministic):
    set_backends(parse(image_options(), "", flags)[0])
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    assert torch.are_deterministic_algorithms_enabled() is deterministic


def test_a_layer_that_is_never_deterministic_is_one_line(backends, tmp_path, monkeypatch, capfd):
    def fails(method, loss):
        raise RuntimeError("a_backward_cuda does not have a deterministic implementation, but you set what asks for it")

    monkeypatch.setattr(Method, "backward", fails)
    with tiny_networks("resnet18"):
        assert run_here("--dataset", "DIGITS", "--deterministic", "--num_epoch", "1", "--log_path", tmp_path) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "a_backward_cuda" in line
    assert line.endswith("without --deterministic")
