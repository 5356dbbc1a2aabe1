"""What a network may do in its forward: served as rates, or as with BPTT; and the little that is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.rate.method_helpers import (
    MODES,
    Wrapped,
    assert_same_gradients,
    assert_served,
    attached,
    between,
    gradients,
    images,
    labels,
    lif_node,
    net_with,
    outputs,
    tiny_net,
    train_step,
)  # fmt: skip
from util.rate.dynamics import dynamics_of
from util.rate.eligibility import NeuronRecord, NeuronState, run_steps
from util.rate.function import BatchNormRate, batch_norm_gradients
from util.rate.problem import NetworkError
from util.util import UnsupportedModuleError, bptt_model_setting, rate_model_setting


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

    found_out = BatchNormRate.apply(c, weight, bias, mean, (var + 1e-5).rsqrt(), batch_norm_gradients)
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
    _, spikes = run_steps(
        dynamics_of(node), NeuronRecord(NeuronState.start((torch.full_like(x[0], v_reset or 0.0),))), x
    )
    assert torch.equal(spikes, expected)


@pytest.mark.parametrize("mode", MODES)
def test_integer_inputs_are_averaged_as_numbers(mode):
    """Bytes would wrap around in the sum over time."""
    x = torch.randint(100, 255, (4, 3, 6), dtype=torch.uint8)
    grads = []
    for batch in (x, x.double()):
        torch.manual_seed(0)
        body = nn.Sequential(layer.Linear(6, 5), neuron.IFNode(), layer.Linear(5, 5)).double()
        net = rate_model_setting(Wrapped(lambda net, x: net.body(x.double() / 255), body), 4, mode)
        outputs(net, batch, mode).mean(0).square().sum().backward()
        grads.append(gradients(body))
    assert_same_gradients(*grads, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["v_reset", "v_threshold"])
def test_a_reset_potential_for_each_channel_and_a_learnable_threshold_get_bptt_s_gradients(name, mode):
    net = tiny_net(lambda: lif_node(v_reset=0.1))  # the soft reset of 0.0.0.0.14 takes no tensors
    channels = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64).view(4, 1, 1)
    setattr(net.fire1, name, channels if name == "v_reset" else nn.Parameter(torch.tensor(0.8, dtype=torch.float64)))
    try:
        train_step(attached(net, "bptt", 1, mode), images(1), labels(), mode)
    except (TypeError, RuntimeError) as error:
        pytest.skip(f"this SpikingJelly takes no tensor there: {error}")
    assert_served(net, images(3), mode)


def test_what_differs_from_step_to_step_in_single_step_mode_must_be_a_tensor():
    net, x = Wrapped(None), images(2)
    net.forward = lambda x, t: net.body(x * (1 + t))
    rate_model_setting(net, 2, "s")(x[0], 0)
    with pytest.raises(RuntimeError, match="got 0 at the first of 2 steps and now 1"):
        net(x[1], 1)


class Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


AGAIN = "'body.fire1' .*called twice in one forward.*attach the network inside the loop"
WITHIN = "inside a torch.autograd.Function"
REFUSED = {
    "called twice": (between(lambda y, net: net.body.fire1(y)), AGAIN),
    "a loop": (lambda net, x: torch.stack([net.body(step.unsqueeze(0)) for step in x]), AGAIN),
    "in an autograd function": (lambda net, x: net.body[3:](Within.apply(net.body[:2](x), net.body.fire1)), WITHIN),
    "reentrant checkpoint": (lambda net, x: checkpoint(net.body, x.requires_grad_(), use_reentrant=True), WITHIN),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_of_which_there_is_no_right_gradient_is_refused(kind):
    function, message = REFUSED[kind]
    with pytest.raises((UnsupportedModuleError, NetworkError), match=message):
        rate_model_setting(Wrapped(function), 4)(images(4))


def checkpointed(net, x):
    return checkpoint(net.body, x, use_reentrant=False)


def test_running_neurons_again_in_backward_is_refused():
    net = rate_model_setting(Wrapped(checkpointed), 2)
    with pytest.raises(UnsupportedModuleError, match=r"run again in backward.*leave out checkpointing"):
        net(images(2)).sum().backward()


def test_checkpointing_does_nothing_in_single_step_mode():
    nets = (Wrapped(function) for function in (checkpointed, lambda net, x: net.body(x)))
    found = [train_step(attached(net, "rate", 2, "s"), images(2), labels(), "s").grads for net in nets]
    assert_same_gradients(*found, 1e-12)


@pytest.mark.parametrize("dropout", [lambda: layer.Dropout(0.4), lambda: nn.Dropout(0.4)])
def test_a_forward_may_begin_with_a_reset(dropout):
    def resets(net, x):
        functional.reset_net(net.body)
        return net.body(x)

    net = Wrapped(resets, net_with(dropout()))
    assert_served(net, images(3))
    with pytest.raises(UnsupportedModuleError, match="resets it in every step"):
        attached(net, "rate", 2, "s")(images(2)[0])


@pytest.mark.parametrize("b", [2, 3])
def test_a_norm_behind_the_time_average_is_an_ordinary_layer(b):
    norm = nn.LayerNorm(5).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    net = Wrapped(lambda net, x: net.body[1](net.body[0](x).mean(0)), nn.Sequential(tiny_net(), norm))
    assert_served(net, images(3, b))
    nets = (attached(net, method, 3, "m") for method in ("bptt", "rate"))
    bptt, rate = (train_step(net, images(3, b), labels(b), "m").grads for net in nets)
    for part in ("body.1.weight", "body.1.bias", "body.0.head.weight"):
        torch.testing.assert_close(rate[part], bptt[part], rtol=1e-10, atol=1e-12)


AUTOCAST = {
    "group norm": lambda: Wrapped(lambda net, x: F.relu(net.body(x)), net_with(layer.GroupNorm(2, 4))),
    "no affine parameters": lambda: nn.Sequential(
        layer.Conv2d(2, 8, 3), layer.BatchNorm2d(8, affine=False), lif_node(), layer.Flatten(), layer.Linear(128, 5)
    ),
    "static_input": lambda: AUTOCAST["no affine parameters"](),
    "compiled": lambda: AUTOCAST["no affine parameters"](),
    **{k.__name__: lambda k=k: net_with(k(v_threshold=0.1)) for k in (neuron.QIFNode, neuron.EIFNode, neuron.KLIFNode)},
}


@pytest.mark.parametrize("kind", AUTOCAST)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_leaves_statistics_in_float32(mode, kind):
    torch.manual_seed(0)
    net, found = AUTOCAST[kind]().float(), []
    x = images(1).float().expand(3, -1, -1, -1, -1)
    chosen = {kind: True} if kind in ("static_input", "compiled") else {}
    for setting, options in ((bptt_model_setting, {}), (rate_model_setting, chosen)):
        trained = setting(copy.deepcopy(net), 3, mode, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = trained(x).mean(0) if mode == "m" else sum(trained(x[0]) for _ in range(3)) / 3
        out.sum().backward()
        found.append((out.detach(), {n: b for n, b in trained.named_buffers() if "1.running" in n}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.05, atol=0.05)  # rounded to bfloat16
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 4, 6), (3, 2, 5, 6, 6)], ids=["no batch", "other channels"])
def test_batch_norm_refuses_what_it_refuses_without_hooks(shape):
    net = nn.Sequential(layer.BatchNorm2d(4, affine=False), lif_node()).double()
    messages = []
    for setting in (bptt_model_setting, rate_model_setting):
        with pytest.raises((ValueError, RuntimeError)) as error:
            setting(net, 3, "m")(torch.rand(shape, dtype=torch.float64))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_batch_norm_may_count_no_batches():
    net = tiny_net()
    net.bn1.num_batches_tracked = None
    assert_served(net, images(3))
