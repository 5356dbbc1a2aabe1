"""What `util.rate.check` says of a network, and how it measures the distance between the two gradients."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm

from tests.rate.method_helpers import (
    MODES,
    assert_same_tensors,
    attached,
    images,
    labels,
    net_with,
    state_of,
    tiny_net,
    train_step,
)
from util.rate.check import check_network, compare_gradients
from util.rate.problem import UnsupportedModuleError


@pytest.mark.parametrize("mode", MODES)
def test_a_network_of_served_modules_is_served(mode, capsys):
    assert check_network(tiny_net(), images(4), mode)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"rate-based backpropagation on Sequential, step mode {mode!r}, T = 4"
    assert [line.split()[0] for line in lines[1:-1]] == ["ok", "ok", "kept", *["K"] * 3]
    assert lines[-1] == "verdict: served"


@pytest.mark.parametrize("mode", MODES)
def test_more_windows_come_nearer_to_bptt_and_keep_more(mode, capsys):
    check_network(net_with(layer.Conv2d(4, 4, 3, padding=1)), images(4, 64), mode)
    found = re.findall(r"K = (\d): ([\d.]+) MiB, cosine ([\d.]+) to", capsys.readouterr().out)
    assert [k for k, _, _ in found] == ["1", "2", "4"]
    kept, cosines = ([float(line[i]) for line in found] for i in (1, 2))
    assert kept == sorted(set(kept))
    assert cosines == sorted(set(cosines))
    assert cosines[-1] == 1


class Mixes(nn.Module):
    def forward(self, x):
        return x * x.cumsum(0)


def test_what_costs_t_is_named(capsys):
    assert check_network(nn.Sequential(tiny_net(), Mixes()), images(2))
    assert re.search(r"costs T here: mul in '1', [\d.]+ MiB", capsys.readouterr().out)


def test_a_refused_module_is_named(capsys):
    assert not check_network(nn.Sequential(tiny_net(), layer.SynapseFilter()), images(2), "s")
    out = capsys.readouterr().out
    assert "'1' (SynapseFilter)" in out
    assert out.endswith("verdict: not served\n")


def test_a_wrong_value_is_noticed(capsys, monkeypatch):
    from util.rate import layers

    right = layers.Linear.spike
    monkeypatch.setattr(layers.Linear, "spike", lambda *args: (2 * right(*args)[0], right(*args)[1]))
    assert not check_network(tiny_net(), images(3))
    out = capsys.readouterr().out
    assert "WRONG output at T = 3" in out
    assert "verdict: do not train" in out


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_gradient_is_noticed_with_the_parameter(mode, capsys, monkeypatch):
    """As if the eligibility were twice what it is."""
    from util.rate import neurons

    right = neurons.Linearised.backward
    wrong = staticmethod(lambda ctx, grad, *other: right(ctx, 2 * grad, *other))
    monkeypatch.setattr(neurons.Linearised, "backward", wrong)
    assert not check_network(tiny_net(), images(2), mode)
    assert "WRONG gradients at T = 1" in capsys.readouterr().out


def test_a_network_that_lets_no_gradient_through_is_not_called_right(capsys):
    net = tiny_net(lambda: neuron.IFNode(v_threshold=1e9))
    assert not check_network(net, images(2))
    out = capsys.readouterr().out
    assert "no gradient comes to conv1.weight, conv2.weight, head.weight" in out
    assert out.endswith("verdict: not known; try other weights or another x\n")


def test_thresholds_are_lowered_where_a_layer_is_silent_at_one_step(capsys):
    net = tiny_net(lambda: neuron.LIFNode(tau=40.0))
    assert check_network(net, images(2))
    assert "thresholds lowered to 0.03 of theirs" in capsys.readouterr().out
    assert net.fire1.v_threshold == 1


def test_a_blank_first_frame_is_not_the_step_that_is_checked(capsys):
    x = images(2)
    x[0] = 0
    assert check_network(tiny_net(), x)
    assert "thresholds lowered" not in capsys.readouterr().out


class SteepBetweenSpikes(nn.Module):
    """Nearly flat at 0 and at 1, but not at rates between them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softsign(1e4 * (x - 0.5))


@pytest.mark.parametrize("mode", MODES)
def test_exploding_gradients_are_part_of_the_verdict(mode, capsys):
    assert not check_network(net_with(SteepBetweenSpikes()), images(4), mode)
    out = capsys.readouterr().out
    assert re.search(r"WRONG gradients at T = 4 explode, most of all that of \S+, \d\.\de\+\d+ times BPTT's", out)
    assert "verdict: do not train" in out


class Raises(nn.Module):
    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyError("mine"),
    ],
    ids=["GPU memory", "CPU memory", "an error of the network"],
)
def test_errors_that_are_not_the_method_s_are_passed_on(error):
    with pytest.raises(type(error), match=str(error).strip("'")):
        check_network(nn.Sequential(tiny_net(), Raises(error)), images(2))


def test_a_wrong_shape_is_not_called_not_served():
    with pytest.raises(RuntimeError, match=r"expected input\[6, 3, 6, 6\] to have 2 channels"):
        check_network(tiny_net(), images(2, channels=3))


