"""bfloat16 keeps 8 bits: what is summed over time must be wider."""

import copy

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer, neuron
from torch import nn

from tests.rate.method_helpers import MODES, images, labels, lif_node, mean_output, outputs
from util.rate.function import Linearised, LinearRate
from util.util import rate_model_setting


def rate_pass_values(function: type, monkeypatch) -> list:
    """The values that the rate pass gives to the outputs of this kind of layer, as they come."""
    values, forward = [], function.forward

    def kept(*args):
        values.append(forward(*args))
        return values[-1]

    monkeypatch.setattr(function, "forward", staticmethod(kept))
    return values


@pytest.mark.parametrize("mode", MODES)
def test_spikes_are_counted_beyond_256_in_bfloat16(mode, monkeypatch):
    net = nn.Sequential(layer.Linear(2, 2), neuron.IFNode(v_reset=None, detach_reset=True))
    nn.init.zeros_(net[0].weight)
    nn.init.ones_(net[0].bias)  # every neuron fires at every step
    rates = rate_pass_values(Linearised, monkeypatch)
    rate_model_setting(net, 400, mode)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        outputs(net, torch.zeros(400, 1, 2), mode)
    rate, *_ = rates
    assert rate.dtype == torch.bfloat16
    assert rate.flatten().tolist() == [1, 1]


@pytest.mark.parametrize("mode", MODES)
def test_a_linear_layer_s_value_in_bfloat16_does_not_drift_with_time(mode, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(8, 8), lif_node())
    x, values = torch.randn(1, 3, 8).expand(300, 3, 8), rate_pass_values(LinearRate, monkeypatch)
    rate_model_setting(net, 300, mode)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        outputs(net, x, mode)
        expected = F.linear(x[0], net[0].weight, net[0].bias)  # the same at every step
    assert values[0].dtype == torch.bfloat16
    torch.testing.assert_close(values[0].view_as(expected), expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("make", [lambda: layer.BatchNorm2d(4), lambda: layer.GroupNorm(2, 4), lambda: nn.Identity()])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_of_bfloat16_alone_gets_gradients_near_those_of_float32(mode, make):
    """Its sums over time, of inputs, statistics and gradients of the outputs, are wider than the network."""
    torch.manual_seed(0)
    net = nn.Sequential(layer.Conv2d(2, 4, 3), make(), lif_node(), layer.Flatten(), layer.Linear(64, 5))
    net, x, found = net.bfloat16(), images(1)[0].bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        trained = rate_model_setting(copy.deepcopy(net).to(dtype), 300, mode)
        out = mean_output(trained, x.to(dtype).expand(300, *x.shape), mode)
        assert out.dtype == dtype
        F.cross_entropy(out, labels()).backward()
        found.append(torch.cat([p.grad.flatten().float() for p in trained.parameters()]))
    assert F.cosine_similarity(*found, dim=0) > 0.9
    assert found[0].norm().item() == pytest.approx(found[1].norm().item(), rel=0.1)
