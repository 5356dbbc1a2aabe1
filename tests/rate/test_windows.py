"""Windows of rates: one is the published method, one for each step BPTT, between them gradients come nearer to it."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from model import MODELS
from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    gradients,
    images,
    labels,
    lif_node,
    net_with,
    outputs,
    randomise_batch_norms,
    tiny_net,
    train_step,
)
from tests.rate.test_cost import block_net
from util.rate import bptt_model_setting, rate_model_setting
from util.rate.saved import saved_for_backward


def grads_of(net: nn.Module, x: Tensor, mode: str, windows: int | None, **options) -> tuple[Tensor, dict]:
    """Outputs and gradients of a loss with a weight for each step and value; ``windows``: None for BPTT."""
    net = copy.deepcopy(net)
    if windows is None:
        bptt_model_setting(net, len(x), mode)
    else:
        rate_model_setting(net, len(x), mode, windows=windows, **options)
    torch.manual_seed(3)
    out = outputs(net, x, mode)
    (out.sin() * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), gradients(net)


def assert_windows_of_one_step_are_bptt(net: nn.Module, x: Tensor, mode: str, **options) -> None:
    expected, found = (grads_of(net, x, mode, None), grads_of(net, x, mode, len(x), **options))
    assert torch.equal(found[0], expected[0])
    assert_same_gradients(found[1], expected[1], 1e-9)


SIGMOID = {"surrogate_function": surrogate.Sigmoid(4.0)}
KINDS = {
    "if": neuron.IFNode,
    "lif": partial(neuron.LIFNode, 1.25, False),
    "lif-decay-input": partial(neuron.LIFNode, 1.7, True),
    "parametric": partial(neuron.ParametricLIFNode, 1.7, False),
    "parametric-decay-input": partial(neuron.ParametricLIFNode, 1.7, True),
    "qif": neuron.QIFNode,
    "eif": neuron.EIFNode,
    "klif": partial(neuron.KLIFNode, tau=1.7),
    "klif-scaled-reset": partial(neuron.KLIFNode, True, tau=1.7),
    "izhikevich": neuron.IzhikevichNode,
}


def linear_net(make_neuron: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    body = (layer.Linear(6, 8), make_neuron(), layer.Linear(8, 8), make_neuron(), layer.Linear(8, 5))
    return nn.Sequential(*body).double()


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "not-detached"])
@pytest.mark.parametrize("v_reset", [None, 0.0, -0.3], ids=["soft", "hard-0", "hard--0.3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_window_for_each_step_is_bptt_for_each_neuron(mode, kind, v_reset, detach_reset):
    if v_reset is None and (kind == "izhikevich" or ("klif" in kind and not hasattr(neuron, "PSN"))):
        pytest.skip("it has no soft reset in this SpikingJelly")
    make = partial(KINDS[kind], v_threshold=0.4, v_reset=v_reset, detach_reset=detach_reset, **SIGMOID)
    assert_windows_of_one_step_are_bptt(linear_net(make), 2 * torch.rand(4, 3, 6, dtype=torch.float64), mode)


class Learns(neuron.IFNode):
    """A user's neuron: a gain for all units, and a threshold of each."""

    def __init__(self):
        super().__init__(surrogate_function=surrogate.ATan())
        self.gain = nn.Parameter(torch.tensor([1.3]))
        self.threshold = nn.Parameter(torch.linspace(0.3, 0.6, 8))

    def single_step_forward(self, x):
        h = self.v + self.gain * x
        s = self.surrogate_function(h - self.threshold)
        self.v = h - self.threshold * s
        return s


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SimpleLIFNode", {"tau": 1.7, "decay_input": False}), ("CUBALIFNode", {"v_threshold": 0.1}), ("Learns", {})],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_window_for_each_step_is_bptt_for_neurons_with_more_or_other_states(mode, kind, options):
    place = globals() if kind in globals() else vars(neuron)
    if kind not in place:
        pytest.skip(f"this SpikingJelly has no {kind}")
    x = 2 * torch.rand(4, 3, 6, dtype=torch.float64)
    assert_windows_of_one_step_are_bptt(linear_net(partial(place[kind], **options)), x, mode)


