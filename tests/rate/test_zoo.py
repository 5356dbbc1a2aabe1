"""SpikingJelly's own networks train with the two lines of the README, unchanged but for VGG's width."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from tests.rate.method_helpers import assert_same_gradients, images, labels
from tests.rate.zoo import ZOO, make
from util.rate.saved import saved_for_backward
from util.util import bptt_model_setting, rate_model_setting

# One network a kind of block; CI has them all.
PLAIN = {"spiking_resnet18", "sew_resnet18 IAND", "MNISTNet", "spikformer_cifar10"}
CASES = [
    pytest.param(name, mode, id=f"{name}-{mode}", marks=[] if name in PLAIN else pytest.mark.slow)
    for name, zoo in ZOO.items()
    for mode in zoo.modes
]

the_network = lru_cache(maxsize=1)(make)


def run(net: nn.Module, name: str, time_step: int, mode: str) -> Tensor:
    """The time-averaged output [B, classes]; the same masks of dropout each time."""
    zoo = ZOO[name]
    x = images(time_step, 2, zoo.channels, zoo.size)
    functional.reset_net(net)
    torch.manual_seed(3)
    if mode == "s":
        return sum(net(step) for step in x) / time_step
    out = net(x.transpose(0, zoo.time_dim))
    return out.mean(0) if out.dim() == 3 else out


def attach(net: nn.Module, name: str, method: str, time_step: int, mode: str) -> nn.Module:
    if method == "bptt":
        return bptt_model_setting(net, time_step, mode)
    return rate_model_setting(net, time_step, mode, time_dim=ZOO[name].time_dim)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_one_step_gives_bptt_s_gradients(name, mode):
    net, found = the_network(name), {}
    for method in ("bptt", "rate"):
        attach(net, name, method, 1, mode)
        net.zero_grad(set_to_none=True)
        out = run(net, name, 1, mode)
        F.cross_entropy(out, labels(2)).backward()
        found[method] = (out.detach(), {name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(found["rate"][0], found["bptt"][0], rtol=1e-10, atol=1e-10)
    assert_same_gradients(found["rate"][1], found["bptt"][1], 1e-9)
    assert out.std() > 1e-3
    net.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_many_steps_put_out_bptt_s_values_in_the_memory_of_one(name, mode):
    net, kept = the_network(name), {}
    with torch.no_grad():
        expected = run(attach(net, name, "bptt", 3, mode), name, 3, mode)
    for time_step in (3, 1):
        attach(net, name, "rate", time_step, mode)
        with saved_for_backward(net) as count:
            out = run(net, name, time_step, mode)
            kept[time_step] = count()
        if time_step == 3:
            torch.testing.assert_close(out.detach(), expected, rtol=1e-10, atol=1e-10)
    assert kept[3] == kept[1] > 0
