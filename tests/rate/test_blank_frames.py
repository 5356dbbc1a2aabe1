"""Event recordings hold blank frames: a layer without variance at one step must not blow the gradient up."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import layer
from torch import nn

from tests.rate.method_helpers import MODES, attached, gradients, lif_node, mean_output

NORMS = {
    "BatchNorm": lambda: layer.BatchNorm2d(8),
    "GroupNorm": lambda: layer.GroupNorm(2, 8),
    "LayerNorm": lambda: nn.LayerNorm((8, 8)),
}


def gradient_norm(net: nn.Module, method: str, mode: str, x: torch.Tensor) -> float:
    net = attached(net, method, len(x), mode)
    F.cross_entropy(mean_output(net, x, mode), torch.arange(16) % 2).backward()
    return torch.cat([grad.flatten() for grad in gradients(net).values()]).norm().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NORMS)
def test_one_blank_frame_of_four_leaves_the_gradient_near_bptts(kind, mode):
    torch.manual_seed(0)
    blocks = [
        module
        for i in range(4)
        for module in (
            layer.Conv2d(8 if i else 2, 8, 3, padding=1, bias=False),
            NORMS[kind](),
            lif_node(),
        )
    ]
    net = nn.Sequential(*blocks, layer.Flatten(), layer.Linear(8 * 64, 2)).double()
    x = (torch.rand(4, 16, 2, 8, 8) < 0.1).double()
    x[0] = 0
    ratio = gradient_norm(net, "rate", mode, x) / gradient_norm(net, "bptt", mode, x)
    assert 0.1 < ratio < 3
