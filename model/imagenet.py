"""Spiking ResNets for images of 224x224 and thereabouts: sew_resnet34 and preact_resnet34.

Both have a stem of a 7x7 convolution and a max pool that together divide the size by 4, and convolutions with a bias.
"""

import torch
from spikingjelly.activation_based import layer
from torch import nn

from model.layer import SpikingClassifier, add_stages, conv_bn, make_neuron

_STAGES = [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)]  # blocks, channels, stride of the first block


def _shortcut(in_channel: int, out_channel: int, stride: int) -> list[nn.Module]:
    """Nothing where a block keeps the shape, else conv1x1-BN."""
    if in_channel == out_channel and stride == 1:
        return []
    return conv_bn(in_channel, out_channel, kernel=1, stride=stride, bias=True)


class SEWBlock(nn.Module):
    """conv-BN-LIF-conv-BN-LIF, plus the shortcut (identity, or conv1x1-BN-LIF where the shape changes).

    Spikes are added to spikes (spike-element-wise, ADD; Fang et al., 2021): what comes out are small whole numbers.
    """

    def __init__(self, in_channel: int, out_channel: int, stride: int, **neuron):
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(in_channel, out_channel, stride=stride, bias=True), make_neuron(**neuron),
            *conv_bn(out_channel, out_channel, bias=True), make_neuron(**neuron),
        )  # fmt: skip
        down = _shortcut(in_channel, out_channel, stride)
        self.shortcut = nn.Sequential(*down, *([make_neuron(**neuron)] if down else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


class PreActBlock(nn.Module):
    """LIF-conv-BN-LIF-conv-BN, plus the shortcut (identity, or conv1x1-BN where the shape changes): real numbers."""

    def __init__(self, in_channel: int, out_channel: int, stride: int, **neuron):
        super().__init__()
        self.body = nn.Sequential(
            make_neuron(**neuron), *conv_bn(in_channel, out_channel, stride=stride, bias=True),
            make_neuron(**neuron), *conv_bn(out_channel, out_channel, bias=True),
        )  # fmt: skip
        self.shortcut = nn.Sequential(*_shortcut(in_channel, out_channel, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


def _resnet34(block: type[nn.Module], fire: list[nn.Module], num_classes: int, in_channel: int, **neuron):
    """Stem (``fire``: what stands between its BatchNorm and its pool), four stages, global average, linear layer."""
    layers = [*conv_bn(in_channel, 64, kernel=7, stride=2, bias=True), *fire, layer.MaxPool2d(3, stride=2, padding=1)]
    stages = add_stages(layers, block, _STAGES, 64, **neuron)
    features = nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten())
    return SpikingClassifier(features, layer.Linear(512, num_classes), stages)


def sew_resnet34(num_classes: int = 1000, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Stages of [3, 4, 6, 3] spike-element-wise blocks, 64 to 512 channels. ``neuron``: see `model.layer.make_neuron`.

    The stem's max pool stands on spikes. Rates are pooled too: the rate is the largest of a window,
    which may be less than the rate of the pooled spikes (neurons that fire in turn), and the gradient goes to that
    neuron alone, the first of equals, where BPTT sends each step's to a neuron that fired then. At T = 1 the two are
    the same. Values are those of spikes as ever.
    """
    return _resnet34(SEWBlock, [make_neuron(**neuron)], num_classes, in_channel, **neuron)


def preact_resnet34(num_classes: int = 1000, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Stages of [3, 4, 6, 3] pre-activation blocks, 64 to 512 channels. ``neuron``: see `model.layer.make_neuron`.

    Its max pool stands on real numbers, the stem's, which differ between steps only where the input does.
    """
    return _resnet34(PreActBlock, [], num_classes, in_channel, **neuron)
