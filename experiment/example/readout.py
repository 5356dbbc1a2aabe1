"""Regression and segmentation, read from membrane potentials: a last layer that integrates and never fires.

python experiment/example/readout.py        needs `pip install .`
"""

import torch
from rate_backprop import rate_model_setting
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn
from torch.nn import functional as F

T = 8
torch.manual_seed(0)


class Readout(nn.Module):
    """A body, and on it neurons whose threshold is never reached: their potential after T steps is the output."""

    def __init__(self, *body: nn.Module):
        super().__init__()
        self.body = nn.Sequential(*body)
        self.membrane = neuron.LIFNode(v_threshold=1e9, v_reset=None)

    def forward(self, x: Tensor) -> Tensor:  # [T, B, ...] -> [B, ...]
        self.membrane(self.body(x))
        return self.membrane.v


def train(net: nn.Module, draw, loss, steps: int) -> Tensor:
    rate_model_setting(net, time_step=T, step_mode="m")
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=5e-3), []
    for _ in range(steps):
        x, y = draw()
        functional.reset_net(net)
        losses.append(loss(net(x.expand(T, *x.shape)), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses[-10:]).mean().detach()  # of the last ten steps


def angles() -> tuple[Tensor, Tensor]:
    x = 2 * torch.rand(64, 2) - 1
    return x, torch.sin(3 * x[:, :1]) * x[:, 1:]


def squares() -> tuple[Tensor, Tensor]:
    """Noisy images and the pixels [B, 1, 16, 16] of a square in them, 1 or 0."""
    across, down = (torch.arange(16) - torch.randint(12, (2, 16, 1, 1, 1))).unbind()  # from the square's edges
    across, down = (across >= 0) & (across < 4), (down >= 0) & (down < 4)
    mask = (across & down.transpose(-1, -2)).float()
    return mask + 0.5 * torch.randn(16, 1, 16, 16), mask


regression = Readout(layer.Linear(2, 128), neuron.LIFNode(v_threshold=0.3), layer.Linear(128, 1))
print(f"regression: mean squared error {train(regression, angles, F.mse_loss, 300):.3f}")
first, last = layer.Conv2d(1, 16, 5, padding=2), layer.Conv2d(16, 1, 5, padding=2)
segmentation = Readout(first, layer.BatchNorm2d(16), neuron.LIFNode(), last)
print(f"segmentation: cross-entropy {train(segmentation, squares, F.binary_cross_entropy_with_logits, 100):.3f}")
