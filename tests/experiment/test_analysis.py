"""experiment/analysis/main.py: what it measures of runs of two epochs, and of networks whose answer is known."""

import csv
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from spikingjelly.activation_based import layer
from torch import nn

from model.layer import SpikingClassifier, lif
from tests.event_files import random_layout_a
from tests.experiment.script_helpers import ANALYSIS, CIFAR, DVS, load, metrics, only_run, run_here, tiny_networks
from util.analysis import confusion, energy, gradients, rates, shuffle
from util.train import checkpoint
from util.train.method import Bptt, Precision
from util.train.setup import Setup

T = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of each script, rate-based, two epochs."""
    root = tmp_path_factory.mktemp("analysed")
    random_layout_a(root / "frames", time_steps=T, size=8, train=12, test=6)
    flags = ["--arch", "vgg11", "--T", T, "--num_epoch", "2", "--rate_flag", "--num_workers", "0"]
    frames = ["--dataset", "CIFAR10_DVS_Aug", "--frames", "counts", "--data_path", root / "frames"]
    with tiny_networks("vgg11"):
        for script, more in ((CIFAR, ["--dataset", "DIGITS", "--train_batch_size", "128"]), (DVS, frames)):
            log = ["--log_path", root / script.parent.name]
            assert run_here(*flags, *more, *log, script=script) == 0
    return {name: only_run(root / name) for name in ("cifar", "dvs")}


def analyse(command: str, run: Path, out: Path, *flags: str) -> list[dict[str, str]]:
    """The rows of the table; the picture is one."""
    with tiny_networks("vgg11"):
        assert run_here(command, run, "--out", out, *flags, script=ANALYSIS) == 0
    assert (out / f"{command}.png").read_bytes().startswith(b"\x89PNG")
    with open(out / f"{command}.csv", newline="") as file:
        return list(csv.DictReader(file))


needs_counters = pytest.mark.skipif(energy.op_counter is None, reason="this SpikingJelly has no op counters")


@pytest.mark.parametrize("script", ["cifar", "dvs"])
@pytest.mark.parametrize(
    "command", ["gradients", "shuffle", "rates", pytest.param("energy", marks=needs_counters), "confusion"]
)
def test_each_command_writes_a_table_and_a_picture(runs, tmp_path, capfd, script, command):
    rows = analyse(command, runs[script], tmp_path, "--samples", "5")
    out, err = capfd.readouterr()
    assert len(rows) > 1
    assert "| --- |" in out
    assert err == ""


def test_files_go_into_the_run_directory_without_out(runs, capfd):
    with tiny_networks("vgg11"):
        assert run_here("rates", runs["dvs"] / "last.pth", script=ANALYSIS) == 0
    assert {path.name for path in (runs["dvs"] / "analysis").iterdir()} == {"rates.csv", "rates.png"}


def test_where_a_checkpoint_says_that_data_are_nothing_is_made(runs, tmp_path, capfd):
    """It may be a stranger's."""
    content, named = load(runs["dvs"] / "last.pth"), tmp_path / "named"
    content["config"] |= {"dataset": "DIGITS_DVS", "data_path": str(named)}
    checkpoint.save(tmp_path / "weights.pth", **content)
    assert run_here("rates", tmp_path / "weights.pth", script=ANALYSIS) == 2
    assert f"weights.pth says that its data are in {named}" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"weights.pth"}


def test_shuffling_the_last_layer_changes_nothing(runs, tmp_path):
    """Its spikes are only averaged over time."""
    rows = analyse("shuffle", runs["cifar"], tmp_path, "--repeats", "1")
    assert [row["shuffled"] for row in rows] == ["none", "features.2", "features.5", "all"]
    assert float(rows[0]["accuracy"]) == pytest.approx(max(row["val_acc"] for row in metrics(runs["cifar"])), abs=1e-3)
    assert float(rows[2]["change"]) == 0


def test_the_confusion_matrix_has_the_run_s_accuracy(runs, tmp_path):
    rows = analyse("confusion", runs["cifar"], tmp_path)
    right = sum(int(row[f"as {row['class']}"]) for row in rows)
    samples = sum(int(row["samples"]) for row in rows)
    assert 100 * right / samples == pytest.approx(max(row["val_acc"] for row in metrics(runs["cifar"])))


def test_gradients_over_training_repeat_the_run(runs, tmp_path):
    over = analyse("gradients", runs["dvs"], tmp_path / "over", "--samples", "4", "--over_training", "--every", "2")
    last = analyse("gradients", runs["dvs"] / "last.pth", tmp_path / "last", "--samples", "4")
    assert [row["epoch"] for row in over] == ["0"] * 4 + ["2"] * 4
    assert over[4:] == last