def test_potentials_put_out_at_each_step_are_not_counted_as_growth(capsys):
    class PutsOutPotential(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fire = tiny_net(), neuron.LIFNode(v_threshold=0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.fire(self.body(x))
            return self.fire.v

    assert check_network(PutsOutPotential(), images(4), "s"), capsys.readouterr().out


class UnusedGain(neuron.IFNode):
    """Has a parameter that its step does not use."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(tiny_net(), nn.Dropout(0.3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), x.square().mean() * self.body[0].head.bias.sum()


@pytest.mark.parametrize("net", [tiny_net(UnusedGain), TwoOutputs()], ids=["unused parameter", "two outputs"])
def test_is_not_misled(net, capsys):
    assert check_network(net, images(3)), capsys.readouterr().out


def test_a_missing_gradient_is_named(capsys, monkeypatch):
    from util.rate import function as rate_function

    right = rate_function.LinearRate.backward
    monkeypatch.setattr(
        rate_function.LinearRate,
        "backward",
        staticmethod(lambda ctx, grad: (right(ctx, grad)[0], *[None] * 5)),
    )
    assert not check_network(tiny_net(), images(2))
    assert "WRONG gradients at T = 1: largest relative difference 1.0e+00 (head.weight)" in capsys.readouterr().out


class MakesValues(nn.Module):
    """``dtype``: None is torch's default."""

    def __init__(self, dtype: torch.dtype | None):
        super().__init__()
        self.fc, self.dtype = layer.Linear(3, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(torch.ones(3, dtype=self.dtype))


def test_what_the_forward_makes_is_of_float64_too_and_where_it_insists_on_float32_it_is_said(capsys):
    assert check_network(nn.Sequential(tiny_net(), layer.Linear(5, 3), MakesValues(None)), images(2))
    with pytest.raises(RuntimeError, match=r"the check runs in float64, .*: use x.dtype there"):
        check_network(nn.Sequential(tiny_net(), layer.Linear(5, 3), MakesValues(torch.float32)), images(2))
    assert torch.get_default_dtype() == torch.float32


def pruned() -> nn.Module:
    net = tiny_net()
    prune.l1_unstructured(net.conv2, "weight", 0.3)
    return net


def weight_normed() -> nn.Module:
    net = tiny_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer one
        weight_norm(net.conv2)
    return net


@pytest.mark.parametrize("make", [pruned, weight_normed])
def test_a_network_whose_weights_are_computed_gets_a_verdict(make, capsys):
    assert check_network(make(), images(2)), capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
def test_torch_func_over_an_attached_network_is_refused_by_name(mode):
    net, x = attached(tiny_net(), "rate", 2, mode), images(2)
    weights = {name: p.detach() for name, p in net.named_parameters()}
    with pytest.raises(UnsupportedModuleError, match=r"torch.func's transforms .* use backward"):
        torch.func.grad(lambda w: torch.func.functional_call(net, w, (x if mode == "m" else x[0],)).sum())(weights)


class Recurrent(nn.Module):
    """Feeds a neuron what the step before left in an attribute."""

    def __init__(self):
        super().__init__()
        self.fc, self.back, self.fire, self.h = layer.Linear(4, 4), layer.Linear(4, 4), neuron.LIFNode(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.fire(self.fc(x) + self.back(self.h + torch.zeros_like(x)))
        return self.h


def test_a_recurrence_through_an_attribute_is_refused_with_the_reason(capsys):
    assert not check_network(Recurrent(), 4 * torch.rand(3, 2, 4), "s")
    out = capsys.readouterr().out
    assert "depends on what earlier steps left" in out
    assert out.endswith("verdict: not served\n")


@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_leaves_the_network_as_it_was(method):
    """Also one that is attached and has just been trained, whose potentials hold a graph."""
    net = attached(tiny_net(), method, 2, "m")
    before = train_step(net, images(2), labels(), "m")
    state, forward = state_of(net.state_dict().items()), net.forward
    assert check_network(net, images(3))
    assert_same_tensors(state_of(net.state_dict().items()), state)
    assert all(torch.equal(p.grad, before.grads[name]) for name, p in net.named_parameters())
    assert net.forward == forward


@pytest.mark.parametrize("mode", MODES)
def test_cosine_and_norm_ratio_are_those_of_the_two_gradients(mode):
    net, x = tiny_net(), images(4)
    found = compare_gradients(net, x, labels(), mode)
    rate, bptt = (train_step(attached(net, m, 4, mode), x, labels(), mode).grads for m in ("rate", "bptt"))
    assert found.keys() == {*rate, ""} - {"conv1.bias"}  # 0 but for rounding, in front of a BatchNorm
    for name in found.keys() - {""}:
        cosine = (rate[name] * bptt[name]).sum() / rate[name].norm() / bptt[name].norm()
        assert found[name] == pytest.approx((cosine.item(), (rate[name].norm() / bptt[name].norm()).item()), rel=1e-6)
    together = [torch.cat([g.flatten() for g in grads.values()]) for grads in (rate, bptt)]
    assert found[""][1] == pytest.approx((together[0].norm() / together[1].norm()).item(), rel=1e-9)
    assert found[""][0] < 0.999


def test_at_one_step_the_two_gradients_are_the_same():
    cosine, ratio = compare_gradients(tiny_net(), images(1), labels())[""]
    assert (cosine, ratio) == pytest.approx((1, 1), abs=1e-9)


def test_a_network_with_time_as_the_second_dimension():
    class BatchFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.transpose(0, 1))

    x = images(4).transpose(0, 1)
    assert check_network(BatchFirst(), x, time_dim=1)
