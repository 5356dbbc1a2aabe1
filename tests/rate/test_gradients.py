"""Oracles 1 and 2, and the rate pass at T > 1 against a derivation of its own in plain torch operations."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from tests.rate.method_helpers import (
    MODES,
    assert_rate_equals_bptt,
    assert_same_gradients,
    attached,
    gradients,
    images,
    labels,
    lif_node,
    mean_output,
    net_with,
    outputs,
    randomise_batch_norms,
    tiny_net,
    train_step,
)
from util.util import UnsupportedModuleError, rate_model_setting

pytestmark = pytest.mark.quick


def set_batch_norms(net: nn.Module, training: bool) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(training)
            if not training and module.running_mean is not None:
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return net


def dropped_channels() -> nn.Module:
    return layer.SeqToANNContainer(nn.Dropout2d())


class TestOneStepEqualsBPTT:
    """Oracle 1: at T = 1 every parameter's gradient is BPTT's."""

    @pytest.mark.parametrize("training", [True, False], ids=["batch-statistics", "running-statistics"])
    @pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "not-detached"])
    @pytest.mark.parametrize("v_reset", [None, 0.0, -0.3], ids=["soft", "hard-0", "hard--0.3"])
    @pytest.mark.parametrize("mode", MODES)
    def test_for_each_reset_and_kind_of_statistics(self, mode, v_reset, detach_reset, training):
        net = tiny_net(lambda: lif_node(v_reset=v_reset, detach_reset=detach_reset, v_threshold=0.9))
        assert_rate_equals_bptt(set_batch_norms(net, training), images(1), labels(), mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_of_a_network_that_is_not_the_project_s(self, mode):
        assert_rate_equals_bptt(own_net(mode), images(1, 3, 2, 8), labels(), mode)

    @pytest.mark.parametrize("mode", MODES)
    def test_of_the_input(self, mode):
        found = []
        for method in ("bptt", "rate"):
            net, x = attached(tiny_net(), method, 1, mode), images(1).requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(mean_output(net, x, mode), labels()), x)
            found.append(grad)
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-14)

    @pytest.mark.parametrize("kind", [layer.Dropout, layer.Dropout2d, nn.Dropout, dropped_channels])
    def test_with_the_masks_of_the_spike_pass(self, kind):
        """A mask drawn anew in the rate pass would give the gradient of another network."""
        grads, random_states = [], []
        for method in ("bptt", "rate"):
            net = attached(net_with(kind()), method, 1, "m")
            torch.manual_seed(3)
            grads.append(train_step(net, images(1), labels(), "m").grads)
            random_states.append(torch.get_rng_state())
        assert_same_gradients(grads[1], grads[0], 1e-9)
        assert torch.equal(*random_states)


class OwnNet(nn.Module):
    """Layers and calls that no network of the project has; mode 'm' puts out [T, B, classes]."""

    def __init__(self, mode: str):
        super().__init__()

        def node():
            return neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)

        self.stem = nn.Sequential(
            layer.Conv2d(2, 8, 3, padding=1, bias=True), layer.BatchNorm2d(8, affine=False), node()
        )
        self.grouped = nn.Sequential(
            layer.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), layer.BatchNorm2d(8, momentum=None), node()
        )
        self.tied = layer.Conv2d(8, 8, 1, bias=True)
        self.tied_norm = layer.BatchNorm2d(8, track_running_stats=False)
        self.tied_fires = nn.ModuleList([node(), node()])
        self.max_pool = layer.MaxPool2d(2)
        self.strided = nn.Sequential(layer.Conv2d(16, 6, 3, stride=2, padding=1, padding_mode="circular"), node())
        plain = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 7, 2))
        self.plain = layer.SeqToANNContainer(*plain) if mode == "m" else plain
        self.fire = node()
        self.hidden = nn.Sequential(layer.AvgPool2d(1), layer.Flatten(), nn.Linear(7, 12, bias=False), node())
        self.head = layer.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.stem(x))
        for fire in self.tied_fires:  # the same convolution and BatchNorm twice, a neuron of its own each time
            x = fire(self.tied_norm(self.tied(x)))
        pooled = self.max_pool(x)
        x = torch.cat([pooled, F.relu(pooled - 0.25 * self.max_pool(x * 0.5))], dim=-3)
        return self.head(self.hidden(self.fire(self.plain(self.strided(x)))))


def own_net(mode: str) -> nn.Module:
    torch.manual_seed(2)
    return randomise_batch_norms(OwnNet(mode).double())


class TestValue:
    """Oracle 2: at any T the output is BPTT's forward output."""

    @pytest.mark.parametrize("make", [tiny_net, own_net], ids=["tiny", "own"])
    @pytest.mark.parametrize("time_step", [1, 3, 4])
    @pytest.mark.parametrize("mode", MODES)
    def test_every_step_s_output_is_bptt_s(self, mode, time_step, make):
        net = own_net(mode) if make is own_net else tiny_net()
        x = images(time_step, 3, 2, 8 if make is own_net else 6)
        with torch.no_grad():
            expected = outputs(attached(net, "bptt", time_step, mode), x, mode)
        found = outputs(attached(net, "rate", time_step, mode), x, mode)
        assert found.requires_grad
        torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)