def test_a_missing_op_counter_is_one_line(runs, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(energy, "op_counter", None)
    with tiny_networks("vgg11"):
        assert run_here("energy", runs["dvs"], "--out", tmp_path, script=ANALYSIS) == 2
    assert capfd.readouterr().err == (
        "main.py: error: energy needs the op counters of SpikingJelly 2: install a newer spikingjelly\n"
    )


# Of networks whose answer is known


def setup_of(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Setup:
    device, method = torch.device("cpu"), Bptt(T, "m")
    method.attach(net)
    return Setup(None, net, method, Precision("off", device), None, [(x, y)], device, ["a", "b"], None)


@pytest.fixture
def firing() -> nn.Module:
    """Four of the five hidden neurons fire at every step, the last never."""
    hidden = layer.Linear(3, 5)
    nn.init.constant_(hidden.weight, 0.1)
    hidden.bias.data = torch.tensor([9.0, 9, 9, 9, -9])
    return SpikingClassifier(nn.Sequential(hidden, lif()), layer.Linear(5, 2))


def frames(samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, 3] of other numbers at each step, and labels [B]. 5 dimensions are for images."""
    torch.manual_seed(0)
    return torch.rand(samples, T, 3), torch.arange(samples) % 2


def test_rates_are_spikes_per_neuron_at_each_step(firing):
    rows = rates.measure(setup_of(firing, *frames()))
    assert rows == [{"layer": "features.1", "step": t, "rate": pytest.approx(0.8)} for t in (1, 2, 3)]


@needs_counters
def test_operations_are_counted_per_sample(firing):
    rows = {row["layer"]: row for row in energy.measure(setup_of(firing, *frames()))}
    counts = {name: (row["ac"], row["mac"], row["dense_mac"]) for name, row in rows.items()}
    assert counts["features.0"] == (0, T * 15, 15)
    assert counts["classifier"] == (T * 4 * 2, 0, 10)
    assert counts[energy.WEIGHT_LAYERS] == (T * 8, T * 15, 25)
    assert rows[energy.WEIGHT_LAYERS]["energy_mj"] == pytest.approx((T * 8 * 0.9 + T * 15 * 4.6) * 1e-9)


def test_shuffled_layers_put_out_the_same_spikes_in_another_order():
    x = torch.arange(24.0).view(8, 3)
    net = nn.Identity()
    with shuffle.shuffled([net], torch.Generator().manual_seed(0)):
        out = net(x)
    assert not torch.equal(out, x)
    assert torch.equal(out[out[:, 0].argsort()], x)
    assert net(x) is x


def test_counted_has_the_true_class_in_rows():
    counts = confusion.counted(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_the_dropped_term_is_that_of_the_mean_input():
    """Of a linear layer, written out: sum_t delta[t] (x[t] - mean x), over sum_t delta[t] x[t]."""
    torch.manual_seed(0)
    first, spiking, second = layer.Linear(4, 6), lif(thresh=0.3), layer.Linear(6, 2)
    net = nn.Sequential(first, spiking, second).double()
    setup_of(net, *frames())
    x, y = torch.rand(T, 5, 4, dtype=torch.float64), torch.arange(5) % 2
    found = gradients.dropped_terms(net, x, y)

    current = first(x)
    current.retain_grad()
    nn.functional.cross_entropy(second(spiking(current)).mean(0), y).backward()
    delta = current.grad
    dropped = torch.einsum("tbi,tbj->ij", delta, x - x.mean(0))
    assert found["0.weight"] == pytest.approx((dropped.norm() / first.weight.grad.norm()).item(), rel=1e-9)
    assert found["2.weight"] < 1e-12  # delta is the same at every step


def test_a_layer_without_a_gradient_leaves_a_gap_at_its_place(firing):
    net = nn.Sequential(layer.Linear(3, 4), lif(thresh=0.1), layer.Linear(4, 4), lif(thresh=0.1), layer.Linear(4, 2))
    net[2].weight.requires_grad_(False)
    setup_of(net, *frames())
    rows = gradients.compare_layers(net, torch.rand(T, 6, 3), torch.arange(6) % 2)
    assert [row["parameter"] for row in rows] == ["", "0.weight", "2.weight", "4.weight"]
    assert rows[2]["cosine"] is None
    figure, axes = pyplot.subplots()
    gradients.draw_layers(axes, rows, "cosine")
    drawn = axes.lines[0].get_ydata()
    pyplot.close(figure)
    assert [value == value for value in drawn] == [True, False, True]
