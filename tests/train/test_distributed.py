"""Training in two processes (gloo, on a CPU): what one process computes, and what is left behind."""

import json
import os
import pickle
import re
import signal
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import nn
from torch.distributed import run
from torch.utils.data import TensorDataset

from tests.experiment.script_helpers import (
    check_continued,
    load,
    metrics,
    only_run,
    run_here,
    same,
    tiny_networks,
    unmeasured,
)
from tests.processes import finish, start_python
from tests.rate.method_helpers import attached, images, labels, tiny_net
from tests.rate.method_helpers import train_step as train_step_of
from tests.train import two_processes
from tests.train.test_interrupts import command
from tests.train.two_processes import STEPS, WRAPPED, distilled, epoch, train_step
from util.train.batches import BatchOrder, data_loaders
from util.train.distributed import ONE_PROCESS, Processes
from util.train.options import TrainOptions
from util.util import sync_batch_norm


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def results(directory):
    """What each of two processes made of everything that is asked of them below, in one start."""
    return two_processes.start(directory)


def assert_near(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("step", STEPS, ids=" ".join)
def test_gradients_and_running_statistics_are_those_of_one_process(results, step):
    """float64; 2 and 3 of 5 samples; BatchNorm synchronised."""
    expected = train_step(*step)
    assert all(value.abs().max() > 0 for name, value in expected.items() if "conv1.bias" not in name)
    for result in results:
        assert_near(result[step], expected)


@pytest.mark.parametrize("name", WRAPPED)
def test_distributed_data_parallel_serves_the_hooks_however_it_wraps_them(results, name):
    for result in results:
        assert_near(result["wrapped"][name], train_step("rate", "s", "frames"))


@pytest.mark.parametrize("parts", [1, 2])
def test_an_epoch_of_the_engine_gives_and_measures_what_it_does_in_one_process(results, parts):
    """Weights, running statistics, loss, accuracies and firing rates of training and test; the last batch is uneven."""
    expected = epoch(ONE_PROCESS, parts)
    for result in results:
        assert_near(result["epochs"][parts], expected)


def test_self_distillation_gives_what_it_does_in_one_process(results):
    expected = distilled(ONE_PROCESS)
    for result in results:
        assert_near(result["distilled"], expected)


# Batches


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("mix", [None, lambda x, y: (x + torch.rand(()) * x.roll(1, 0), y + y.roll(1, 0))])
def test_the_processes_batches_are_one_process_batch_shared(processes, mix, parts):
    """Order, augmentation and mixing included; with 8 processes some get nothing of the last batch, of 6."""

    def batches(rank: int, size: int) -> list[tuple[list[range], list[torch.Tensor]]]:
        samples = Augmented(torch.arange(30.0).view(30, 1), torch.arange(30))
        loader, _ = data_loaders(samples, samples, 24, 8, 0, "cpu", 3, Processes(rank, size), parts, mix=mix)
        loader.sampler.start_at(2)
        shares = [loader.sampler.shares(step) for step in range(len(loader))]
        return list(zip(shares, loader, strict=True))

    whole = batches(0, 1)
    of_all = [batches(rank, processes) for rank in range(processes)]
    for step, (parts_of_one, expected) in enumerate(whole):
        for part in range(len(parts_of_one)):
            assert [i for own in of_all for i in own[step][0][part]] == list(parts_of_one[part])
        for own in of_all:
            positions = [i for part in own[step][0] for i in part]
            for x, y in zip(own[step][1], expected, strict=True):
                assert torch.equal(x, y[positions])


class Augmented(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


def test_without_synchronisation_no_process_is_left_with_one_sample():
    assert [len(BatchOrder(size, 16, 0, Processes(0, 4), least=8)) for size in (39, 40)] == [2, 3]


# The script


def last_lines(done: tuple[int, str, str]) -> str:
    return done[1].splitlines()[-1]


def test_one_process_speaks_and_writes(results, directory):
    first, second = (result["scripts"] for result in results)
    assert {name: (out, err) for name, (_, out, err) in second.items()} == dict.fromkeys(first, ("", ""))
    assert {name: status for name, (status, *_) in first.items()} == {name: s for name, (s, *_) in second.items()}
    assert [row["epoch"] for row in metrics(directory / "whole")] == [1, 2, 3]
    assert (directory / "whole" / "train.log").read_text().count("epoch 3/3") == 1
    assert first["whole"][0] == 0


def test_a_named_run_that_is_there_is_continued(results):
    status, out, _ = results[0]["scripts"]["again"]
    assert status == 0
    assert "all 3 epochs are done" in out


def test_a_test_counts_each_sample_once(results, directory, capsys):
    """As one process does, printed and in the report: 5 samples, of which the two processes test 3 and 2."""
    assert run_one("--evaluate", directory / "whole", "--report", directory / "report_of_one.json") == 0
    assert capsys.readouterr().out == results[0]["scripts"]["tested"][1]
    two, one = (json.loads((directory / name).read_text()) for name in ("report.json", "report_of_one.json"))
    assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-6)
    assert two == one


def test_the_scaling_benchmark_counts_the_bytes_that_it_computes(results):
    """For both methods in both step modes: gradients, and statistics forward and back."""
    status, out, _ = results[0]["scripts"]["compared"]
    rows = [line.strip("| ").split(" | ") for line in out.splitlines()[2:]]
    assert status == 0
    assert [name for name, *_ in rows] == ["BPTT, m", "BPTT, s", "rate-based, m", "rate-based, s"]
    for _, _, _, _, *counted in rows:
        for cell in counted:
            assert re.fullmatch(r"(\d+\.\d) \(\1\)", cell), rows
            assert cell > "0.1"


def test_batch_norm_of_all_samples_is_the_default_and_can_be_switched_off(results, directory):
    weights = {name: load(directory / name / "last.pth")["model"] for name in ("whole", "synchronised", "apart")}
    assert same(weights["synchronised"], weights["whole"])
    assert not same(weights["apart"], weights["whole"])


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_they_continue_exactly(results, directory):
    status, out, _ = results[0]["scripts"]["stopped"]
    assert status == 143
    said, named = out.splitlines()[-2:]
    assert said == "SIGTERM after step 2 of epoch 2, which is saved"
    assert "torchrun --nproc_per_node 2 " in named
    assert results[0]["scripts"]["continued"][0] == 0
    check_continued(only_run(directory / "stopped"), directory / "whole", 3)


def test_a_run_of_two_processes_continues_with_one(results, directory):
    run = only_run(directory / "left")
    assert run_one("--resume", run) == 0
    of_one, of_two = (metrics(place) for place in (run, directory / "whole"))
    assert unmeasured(of_one[:1]) == unmeasured(of_two[:1])
    for a, b in zip(of_one, of_two, strict=True):  # float32: sums in another order, and now and then another spike
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=0.02)
        assert a["lr"] == b["lr"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("odd", "--train_batch_size 9 cannot be divided by 2 processes: use 8 or 10"),
        ("sample", "sample 7 is bad"),
        ("number", "the training loss is nan at step 2 of epoch 2"),
    ],
)
def test_what_one_process_meets_ends_all_with_one_line(results, name, words):
    """Of the second process alone, but for the first row; the run stays."""
    for result in results:
        assert result["scripts"][name][0] == 2
    (line,) = results[0]["scripts"][name][2].splitlines()
    assert words in line


