"""Training in two processes (gloo, on a CPU): what one process computes, and what is left behind."""

import pickle

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import nn

from tests.rate.method_helpers import attached, images, labels, tiny_net
from tests.rate.method_helpers import train_step as train_step_of
from tests.train import two_processes
from tests.train.two_processes import STEPS, WRAPPED, train_step
from util.util import sync_batch_norm


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes made of everything that is asked of them below, in one start."""
    return two_processes.start(tmp_path_factory.mktemp("two") / "store")


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