class ByHand:
    """The method for `tiny_net`, derived apart from the project: method.md in plain torch operations and autograd.

    The SpikingJelly network runs over T steps without a graph; forward hooks catch every layer's input and output.
    """

    def __init__(self, net: nn.Module, x: Tensor, mode: str):
        """``x`` [T, B, C, H, W]."""
        self.net, self.mode, self.x = net, mode, x
        caught: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name, _ in net.named_children()}
        spiking = attached(net, "bptt", len(x), mode)
        for name, module in spiking.named_children():
            module.register_forward_hook(lambda _, args, out, name=name: caught[name].append((args[0], out)))
        with torch.no_grad():
            self.outputs = outputs(spiking, x, mode)  # [T, B, classes]
        together = torch.cat if mode == "m" else torch.stack
        self.inputs = {name: together([a for a, _ in pairs]) for name, pairs in caught.items()}  # [T, B, ...]
        self.spikes = {name: together([b for _, b in pairs]) for name, pairs in caught.items()}

    def rate(self, x: Tensor | None = None) -> Tensor:
        """The rate pass's output [B, classes], with the gradients of the method."""
        net = self.net
        z = self.x.mean(0) if x is None else x
        z = F.conv2d(z, net.conv1.weight, net.conv1.bias, padding=1)
        z = self.neuron("fire1", self.batch_norm("bn1", z))
        z = F.conv2d(z, net.conv2.weight, padding=1, stride=2)
        z = self.neuron("fire2", self.batch_norm("bn2", z))
        return F.linear(z.flatten(1), net.head.weight, net.head.bias)

    def batch_norm(self, name: str, c: Tensor) -> Tensor:
        """mu and var of the spike pass as values, the gradients of the mean and variance of c."""
        bn, inputs = getattr(self.net, name), self.inputs[name]  # [T, B, C, H, W]
        if self.mode == "m":
            mu, var = inputs.mean((0, 1, 3, 4)), inputs.var((0, 1, 3, 4), unbiased=False)
        else:
            mu = inputs.mean((1, 3, 4)).mean(0)
            var = inputs.var((1, 3, 4), unbiased=False).mean(0)  # [T, C] -> [C]
        m = c.mean((0, 2, 3))
        mean_ = mu + (m - m.detach())
        q = (c - mean_[:, None, None]).square().mean((0, 2, 3))
        var_ = var + (q - q.detach())
        normal = (c - mean_[:, None, None]) / (var_ + bn.eps).sqrt()[:, None, None]
        return bn.weight[:, None, None] * normal + bn.bias[:, None, None]

    def neuron(self, name: str, z: Tensor) -> Tensor:
        """Value r = mean spike; gradient e = dr/dc by autograd through the neuron's own T steps."""
        node, currents = copy.deepcopy(getattr(self.net, name)), self.inputs[name]
        node.step_mode = "s"
        node.reset()
        c = torch.zeros_like(currents[0], requires_grad=True)
        r = torch.stack([node(current + c) for current in currents]).mean(0)
        torch.testing.assert_close(r, self.spikes[name].mean(0), rtol=0, atol=1e-15)
        (e,) = torch.autograd.grad(r.sum(), c)
        return r.detach() + e * (z - z.detach())

    def gradients(self, output_gradient: Tensor) -> dict[str, Tensor | None]:
        """Of every parameter, for the gradient [B, classes] that arrives at the time-averaged output."""
        named = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(self.rate(), list(named.values()), output_gradient)
        return {n: None for n, _ in self.net.named_parameters()} | dict(zip(named, grads, strict=True))