# torchrun


def torchrun(dies: str, *argv: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of two processes, of which those die that ``dies`` names: see tiny_main.py."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
    return finish(start_python(*start, "tests/train/tiny_main.py", *argv, env={**os.environ, "DIES": dies}))


def test_torchrun_hands_every_flag_on():
    """Its own parser complains of what is the beginning of two of its flags."""
    for f in fields(TrainOptions):
        flag = f"--{f.metadata['alias'] or f.name}"
        assert run.parse_args(["--standalone", "main.py", flag]).training_script_args == [flag]


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.4", reason="its torchrun may close the rendezvous where it should restart")
def test_torchrun_restarts_a_run_of_which_a_process_was_killed_and_it_ends_as_if_nothing_had_been(results, directory):
    argv = [*command(directory / "data"), "--log_path", directory, "--run_name", "restarted"]
    status, out, err = torchrun("1", *argv)
    assert status == 0, err
    assert "continuing after epoch 1" in out
    assert "Traceback (most recent call last)" not in err
    check_continued(directory / "restarted", directory / "whole", 3)


@pytest.mark.skipif(torch.__version__ >= "2.4", reason="the test above has started torchrun")
def test_a_run_whose_processes_were_all_killed_continues_with_one(directory, results):
    argv = [*command(directory / "data"), "--log_path", directory / "killed", "--save_every", "1"]
    status, *_ = torchrun("0 1", *argv)
    assert status == -signal.SIGKILL
    run = only_run(directory / "killed")
    last = load(run / "last.pth")
    assert (len(last["logged"]), last["step"]) == (1, 1)
    assert run_one("--resume", run) == 0
    assert [row["epoch"] for row in metrics(run)] == [1, 2, 3]


def run_one(*argv) -> int:
    with tiny_networks("vgg11"):
        return run_here(*argv)


# sync_batch_norm


def test_what_no_rule_synchronises_is_an_error_that_names_it():
    net = nn.Sequential(layer.BatchNorm2d(2), layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 2))
    with pytest.raises(TypeError, match=r"'1' is a ThresholdDependentBatchNorm2d.*use BatchNorm1d"):
        sync_batch_norm(net)
    assert type(net[0]) is layer.BatchNorm2d


def test_a_synchronised_network_in_one_process_is_the_network_that_it_was():
    plain, net = tiny_net(), sync_batch_norm(tiny_net())
    assert net.state_dict().keys() == plain.state_dict().keys()
    for method in ("bptt", "rate"):
        steps = [train_step_of(attached(x, method, 3, "m"), images(3), labels(), "m") for x in (plain, net)]
        for a, b in zip(steps[0].grads.values(), steps[1].grads.values(), strict=True):
            assert torch.equal(a, b)
    assert isinstance(pickle.loads(pickle.dumps(net)).bn1, type(net.bn1))
