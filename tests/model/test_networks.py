"""The project's own networks: at T = 1 rate-based training is BPTT, with each neuron and surrogate; their shapes."""

from functools import lru_cache

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import model
from model.layer import NEURONS, SURROGATES, lif, make_neuron
from tests.rate.method_helpers import (
    MODES,
    SETTING,
    assert_rate_equals_bptt,
    images,
    labels,
    mean_output,
    randomise_batch_norms,
)

# arch: image size, batch size, channels. vggsnn_dvs serves 48x48 alone.
SMALL = {
    "resnet18": (8, 3, 3),
    "resnet19": (8, 2, 3),
    "vggsnn_cifar": (8, 3, 3),
    "vggsnn_dvs": (48, 1, 2),
    "vgg11": (16, 3, 3),
    "vgg13": (16, 3, 3),
    "sew_resnet34": (32, 2, 3),
    "preact_resnet34": (32, 2, 3),
    "spikformer": (16, 2, 3),
    "spikformer_small": (16, 2, 3),
}


@lru_cache(maxsize=1)
def project_net(arch: str) -> nn.Module:
    """Weights of a scale at which every layer fires, whatever the network's own initialisation."""
    torch.manual_seed(0)
    net = getattr(model, arch)(num_classes=10, in_channel=SMALL[arch][2]).double()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5)
    return randomise_batch_norms(net)


STAGES = {
    "resnet18": {"features.4": 64, "features.6": 128, "features.8": 256},
    "resnet19": {"features.5": 128, "features.8": 256},
    "vggsnn_dvs": {"features.6": 128, "features.13": 256, "features.20": 512},
    "sew_resnet34": {"features.6": 64, "features.10": 128, "features.16": 256},
    "vggsnn_small": {"features.4": 32, "features.8": 64},
    "spikformer": {},
}


@pytest.mark.parametrize("arch", STAGES)
def test_stages_but_the_last_are_named_with_the_channels_that_they_put_out(arch):
    net, found = getattr(model, arch)(in_channel=2), {}
    assert net.stages == STAGES[arch]
    for name in net.stages:
        net.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: found.update({name: y.shape[1]}))
    with torch.no_grad():
        net.features(torch.zeros(2, 2, 32, 32))
    assert found == net.stages


@pytest.mark.cover(1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", SMALL)
def test_one_step_of_rate_training_equals_bptt(arch, mode):
    size, b, channels = SMALL[arch]
    assert_rate_equals_bptt(project_net(arch), images(1, b, channels, size), labels(b), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ["resnet18", "vggsnn_cifar"])
def test_the_output_of_many_steps_is_bptt_s(arch, mode):
    size, b, channels = SMALL[arch]
    net, x = project_net(arch), images(3, b, channels, size)
    functional.reset_net(net)
    with torch.no_grad():
        expected = mean_output(SETTING["bptt"](net, 3, mode), x, mode)
    functional.reset_net(net)
    found = mean_output(SETTING["rate"](net, 3, mode), x, mode).detach()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def small(arch: str, **neuron) -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(getattr(model, arch)(num_classes=5, in_channel=3, **neuron).double())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NEURONS)
@pytest.mark.parametrize("arch", ["resnet18", "vggsnn_small", "spikformer_small"])
def test_one_step_of_every_neuron_equals_bptt(arch, kind, mode):
    assert_rate_equals_bptt(small(arch, neuron=kind), images(1, 2, 3, 8), labels(2), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SURROGATES)
def test_one_step_of_every_surrogate_equals_bptt(name, mode):
    net = small("vggsnn_small", surrogate=name, alpha=3.0)
    assert_rate_equals_bptt(net, images(1, 2, 3, 8), labels(2), mode)


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
    fired, left = {}, {}
    for name in NEURONS:
        net = make_neuron(name, decay=0.4, thresh=1.5)
        functional.set_step_mode(net, "m")
        fired[name], left[name] = net(x), net.v
    torch.testing.assert_close(left["plif"], left["lif"], msg="the learned decay starts where the fixed one is")
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