RESETS = [
    pytest.param({"v_reset": None, "detach_reset": True}, id="soft-detached"),
    pytest.param({"v_reset": None, "detach_reset": False, "v_threshold": 0.8}, id="soft-not-detached"),
    pytest.param({"v_reset": 0.0, "detach_reset": True}, id="hard-detached"),
    pytest.param({"v_reset": -0.2, "detach_reset": False, "decay_input": True, "tau": 1.6}, id="hard-not-detached"),
]


class TestManyStepsEqualTheMethodWrittenOut:
    """T > 1, where BPTT is no oracle: the gradients are those of the rate pass as method.md states it."""

    @pytest.mark.parametrize("options", RESETS)
    @pytest.mark.parametrize("time_step", [2, 5])
    @pytest.mark.parametrize("mode", MODES)
    def test_every_gradient(self, mode, time_step, options):
        net, x = tiny_net(lambda: lif_node(**options)), images(time_step)
        hand = ByHand(net, x, mode)
        rate_out = hand.rate()
        torch.testing.assert_close(rate_out.detach(), hand.outputs.mean(0), rtol=1e-10, atol=1e-10)
        mean = hand.outputs.mean(0).requires_grad_()
        (at_output,) = torch.autograd.grad(F.cross_entropy(mean, labels()), mean)
        found = train_step(attached(net, "rate", time_step, mode), x, labels(), mode).grads
        assert_same_gradients(found, hand.gradients(at_output), 1e-10)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("kind", [neuron.ParametricLIFNode, neuron.KLIFNode])
    def test_of_a_neuron_s_own_parameter_behind_one_layer_is_bptt_s(self, kind, mode):
        """Of the mean output's loss: the derivative of the rate is then all there is, at any T."""
        found, x = [], images(5)
        for method in ("bptt", "rate"):
            torch.manual_seed(0)
            net = nn.Sequential(layer.Conv2d(2, 3, 3), kind(v_threshold=0.3, detach_reset=False), layer.Flatten())
            net = attached(net.double(), method, 5, mode)
            out = mean_output(net, x, mode)
            (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
            found.append({name: p.grad for name, p in net[1].named_parameters()})
        assert_same_gradients(found[1], found[0], 1e-9)

    def test_the_rate_gradient_is_not_bptt_s(self):
        """Else the test above could hold BPTT against BPTT."""
        net, x = tiny_net(), images(4)
        bptt = train_step(attached(net, "bptt", 4, "m"), x, labels(), "m").grads
        rate = train_step(attached(net, "rate", 4, "m"), x, labels(), "m").grads
        assert (bptt["conv1.weight"] - rate["conv1.weight"]).norm() > 1e-3 * bptt["conv1.weight"].norm()

    def test_the_step_modes_differ_in_their_batch_statistics(self):
        net, x = tiny_net(), images(4)
        grads = [train_step(attached(net, "rate", 4, mode), x, labels(), mode).grads for mode in MODES]
        assert (grads[0]["conv1.weight"] - grads[1]["conv1.weight"]).norm() > 1e-3

    @pytest.mark.parametrize("mode", MODES)
    def test_losses_of_single_steps_add_up(self, mode):
        """Another loss on each step's output: the rate pass gets the sum of the gradients at the T outputs."""
        time_step, net, x = 3, tiny_net(), images(3)
        hand = ByHand(net, x, mode)

        def loss_of(steps: Tensor) -> Tensor:
            terms = [F.cross_entropy(steps[0], labels()), 0.3 * steps[1].square().sum(), steps[2, 1].exp().mean()]
            return sum(terms)

        values = hand.outputs.clone().requires_grad_()
        (at_outputs,) = torch.autograd.grad(loss_of(values), values)
        rate = attached(net, "rate", time_step, mode)
        loss_of(outputs(rate, x, mode)).backward()
        assert_same_gradients(gradients(rate), hand.gradients(at_outputs.sum(0)), 1e-10)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_loss_of_some_steps_alone(self, mode):
        time_step, net, x = 3, tiny_net(), images(3)
        hand = ByHand(net, x, mode)
        value = hand.outputs[1].clone().requires_grad_()
        (at_output,) = torch.autograd.grad(F.cross_entropy(value, labels()), value)
        rate = attached(net, "rate", time_step, mode)
        F.cross_entropy(outputs(rate, x, mode)[1], labels()).backward()
        assert_same_gradients(gradients(rate), hand.gradients(at_output), 1e-10)

    def test_the_gradient_of_the_input_sequence_is_shared_evenly(self):
        """Mode 'm': the rate pass sees the mean of x, so each x[t] gets 1/T of the mean's gradient."""
        time_step, net = 3, tiny_net()
        x = images(time_step)
        hand = ByHand(net, x, "m")
        mean = x.mean(0).requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(hand.rate(mean), labels()), mean)
        x.requires_grad_()
        (found,) = torch.autograd.grad(
            F.cross_entropy(mean_output(attached(net, "rate", time_step, "m"), x, "m"), labels()), x
        )
        torch.testing.assert_close(found, (expected / time_step).expand_as(x), rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
    def test_the_gradient_of_a_static_image_in_single_step_mode(self, leaf):
        time_step, net = 3, tiny_net()
        image = images(1)[0]
        hand = ByHand(net, image.expand(time_step, *image.shape), "s")
        mean = image.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(hand.rate(mean), labels()), mean)
        image.requires_grad_()
        x, rate = (image if leaf else image * 1.0), attached(net, "rate", time_step, "s")
        out = torch.stack([rate(x) for _ in range(time_step)]).mean(0)
        (found,) = torch.autograd.grad(F.cross_entropy(out, labels()), image)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)

    def test_inputs_that_need_gradients_and_change_are_refused_in_single_step_mode(self):
        rate, x = attached(tiny_net(), "rate", 2, "s"), images(2)
        rate(x[0].requires_grad_())
        with pytest.raises(RuntimeError, match="same tensor"):
            rate(images(2, seed=4)[1].requires_grad_())

    FROZEN = {  # noqa: RUF012
        "first-convolution": ["conv1.weight", "conv1.bias"],
        "convolution-weight": ["conv2.weight"],
        "bias": ["conv1.bias", "head.bias"],
        "batch-norm": ["bn1.weight", "bn1.bias", "bn2.bias"],
        "all-in-front-of-a-batch-norm": ["conv1.weight", "conv1.bias", "bn1.weight"],
        "all-but-the-head": [
            "conv1.weight",
            "conv1.bias",
            "bn1.weight",
            "bn1.bias",
            "conv2.weight",
            "bn2.weight",
            "bn2.bias",
        ],
    }

    @pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
    @pytest.mark.parametrize("mode", MODES)
    def test_frozen_parameters_get_none_and_change_no_other_gradient(self, mode, frozen):
        net, x = tiny_net(), images(2)
        expected = train_step(attached(net, "rate", 2, mode), x, labels(), mode).grads
        for name in frozen:
            net.get_parameter(name).requires_grad_(False)
        found = train_step(attached(net, "rate", 2, mode), x, labels(), mode).grads
        assert_same_gradients(found, expected | dict.fromkeys(frozen), 1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_wholly_frozen_network_gives_outputs_without_gradient(self, mode):
        net = attached(tiny_net().requires_grad_(False), "rate", 2, mode)
        assert not outputs(net, images(2), mode).requires_grad


class PartlyUsed(nn.Module):
    """A parameter that no forward uses, and a branch that only some forwards use."""

    def __init__(self):
        super().__init__()
        self.body = tiny_net()
        self.unused = layer.Linear(3, 4)
        self.branch = layer.Linear(5, 5)
        self.use_branch = False
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.branch(out) if self.use_branch else out


@pytest.mark.parametrize("use_branch", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_unused_parameters_get_no_gradient(mode, use_branch):
    net = PartlyUsed()
    net.use_branch = use_branch
    assert_rate_equals_bptt(net, images(1), labels(), mode)
    found = train_step(attached(net, "rate", 3, mode), images(3), labels(), mode).grads
    without = {name for name, grad in found.items() if grad is None}
    unused = {"unused.weight", "unused.bias"}
    assert without == (unused if use_branch else unused | {"branch.weight", "branch.bias"})


class ManyOutputs(nn.Module):
    """Outputs in a dict and a tuple; one has no gradient, one is no tensor."""

    def __init__(self):
        super().__init__()
        self.body, self.extra = tiny_net(), layer.Linear(5, 2).double()

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict:
        out = self.body(x) * scale
        return {"main": out, "others": (self.extra(out), out.detach(), "name")}


@pytest.mark.parametrize("mode", MODES)
def test_outputs_in_containers_carry_their_gradients(mode):
    grads = []
    for method in ("bptt", "rate"):
        net = attached(ManyOutputs(), method, 1, mode)
        out = net(images(1) if mode == "m" else images(1)[0], scale=0.5)
        assert out["others"][2] == "name"
        (out["main"].square().sum() + out["others"][0].sum()).backward()
        grads.append(gradients(net))
    assert_same_gradients(grads[1], grads[0], 1e-9)


class NeuronTwice(nn.Module):
    """One neuron called twice in a forward: SpikingJelly hands its potential from the one call to the other."""

    def __init__(self):
        super().__init__()
        self.first, self.fire, self.second = layer.Linear(4, 5), lif_node(), layer.Linear(5, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.fire(self.second(self.fire(3 * self.first(x)))))


@pytest.mark.parametrize("time_step", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_neuron_called_twice_in_a_forward_is_refused(mode, time_step):
    net, x = attached(NeuronTwice(), "rate", time_step, mode), torch.zeros(time_step, 6, 4, dtype=torch.float64)
    with pytest.raises(UnsupportedModuleError, match=r"'fire'.*twice"):
        outputs(net, x, mode)
    functional.reset_net(net)
    with torch.no_grad():
        assert outputs(net, x, mode).shape == (time_step, 6, 5)


class HeadAfterTimeMean(nn.Module):
    """A network that averages over time before its last layer."""

    def __init__(self, convolution: bool):
        super().__init__()
        self.body = tiny_net()[:6]
        self.conv = nn.Conv2d(6, 4, 1).double() if convolution else nn.Identity()
        self.head = nn.Linear((4 if convolution else 6) * 9, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.body(x).mean(0)).flatten(1))


@pytest.mark.parametrize("b", [3, 4, 6])
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
def test_layers_behind_a_time_mean_are_ordinary_layers(convolution, b):
    """Three time steps; 3 and 6 images are batches that could be taken for steps."""
    net, x = HeadAfterTimeMean(convolution), images(3, b)
    hand = ByHand(tiny_net(), x, "m")  # as net.body
    mean = hand.spikes["fire2"].mean(0)
    logits = net.head(net.conv(mean).flatten(1))
    named = {n: p for n, p in net.named_parameters() if not n.startswith("body")}
    expected = dict(zip(named, torch.autograd.grad(F.cross_entropy(logits, labels(b)), named.values()), strict=True))
    out = rate_model_setting(net, 3, "m")(x)
    F.cross_entropy(out, labels(b)).backward()
    torch.testing.assert_close(out, logits, rtol=1e-12, atol=1e-12)
    assert_same_gradients({name: p.grad for name, p in named.items()}, expected, 1e-9)


@pytest.mark.parametrize("b", [3, 6])
def test_a_neuron_behind_a_time_mean_does_what_it_does_with_bptt(b):
    """In multi-step mode it takes the batch for time."""
    net, found = HeadAfterTimeMean(False), []
    net.conv = lif_node(v_threshold=0.2)
    for method in ("bptt", "rate"):
        found.append(train_step(attached(net, method, 3, "m"), images(3, b), labels(b), "m"))
    assert torch.equal(found[1].output, found[0].output)


@pytest.mark.parametrize("b", [3, 4, 6])
def test_dropout_behind_a_time_mean_repeats_its_mask(b):
    net, x = HeadAfterTimeMean(False), images(3, b)
    net.conv = nn.Dropout(0.4)
    mean = ByHand(tiny_net(), x, "m").spikes["fire2"].mean(0)
    torch.manual_seed(5)
    logits = net.head((mean * F.dropout(torch.ones_like(mean), 0.4)).flatten(1))
    (expected,) = torch.autograd.grad(logits.square().sum(), net.head.weight)
    torch.manual_seed(5)
    rate_model_setting(net, 3, "m")(x).square().sum().backward()
    torch.testing.assert_close(net.head.weight.grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_once_and_in_its_input_s_layout(monkeypatch, mode):
    """On a GPU the same state gives another mask to a tensor that lies otherwise in memory."""
    net, drawn, dropout = net_with(nn.Dropout(0.4)), [], torch._VF.dropout

    def counted(x, *args):
        drawn.append(x.stride())
        return dropout(x, *args)

    x = images(4).flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 3))
    rate_model_setting(net.to(memory_format=torch.channels_last), 4, mode)
    monkeypatch.setattr(torch._VF, "dropout", counted)
    train_step(net, x, labels(), mode)
    layout = (4 * 36, 1, 6 * 4, 4)  # of [B, 4, 6, 6]
    assert drawn == ([(3 * 4 * 36, *layout)] if mode == "m" else [layout] * 4)


@pytest.mark.parametrize("mode", MODES)
def test_the_rate_of_dropout_is_multiplied_by_the_mean_of_the_steps_masks(mode):
    time_step, p = 4, 0.4
    torch.manual_seed(0)
    parts = OrderedDict(first=layer.Linear(6, 8), fire=lif_node(), drop=nn.Dropout(p), second=layer.Linear(8, 5))
    net = nn.Sequential(parts).double()
    x, weight = 2 * torch.randn(time_step, 3, 6, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.manual_seed(5)
    if mode == "m":
        masks = F.dropout(torch.ones(time_step, 3, 8, dtype=torch.float64), p)
    else:
        masks = torch.stack([F.dropout(torch.ones(3, 8, dtype=torch.float64), p) for _ in range(time_step)])
    currents = net.first(x).detach()
    c = torch.zeros_like(currents[0], requires_grad=True)
    r = torch.stack([net.fire(current + c) for current in currents]).mean(0)
    (e,) = torch.autograd.grad(r.sum(), c)
    z = net.first(x.mean(0))
    out = net.second((r.detach() + e * (z - z.detach())) * masks.mean(0))
    expected = dict(zip(dict(net.named_parameters()), torch.autograd.grad(out, net.parameters(), weight), strict=True))

    functional.reset_net(net)
    rate_model_setting(net, time_step, mode)
    torch.manual_seed(5)
    (mean_output(net, x, mode) * weight).sum().backward()
    assert_same_gradients(gradients(net), expected, 1e-12)
    assert masks.mean(0).std() > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_instance_norm_is_an_ordinary_layer_at_one_step(mode):
    norm = nn.InstanceNorm2d(4, affine=True)
    net = net_with(layer.SeqToANNContainer(norm) if mode == "m" else norm)
    assert_rate_equals_bptt(net, images(1), labels(), mode)


@pytest.mark.parametrize("enabled", [True, False], ids=["with-gradients", "without"])
@pytest.mark.parametrize("call", ["keyword", "output_size"])
def test_modules_called_with_more_than_one_positional_argument(call, enabled):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.up = tiny_net()[:6], nn.ConvTranspose2d(6, 2, 2, stride=2).double()

        def forward(self, x: Tensor) -> Tensor:
            spikes = self.body(x).flatten(0, 1)
            out = self.up(input=spikes) if call == "keyword" else self.up(spikes, output_size=[7, 7])
            return out.unflatten(0, x.shape[:2]).mean((-1, -2))

    steps = []
    for method in ("bptt", "rate"):
        net = attached(Calls(), method, 1, "m")
        with torch.set_grad_enabled(enabled):
            steps.append(train_step(net, images(1), labels() % 2, "m") if enabled else net(images(1)))
    if enabled:
        assert_same_gradients(steps[1].grads, steps[0].grads, 1e-9)