class Multiplies(nn.Module):
    """Attention among the columns of a map of spikes, with a softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.transpose(-1, -2)).softmax(-1) @ x


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tiny": tiny_net,
    "residual": block_net,
    **{f"{kind}Pool": lambda kind=kind: net_with(getattr(layer, f"{kind}Pool2d")(3, 1, 1)) for kind in ("Avg", "Max")},
    "GroupNorm": lambda: net_with(layer.GroupNorm(2, 4)),
    "LayerNorm": lambda: net_with(nn.LayerNorm((6, 6))),
    "BatchNorm in eval mode": lambda: tiny_net().eval(),
    "spikes in front of a BatchNorm": lambda: net_with(layer.BatchNorm2d(4)),
    "Dropout": lambda: net_with(nn.Dropout(0.4)),
    "attention": lambda: net_with(Multiplies()),
    "frozen": lambda: tiny_net().requires_grad_(False).append(layer.Linear(5, 5)).double(),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", MODES)
def test_a_window_for_each_step_is_bptt(mode, name):
    if "eval" in name and not hasattr(neuron, "PSN"):
        pytest.skip("this SpikingJelly has no gradient in eval mode")
    assert_windows_of_one_step_are_bptt(NETWORKS[name](), images(4), mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_window_for_each_step_is_bptt_for_spiking_attention(mode):
    torch.manual_seed(0)
    net = randomise_batch_norms(MODELS["spikformer_small"](num_classes=5, in_channel=2).double())
    assert_windows_of_one_step_are_bptt(net, images(2, 2, size=8), mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_window_for_each_step_is_bptt_for_a_static_image(mode):
    x = images(1).expand(4, -1, -1, -1, -1)
    if mode == "s":
        x = [x[0]] * 4
    assert_windows_of_one_step_are_bptt(tiny_net(), x, mode, static_input=True)


@pytest.mark.parametrize("windows", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_a_potential_is_passed_from_window_to_window(mode, windows):
    """Of a loss of the last step alone, behind one layer whose input is constant, where a window is exact."""
    found = []
    for of in (None, windows):
        torch.manual_seed(0)
        net = nn.Sequential(layer.Linear(6, 8), lif_node(v_threshold=0.4)).double()
        bptt_model_setting(net, 4, mode) if of is None else rate_model_setting(net, 4, mode, windows=of)
        outputs(net, 2 * torch.rand(1, 3, 6, dtype=torch.float64).expand(4, 3, 6), mode)
        net[1].v.square().sum().backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_what_detach_net_leaves_begins_the_next_batch(mode):
    found = []
    for windows in (None, 3):
        net = tiny_net()
        bptt_model_setting(net, 3, mode) if windows is None else rate_model_setting(net, 3, mode, windows=windows)
        outputs(net, images(3), mode)
        functional.detach_net(net)
        outputs(net, images(3, seed=2), mode).sin().sum().backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("name", ["tiny", "residual", "GroupNorm", "Dropout"])
@pytest.mark.parametrize("mode", MODES)
def test_one_window_is_the_method_without_the_keyword_bit_for_bit(mode, name):
    net = NETWORKS[name]()
    found = []
    for options in ({}, {"windows": 1}):
        torch.manual_seed(3)
        trained = rate_model_setting(copy.deepcopy(net), 4, mode, **options)
        found.append(train_step(trained, images(4), labels(), mode).grads)
    assert all(torch.equal(found[1][name], grad) for name, grad in found[0].items())


@pytest.mark.parametrize("windows", [2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_bptt_s_bit_for_bit(mode, windows):
    net, x = tiny_net(), images(8)
    assert torch.equal(grads_of(net, x, mode, windows)[0], grads_of(net, x, mode, None)[0])


def bytes_kept(net: nn.Module, time_step: int, mode: str, windows: int) -> int:
    rate_model_setting(net, time_step, mode, windows=windows)
    with saved_for_backward(net) as count:
        out = outputs(net, images(time_step), mode)
        assert out.requires_grad
        return count()


@pytest.mark.parametrize("make", [tiny_net, block_net])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_grows_with_the_windows_and_not_with_t(mode, make):
    two, four = (bytes_kept(make(), 4, mode, k) for k in (2, 4))
    assert bytes_kept(make(), 8, mode, 2) == two
    assert bytes_kept(make(), 4, mode, 1) < two < four


@pytest.mark.parametrize("windows", [0, -1, 3, 5, 8, 2.0, True, "2", None])
def test_windows_that_do_not_divide_t_are_refused(windows):
    net = tiny_net()
    with pytest.raises(ValueError, match="windows must be a whole number that divides time_step = 4"):
        rate_model_setting(net, 4, windows=windows)
    assert "forward" not in vars(net)


@pytest.mark.parametrize("mode", MODES)
def test_more_windows_come_nearer_to_bptt(mode):
    """On events, of which each step has others."""
    net, generator = tiny_net(), torch.Generator().manual_seed(1)
    x = 2 * (torch.rand(8, 8, 2, 6, 6, generator=generator, dtype=torch.float64) < 0.15).double()
    bptt, *rates = (flat(grads_of(net, x, mode, k)[1]) for k in (None, 1, 2, 4, 8))
    cosines = [torch.nn.functional.cosine_similarity(rate, bptt, dim=0).item() for rate in rates]
    assert cosines == sorted(cosines)
    assert cosines[0] < cosines[1] - 0.01
    assert cosines[-1] == pytest.approx(1, abs=1e-12)


def flat(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])
