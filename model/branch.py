"""A branch: a small ordinary network that learns to classify from the rates behind a stage of a spiking one."""

from torch import Tensor, nn


class BranchBlock(nn.Module):
    """Depthwise separable 3x3 convolutions twice, the first of stride 2, plus a 1x1 shortcut: half the size."""

    def __init__(self, in_channel: int, out_channel: int):
        super().__init__()
        self.body = nn.Sequential(
            *_separable(in_channel, in_channel, stride=2), *_separable(in_channel, out_channel, stride=1)
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channel, out_channel, 1, stride=2, bias=False), nn.BatchNorm2d(out_channel)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H / 2, W / 2], rounded up."""
        return (self.body(x) + self.shortcut(x)).relu()


def _separable(in_channel: int, out_channel: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(in_channel, in_channel, 3, stride=stride, padding=1, groups=in_channel, bias=False)
    pointwise = nn.Conv2d(in_channel, out_channel, 1, bias=False)
    return [depthwise, pointwise, nn.BatchNorm2d(out_channel), nn.ReLU()]


def branch(in_channel: int, num_classes: int, widest: int = 512) -> nn.Sequential:
    """Blocks that double the channels up to ``widest``, global average pool, one linear layer: [B, C, H, W] -> logits.

    As in "Enhanced Self-Distillation Framework for Efficient Spiking Neural Network Training" (arXiv 2510.06254); with
    a pool to 1x1, where the published one serves a single size of images.
    """
    blocks = []
    while in_channel < widest:
        blocks.append(BranchBlock(in_channel, min(2 * in_channel, widest)))
        in_channel = min(2 * in_channel, widest)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channel, num_classes))
