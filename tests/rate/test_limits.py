"""What a network may do in its forward, and what is refused because the rate pass cannot follow it."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from model import MODELS
from tests.rate.method_helpers import (
    assert_same_gradients,
    attached,
    images,
    labels,
    lif_node,
    net_with,
    outputs,
    tiny_net,
    train_step,
)
from util.rate.dynamics import dynamics_of
from util.rate.eligibility import NeuronRecord, NeuronState, run_steps
from util.rate.function import BatchNormRate, batch_norm_gradients
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


class Wrapped(nn.Module):
    """A network whose forward is ``function(body, x)``."""

    def __init__(self, function, body=None):
        super().__init__()
        self.body, self.function = body or tiny_net(), function

    def forward(self, x):
        return self.function(self.body, x)


def each_step(body, x):
    return torch.stack([body(step.unsqueeze(0))[0] for step in x])


def batch_major(body, x):
    """Folds time into the batch the wrong way round, [B * T, ...], in the middle of the network."""
    y = body[:3](x)  # [T, B, C, H, W]
    folded = y.transpose(0, 1).reshape(-1, *y.shape[2:])
    return body[3:](folded.view(len(y), -1, *y.shape[2:]))


def attention_over_time(body, x):
    """Permuting the steps permutes what it puts out: only the mixture itself gives it away."""
    y = body[:3](x)
    flat = y.flatten(1)
    weights = (flat @ flat.T / flat.shape[1]).softmax(-1)
    return body[3:]((weights @ flat).view_as(y)).mean(0)


MIXED = "mixes time steps"
REFUSED = {
    "adds up the steps": (lambda body, x: sum(body(x)), "sums, selects or mixes"),
    "selects the last step": (lambda body, x: body(x)[-1], "sums, selects or mixes"),
    "deviation over time": (lambda body, x: body(x).std(0), "sums, selects or mixes"),
    "accumulates the output": (lambda body, x: body(x).cumsum(0), "sums, selects or mixes"),
    "accumulates the input": (lambda body, x: body(x.cumsum(0)), f"'body.(fire|conv)1'.*{MIXED}"),
    "delays": (lambda body, x: body[3:](body[:3](x).roll(1, 0)), f"'body.(fire|conv)2'.*{MIXED}"),
    "differences": (lambda body, x: body(x - F.pad(x, (0, 0) * 4 + (1, 0))[:-1]), f"'body.(fire|conv)1'.*{MIXED}"),
    "weighs steps": (
        lambda body, x: body(x * torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1, 1)),
        f"'body.(fire|conv)1'.*{MIXED}",
    ),
    "folds time into the batch": (batch_major, f"'body.(fire|conv)2'.*{MIXED}"),
    "attends over time": (attention_over_time, f"'body.(fire|conv)2'.*{MIXED}"),
    "runs step by step": (each_step, "called in a loop over time|time steps where time_step"),
    "adds noise": (
        lambda body, x: body(x + torch.randn_like(x)),
        "randn_like, which draws other numbers at every step",
    ),
}


@pytest.mark.parametrize("static", [False, True], ids=["frames", "static-image"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_that_the_rate_pass_cannot_follow_is_refused(kind, static):
    function, reason = REFUSED[kind]
    net, x = rate_model_setting(Wrapped(function), 4, "m"), images(4)
    with pytest.raises((UnsupportedModuleError, ValueError), match=reason):
        net(x[:1].expand_as(x) if static else x)


SERVED = {
    "mean over time": lambda body, x: body(x).mean(0),
    "sum over time": lambda body, x: body(x).sum(0),
    "sum over time, divided": lambda body, x: body(x).sum(0) / 4,
    "sum over time, divided by its length": lambda body, x: body(x).sum(0) / len(x),
    "log-softmax of a sum": lambda body, x: body(x).sum(0).log_softmax(-1),
    "softmax of the mean": lambda body, x: body(x).mean(0).softmax(-1),
    "time folded into the batch, time first": lambda body, x: body(F.gelu(x.flatten(0, 1)).unflatten(0, (len(x), -1))),
    "centred in space": lambda body, x: body(x - x.mean((-1, -2), keepdim=True)),
    "several outputs": lambda body, x: {"steps": body(x), "energy": x.square().mean()},
}


@pytest.mark.parametrize("b", [1, 3])
@pytest.mark.parametrize("kind", SERVED)
def test_a_forward_that_keeps_steps_apart_is_served(kind, b):
    net, x = Wrapped(SERVED[kind]), images(4, b)
    expected = attached(net, "bptt", 4, "m")(x)
    torch.testing.assert_close(attached(net, "rate", 4, "m")(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", ["resnet18", "resnet19", "vgg11"])
def test_the_project_s_networks_keep_steps_apart_as_they_declare(arch):
    net = rate_model_setting(MODELS[arch](num_classes=5, in_channel=2), 3, "m")
    looks = net.forward.__self__.looks
    assert looks.forward_is_known
    looks.forward_is_known = False
    net(images(3, size=32).float())


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


class Adapts(neuron.LIFNode):
    """Its threshold rises with each spike, in an attribute that SpikingJelly knows nothing of."""

    theta = 0.0

    def single_step_forward(self, x):
        self.v = self.v + (x - self.v) / self.tau
        s = self.surrogate_function(self.v - 1 - self.theta)
        self.theta = 0.5 * self.theta + 0.2 * s.detach()
        return s


class OtherInMultiStep(neuron.IFNode):
    def single_step_forward(self, x):
        return super().single_step_forward(x)

    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq) * 0.5


@pytest.mark.parametrize(
    ("kind", "mode", "reason"),
    [
        (Adapts, "m", "'fire1' .*changes 'theta', which is no memory"),
        (Adapts, "s", "'fire1' .*changes 'theta', which is no memory"),
        (OtherInMultiStep, "m", "'fire1' .*not its single-step forward repeated"),
    ],
)
def test_a_neuron_that_cannot_be_differentiated_step_by_step_is_refused(kind, mode, reason):
    net = rate_model_setting(tiny_net(lambda: kind(v_threshold=0.3)), 3, mode)
    with pytest.raises(UnsupportedModuleError, match=reason):
        outputs(net, 3 * images(3), mode)


def test_a_threshold_computed_from_parameters_is_refused_whenever_it_is():
    class Computes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.log, self.computes = tiny_net(), nn.Parameter(torch.zeros((), dtype=torch.float64)), False

        def forward(self, x):
            if self.computes:
                self.body.fire1.v_threshold = self.log.exp()
            return self.body(x)

    net = rate_model_setting(Computes(), 1, "m")
    train_step(net, images(1), labels(), "m")
    net.computes = True
    functional.reset_net(net)
    with pytest.raises(UnsupportedModuleError, match=r"'body.fire1' .*its v_threshold is computed from parameters"):
        net(images(1))


@pytest.mark.parametrize("mode", ["m", "s"])
def test_a_reset_potential_for_each_channel_gets_bptt_s_gradients(mode):
    net, found = tiny_net(lambda: lif_node(v_reset=0.1)), []
    net.fire1.v_reset = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64).view(4, 1, 1)
    for method in ("bptt", "rate"):
        try:
            found.append(train_step(attached(net, method, 1, mode), images(1), labels(), mode).grads)
        except (TypeError, RuntimeError) as error:
            if method == "bptt":
                pytest.skip(f"this SpikingJelly takes no tensor there: {error}")
            raise
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", ["m", "s"])
def test_a_learnable_threshold_of_a_neuron_gets_bptt_s_gradient(mode):
    net, found = tiny_net(lambda: lif_node(v_reset=0.0)), []  # the soft reset of 0.0.0.0.14 takes no tensors
    net.fire1.v_threshold = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    for method in ("bptt", "rate"):
        found.append(train_step(attached(net, method, 1, mode), images(1), labels(), mode).grads)
    assert found[0]["fire1.v_threshold"].abs() > 1e-3
    assert_same_gradients(found[1], found[0], 1e-9)


def test_what_differs_from_step_to_step_in_single_step_mode_must_be_a_tensor():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_net()

        def forward(self, x, t):
            return self.body(x * (1 + t))

    net, x = rate_model_setting(Scales(), 2, "s"), images(2)
    net(x[0], 0)
    with pytest.raises(RuntimeError, match="got 0 at the first of 2 steps and now 1"):
        net(x[1], 1)


class Gated(nn.Module):
    """Mixes steps behind a gate that is closed at first, as in ReZero."""

    def __init__(self):
        super().__init__()
        self.body, self.gate = tiny_net(), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        y = self.body[:2](x)
        return self.body[2:](y + self.gate * y.roll(1, 0))


def test_a_closed_gate_hides_nothing():
    net = rate_model_setting(Gated(), 4, "m")
    with pytest.raises(UnsupportedModuleError, match=MIXED):
        net(images(4))
    assert net.gate == 0


def test_weights_of_each_step_that_start_out_equal_are_refused():
    net = Wrapped(lambda body, x: (body(x) * net.weights.view(-1, 1, 1)[: len(x)]).sum(0))
    net.weights = nn.Parameter(torch.full((4,), 0.25, dtype=torch.float64))
    rate_model_setting(net, 4, "m")
    with pytest.raises(UnsupportedModuleError, match="sums, selects or mixes"):
        net(images(4))


def test_steps_that_know_of_later_ones_are_refused():
    def leak_back(body, x):
        y = body[:2](x)
        return body[2:](torch.cat([y[:-1] + y[1:], y[-1:]]))

    net = rate_model_setting(Wrapped(leak_back), 4, "m")
    with pytest.raises(UnsupportedModuleError, match=MIXED):
        net(images(4))


def test_a_layer_of_spikingjelly_that_is_new_is_looked_at(monkeypatch):
    class Mixes(nn.Module):
        def forward(self, x):
            return x.cumsum(0)

    Mixes.__module__ = layer.__name__
    monkeypatch.setattr(layer, "Mixes", Mixes, raising=False)
    net = rate_model_setting(net_with(Mixes()), 3, "m")
    with pytest.raises(UnsupportedModuleError, match=MIXED):
        net(images(3))


@pytest.mark.parametrize("how", ["subclass", "forward hook", "forward of the instance"])
def test_what_a_class_declares_does_not_hold_for_what_is_put_on_it(how):
    net = MODELS["vggsnn_cifar"](num_classes=5, in_channel=2)
    if how == "subclass":
        plain = type(net).forward
        net.__class__ = type("Mine", (type(net),), {"forward": lambda self, x: plain(self, x.cumsum(0))})
    elif how == "forward hook":
        net.features[1].register_forward_hook(lambda module, args, out: out.cumsum(0))
    else:
        first = net.features[0]
        first.forward = lambda x: type(first).forward(first, x.cumsum(0))
    rate_model_setting(net, 3, "m")
    with pytest.raises(UnsupportedModuleError, match=MIXED):
        net(images(3, size=16).float())


@pytest.mark.parametrize("dropout", [lambda: layer.Dropout(0.4), lambda: nn.Dropout(0.4)])
def test_a_forward_may_begin_with_a_reset(dropout):
    class Resets(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net_with(dropout())

        def forward(self, x):
            functional.reset_net(self)
            return self.body(x)

    net, found = Resets(), []
    for method in ("bptt", "rate"):
        torch.manual_seed(0)
        found.append(train_step(attached(net, method, 1, "m"), images(1), labels(), "m"))
    assert_same_gradients(found[1].grads, found[0].grads, 1e-9)
    torch.manual_seed(0)
    expected = attached(net, "bptt", 3, "m")(images(3))
    torch.manual_seed(0)
    torch.testing.assert_close(attached(net, "rate", 3, "m")(images(3)), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(UnsupportedModuleError, match="resets it in every step"):
        attached(net, "rate", 2, "s")(images(2)[0])


def test_dropout_in_place_changes_its_input_in_both_passes():
    net, found = tiny_net(), []
    drop = nn.Dropout(0.4, inplace=True)

    def forward(body, x):
        y = body[:2](x)
        z = drop(y)
        return body[2:](y + z)

    for method in ("bptt", "rate"):
        wrapped = Wrapped(forward, net)
        wrapped.drop = drop
        torch.manual_seed(0)
        wrapped = {"bptt": bptt_model_setting, "rate": rate_model_setting}[method](wrapped, 1, "m")
        found.append(train_step(wrapped, images(1), labels(), "m").grads)
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("b", [3, 4])
def test_a_norm_behind_the_time_average_is_an_ordinary_layer(b):
    norm = nn.LayerNorm(5).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    net, x = Wrapped(lambda body, x: body[1](body[0](x).mean(0)), nn.Sequential(tiny_net(), norm)), images(3, b)
    rate = train_step(attached(net, "rate", 3, "m"), x, labels(b), "m")
    bptt = train_step(attached(net, "bptt", 3, "m"), x, labels(b), "m")
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
    for part in ("body.1.weight", "body.1.bias", "body.0.head.weight"):
        torch.testing.assert_close(rate.grads[part], bptt.grads[part], rtol=1e-10, atol=1e-12)


def test_autocast_with_group_norm_and_a_forward_that_is_looked_into():
    net = Wrapped(lambda body, x: F.relu(body(x)), net_with(layer.GroupNorm(2, 4))).float()
    found = []
    for method in ("bptt", "rate"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(attached(net, method, 2, "m")(images(2).float()))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("options", [{}, {"static_input": True}, {"compiled": True}], ids=str)
@pytest.mark.parametrize("mode", ["m", "s"])
def test_autocast_leaves_statistics_in_float32_also_without_affine_parameters(mode, options):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3), layer.BatchNorm2d(8, affine=False), lif_node(), layer.Flatten(), layer.Linear(128, 5)
    )
    x, found = images(1)[0].float(), []
    for attach in (bptt_model_setting, lambda *args: rate_model_setting(*args, **options)):
        attach(net, 3, mode)
        functional.reset_net(net)
        net[1].reset_running_stats()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x.expand(3, *x.shape)).mean(0) if mode == "m" else sum(net(x) for _ in range(3)) / 3
        found.append((out.detach(), net[1].running_mean.clone(), net[1].running_var.clone()))
    torch.testing.assert_close(found[1][1:], found[0][1:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0.02, atol=0.02)  # rounded to bfloat16


@pytest.mark.parametrize("kind", [neuron.QIFNode, neuron.EIFNode, neuron.KLIFNode])
@pytest.mark.parametrize("mode", ["m", "s"])
def test_neurons_without_a_closed_form_run_under_autocast(mode, kind):
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(4, 64), kind(v_threshold=0.1), layer.Linear(64, 3))
    x, found = torch.rand(3, 2, 4), []
    for attach in (bptt_model_setting, rate_model_setting):
        attach(net, 3, mode)
        functional.reset_net(net)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x).mean(0) if mode == "m" else sum(net(step) for step in x) / 3
        out.sum().backward()
        found.append(out.detach())
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(3, 4, 4, 6), (3, 2, 5, 6, 6)], ids=["no batch", "other channels"])
def test_batch_norm_refuses_what_it_refuses_without_hooks(shape):
    net = nn.Sequential(layer.BatchNorm2d(4, affine=False), lif_node()).double()
    with pytest.raises(ValueError, match=r"expected 4D input|4 channels"):
        rate_model_setting(net, 3, "m")(torch.rand(shape, dtype=torch.float64))


def test_batch_norm_may_count_no_batches():
    net = tiny_net()
    net.bn1.num_batches_tracked = None
    found = [train_step(attached(net, method, 3, "m"), images(3), labels(), "m") for method in ("bptt", "rate")]
    torch.testing.assert_close(found[1].buffers["bn1.running_var"], found[0].buffers["bn1.running_var"])


@pytest.mark.parametrize("plain", [lambda: nn.Conv2d(2, 2, 3), lambda: nn.GroupNorm(1, 2), lambda: nn.Dropout(0.5)])
@pytest.mark.parametrize("order", ["[T * B]", "[B * T]"])
def test_layers_that_take_images_of_all_steps_must_get_them_time_first(plain, order):
    """Also where they are put back in order before any neuron."""

    class Folds(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.fire, self.head = plain(), lif_node(), layer.Linear(2, 3)

        def forward(self, x):
            if order == "[T * B]":
                y = self.plain(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            else:
                y = self.plain(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
            return self.head(self.fire(y.mean((-1, -2))))

    net = rate_model_setting(Folds().double(), 4, "m")
    if order == "[T * B]":
        net(images(4))
    else:
        with pytest.raises(UnsupportedModuleError, match=r"'plain' .*\[B \* T, ...\] in place of \[T \* B, ...\]"):
            net(images(4))
