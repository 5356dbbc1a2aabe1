"""Spiking VGGs, each a row of convolution widths and pools: vggsnn_cifar, vggsnn_dvs, vggsnn_small, vgg11, vgg13."""

from collections.abc import Sequence

from spikingjelly.activation_based import layer
from torch import nn

from model.layer import SpikingClassifier, conv_bn, make_neuron

POOL = "pool"


def _vgg(plan: Sequence[int | str], final_size: int, adaptive: bool, num_classes: int, in_channel: int, **neuron):
    """``plan``: channels of a conv3x3(+bias)-BN-LIF, or POOL for a 2x2 average pool.

    ``final_size``: height and width of the maps the linear layer sees; ``adaptive`` pools to it from any size.
    """
    layers: list[nn.Module] = []
    width, stages = in_channel, {}
    for i, step in enumerate(plan):
        if step == POOL:
            layers.append(layer.AvgPool2d(2))
            if 0 < i < len(plan) - 1:
                stages[f"features.{len(layers) - 1}"] = width
        else:
            layers += [*conv_bn(width, step, bias=True), make_neuron(**neuron)]
            width = step
    if adaptive:
        layers.append(layer.AdaptiveAvgPool2d(final_size))
    features = nn.Sequential(*layers, layer.Flatten())
    return SpikingClassifier(features, layer.Linear(width * final_size**2, num_classes), stages)


def _published_start(net: SpikingClassifier) -> SpikingClassifier:
    """Weights as the published VGGs start: N(0, 0.5^2), biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, 0, 0.5)
            nn.init.zeros_(module.bias)
    return net


def vggsnn_cifar(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Eight convolutions, 64 to 512 channels; 3x3 maps at the end. ``neuron``: see `model.layer.make_neuron`."""
    plan = [64, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512]
    return _published_start(_vgg(plan, 3, True, num_classes, in_channel, **neuron))


def vggsnn_dvs(num_classes: int = 10, in_channel: int = 2, **neuron) -> SpikingClassifier:
    """vggsnn_cifar for event frames of 48x48: a fourth average pool in place of the adaptive one."""
    plan = [64, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL]
    return _published_start(_vgg(plan, 3, False, num_classes, in_channel, **neuron))


def vggsnn_small(num_classes: int = 10, in_channel: int = 2, **neuron) -> SpikingClassifier:
    """Three convolutions, 32 to 128 channels, behind a pool: for event frames on a computer without a GPU.

    Not a published network; weights start as PyTorch's defaults.
    """
    plan = [POOL, 32, POOL, 64, POOL, 128]
    return _vgg(plan, 3, True, num_classes, in_channel, **neuron)


def vgg11(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Eight convolutions, 64 to 512 channels, four pools; 1x1 maps at the end."""
    plan = [64, POOL, 128, 256, POOL, 512, 512, POOL, 512, POOL, 512, 512]
    return _published_start(_vgg(plan, 1, True, num_classes, in_channel, **neuron))


def vgg13(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Ten convolutions, 64 to 512 channels, four pools; 1x1 maps at the end."""
    plan = [64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, 512, POOL, 512]
    return _published_start(_vgg(plan, 1, True, num_classes, in_channel, **neuron))
