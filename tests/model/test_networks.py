"""The networks that the tables of tests/rate lack: at T = 1 rate-based training is BPTT, stem included."""

import pytest
import torch
from spikingjelly.activation_based import functional

import model
from model.layer import lif
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", SIZE)
def test_one_step_of_rate_training_equals_bptt(arch, mode):
    torch.manual_seed(0)
    net = randomise_batch_norms(getattr(model, arch)(num_classes=5).double())
    x, y = images(1, 2, 3, SIZE[arch]), labels(2)
    bptt = train_step(SETTING["bptt"](net, 1, mode), x, y, mode)
    rate = train_step(SETTING["rate"](net, 1, mode), x, y, mode)
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(rate.grads, bptt.grads, 1e-9)


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
