"""The networks that are too deep for the tables of tests/rate: at T = 1 rate-based training is BPTT, stem included."""

import pytest
import torch

import model
from tests.rate.method_helpers import (
    MODES,
    SETTING,
    assert_same_gradients,
    images,
    labels,
    randomise_batch_norms,
    train_step,
)

SIZE = {"sew_resnet34": 32, "preact_resnet34": 32}


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
