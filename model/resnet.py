"""Spiking ResNets for images of 32x32 and thereabouts: resnet18 and the wider, shallower resnet19."""

import torch
from spikingjelly.activation_based import layer
from torch import nn

from model.layer import SpikingClassifier, add_stages, conv_bn, make_neuron


class BasicBlock(nn.Module):
    """conv-BN-LIF-conv-BN, plus the shortcut (identity, or conv1x1-BN where the shape changes), then LIF."""

    def __init__(self, in_channel: int, out_channel: int, stride: int, **neuron):
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(in_channel, out_channel, stride=stride), make_neuron(**neuron), *conv_bn(out_channel, out_channel)
        )
        same_shape = in_channel == out_channel and stride == 1
        self.shortcut = nn.Sequential(
            *([] if same_shape else conv_bn(in_channel, out_channel, kernel=1, stride=stride))
        )
        self.fire = make_neuron(**neuron)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fire(self.body(x) + self.shortcut(x))


def _features(
    in_channel: int, stem: int, plan: list[tuple[int, int, int]], **neuron
) -> tuple[nn.Sequential, dict[str, int]]:
    """Stem, stages (``plan``: of `add_stages`), global average pool, flatten; and the stages' names."""
    layers = [*conv_bn(in_channel, stem), make_neuron(**neuron)]
    stages = add_stages(layers, BasicBlock, plan, stem, **neuron)
    return nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten()), stages


def resnet18(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Four stages of two blocks, 64 to 512 channels. ``neuron``: see `model.layer.make_neuron`."""
    features, stages = _features(in_channel, 64, [(2, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 2)], **neuron)
    return SpikingClassifier(features, layer.Linear(512, num_classes), stages)


def resnet19(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Stages of [3, 3, 2] blocks, 128 to 512 channels, and a spiking hidden layer of 256 before the output."""
    features, stages = _features(in_channel, 128, [(3, 128, 1), (3, 256, 2), (2, 512, 2)], **neuron)
    classifier = nn.Sequential(layer.Linear(512, 256), make_neuron(**neuron), layer.Linear(256, num_classes))
    return SpikingClassifier(features, classifier, stages)
