"""What a network may do in its forward, and what is refused because the rate pass cannot follow it."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from tests.method_helpers import images, tiny_net
from util.eligibility import NeuronState, dynamics_of
from util.rate_function import BatchNormRate
from util.util import UnsupportedModuleError, rate_model_setting


def test_the_rate_pass_of_batch_norm_is_the_method_s_formula_also_where_the_mean_input_has_another_mean():
    """As behind a max pool: then the gradient of q(c) through its mean does not vanish."""
    torch.manual_seed(0)
    c = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var, upstream = torch.randn(3).double(), torch.rand(3).double() + 0.5, torch.randn(6, 3, 4, 4).double()

    m = c.mean((0, 2, 3))
    mean_ = (mean + m - m.detach()).view(1, 3, 1, 1)
    q = ((c - mean_) ** 2).mean((0, 2, 3))
    var_ = (var + q - q.detach()).view(1, 3, 1, 1)
    out = weight.view(1, 3, 1, 1) * (c - mean_) / (var_ + 1e-5).sqrt() + bias.view(1, 3, 1, 1)
    expected = torch.autograd.grad(out, (c, weight, bias), upstream)

    found_out = BatchNormRate.apply(c, weight, bias, mean, (var + 1e-5).rsqrt())
    torch.testing.assert_close(found_out, out, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(found_out, (c, weight, bias), upstream)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.5])
@pytest.mark.parametrize("tau", [1.25, 2.0, 3.0])
def test_a_current_that_meets_the_threshold_exactly_fires_as_in_spikingjelly(tau, v_reset, decay_input):
    grid = torch.arange(-10, 41, dtype=torch.float64) / 10
    x = torch.cartesian_prod(grid, grid, grid).T  # [3 steps, currents]
    node = neuron.LIFNode(tau=tau, decay_input=decay_input, v_reset=v_reset)
    with torch.no_grad():
        expected = torch.stack([node(current) for current in x])
    state, spikes = NeuronState.start((torch.full_like(x[0], v_reset or 0.0),)), []
    for current in x:
        state, s = dynamics_of(node).step(state, current)
        spikes.append(s)
    assert torch.equal(torch.stack(spikes), expected)


class Wrapped(nn.Module):
    """A network whose forward is ``function(body, x)``."""

    def __init__(self, function, body=None):
        super().__init__()
        self.body, self.function = body or tiny_net(), function

    def forward(self, x):
        return self.function(self.body, x)


def each_step(body, x):
    return torch.stack([body(step.unsqueeze(0))[0] for step in x])


REFUSED = {
    "sums over time": (lambda body, x: body(x).sum(0), "sums or selects time steps"),
    "sums over time, divided": (lambda body, x: body(x).sum(0) / 4, "sums or selects time steps"),
    "runs step by step": (each_step, "called in a loop over time|time steps where time_step"),
    "draws random numbers": (lambda body, x: body(F.dropout(x)), "random numbers outside of modules"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_that_the_rate_pass_cannot_follow_is_refused(kind):
    function, reason = REFUSED[kind]
    net = rate_model_setting(Wrapped(function), 4, "m")
    with pytest.raises((UnsupportedModuleError, ValueError), match=reason):
        net(images(4))


def test_a_buffer_that_changes_in_every_forward_is_refused_by_name():
    body = tiny_net()
    body.append(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5).double()))
    net = rate_model_setting(body, 4, "m")
    with pytest.raises(UnsupportedModuleError, match="it changes this buffer in every forward"):
        net(images(4))


@pytest.mark.parametrize("mode", ["m", "s"])
def test_integer_inputs_are_averaged_as_numbers(mode):
    """Bytes would wrap around in the sum over time."""
    x = torch.randint(100, 255, (4, 3, 6), dtype=torch.uint8)
    grads = []
    for batch in (x, x.double()):
        torch.manual_seed(0)
        linear = nn.Linear(6, 5) if mode == "s" else layer.Linear(6, 5)
        body = nn.Sequential(linear, neuron.IFNode(), layer.Linear(5, 5)).double()
        net = rate_model_setting(Wrapped(lambda body, x: body(x.double() / 255), body), 4, mode)
        out = net(batch).mean(0) if mode == "m" else sum(net(step) for step in batch) / 4
        out.square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
        functional.reset_net(net)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)
