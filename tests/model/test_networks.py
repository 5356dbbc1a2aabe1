"""The networks that the tables of tests/rate lack: at T = 1 rate-based training is BPTT, stem included."""

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import model
from model.layer import NEURONS, SURROGATES, lif, make_neuron
from tests.rate.method_helpers import (
    MODES,
    SETTING,
    assert_same_gradients,
    images,
    labels,
    randomise_batch_norms,
    train_step,
)

SIZE = {"sew_resnet34": 32, "preact_resnet34": 32, "spikformer": 16, "spikformer_small": 16}


def check_one_step(net: nn.Module, size: int, mode: str) -> None:
    torch.manual_seed(0)
    net = randomise_batch_norms(net.double())
    x, y = images(1, 2, 3, size), labels(2)
    bptt = train_step(SETTING["bptt"](net, 1, mode), x, y, mode)
    rate = train_step(SETTING["rate"](net, 1, mode), x, y, mode)
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(rate.grads, bptt.grads, 1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", SIZE)
def test_one_step_of_rate_training_equals_bptt(arch, mode):
    check_one_step(getattr(model, arch)(num_classes=5), SIZE[arch], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("arch", ["resnet18", "vggsnn_small", "spikformer_small"])
def test_one_step_of_every_neuron_equals_bptt(arch, kind, mode):
    check_one_step(getattr(model, arch)(num_classes=5, in_channel=3, neuron=kind), 8, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SURROGATES)
def test_one_step_of_every_surrogate_equals_bptt(name, mode):
    check_one_step(model.vggsnn_small(num_classes=5, in_channel=3, surrogate=name, alpha=3.0), 8, mode)


def test_alpha_is_the_slope_of_the_surrogate():
    """Of sigmoid a / 4 at the threshold, as the paper has it; what is steeper is so in all of them."""
    for name in SURROGATES:
        slopes = []
        for alpha in (1.0, 2.0):
            x = torch.tensor(1.0, requires_grad=True)
            make_neuron(surrogate=name, alpha=alpha)(x).backward()
            slopes.append(x.grad.item())
        assert slopes[1] > slopes[0], name
    x = torch.tensor(1.0, requires_grad=True)
    lif()(x).backward()
    assert x.grad == 1.0
    for options in ({"surrogate": "step"}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match="|".join([*SURROGATES, "greater than 0"])):
            make_neuron(**options)


def test_neurons_by_name():
    x = torch.linspace(-1, 3, 7).expand(4, 7)
    fired = {}
    for name in NEURONS:
        net = make_neuron(name, decay=0.5, thresh=1.5)
        functional.set_step_mode(net, "m")
        fired[name] = net(x)
    assert torch.equal(fired["plif"], fired["lif"]), "the learned decay starts where the fixed one is"
    assert fired["if"].sum() > fired["lif"].sum(), "without a leak neurons fire more often"
    with pytest.raises(ValueError, match="lif, plif, if"):
        make_neuron("izhikevich")


@pytest.mark.parametrize("arch", model.MODELS)
def test_every_network_takes_a_neuron(arch):
    net = model.MODELS[arch](neuron="plif", decay=0.3)
    kinds = {type(m) for m in net.modules() if isinstance(m, neuron.BaseNode)}
    assert kinds == {neuron.ParametricLIFNode}


def test_spikformer_is_spikingjelly_s_with_the_project_s_neuron():
    """SpikingJelly's serves step mode 'm' alone; same weights, same logits."""
    theirs = pytest.importorskip("spikingjelly.activation_based.model.spikformer")
    if not hasattr(theirs, "spikformer_cifar10"):
        pytest.skip("this SpikingJelly's spikformer has no patches of 4x4")
    ours = randomise_batch_norms(model.spikformer_small(num_classes=5).double())
    size = {"img_size_h": 16, "img_size_w": 16, "patch_size": 4}
    other = theirs.Spikformer(3, 3, **size, num_classes=5, embed_dims=128, num_heads=4, depths=2,
                              spiking_neuron=lambda **_: lif()).double()  # fmt: skip
    for block in other.blocks:
        block.attn.attn_lif.v_threshold = 0.5
    for mine, its in zip(ours.parameters(), other.parameters(), strict=True):
        its.data = mine.data.reshape(its.shape)
    functional.set_step_mode(ours, "m")
    functional.set_step_mode(other, "m")
    x = images(3, 2, 3, 16)
    with torch.no_grad():
        logits = ours(x)
        torch.testing.assert_close(logits, other(x).mean(0), rtol=1e-10, atol=1e-10)
    assert logits.std() > 1e-3, "nothing to compare: no neuron fires"
