"""Spikformer (Zhou et al., 2023), a transformer of spikes: spikformer, 4 blocks of 384 channels, and spikformer_small.

SpikingJelly's own serves step mode 'm' alone; this one has its structure, of layers that serve both. Tokens stay a map
[..., C, H, W], on which a linear layer is a 1x1 convolution.
"""

import torch
from spikingjelly.activation_based import layer
from torch import nn

from model.layer import SpikingClassifier, conv_bn, make_neuron


class SelfAttention(nn.Module):
    """Spiking self-attention: q, k and v are spikes, so that there is no softmax: LIF((q k^T) v / 8), conv1x1-BN-LIF.

    The LIF behind the product has half the threshold. In rate-based training gradients are those of the product of
    rates, which is the mean of the spikes' products only at T = 1; values are those of spikes as ever.
    """

    def __init__(self, channels: int, heads: int, **neuron):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Sequential(*conv_bn(channels, 3 * channels, kernel=1), make_neuron(**neuron))
        self.fire = make_neuron(**{**neuron, "thresh": neuron.get("thresh", 1.0) / 2})
        self.project = nn.Sequential(*conv_bn(channels, channels, kernel=1), make_neuron(**neuron))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, B, C, H, W] or [B, C, H, W] -> the same."""
        # q, k, v: [..., heads, C / heads, H * W]
        q, k, v = self.qkv(x).flatten(-2).unflatten(-2, (3, self.heads, -1)).unbind(-4)
        # v (k^T q) as (v k^T) q: linear in the number of tokens
        product = (v @ k.transpose(-2, -1)) @ q * 0.125
        return self.project(self.fire(product.reshape(x.shape)))


class Residual(nn.Module):
    """x + body(x): spikes added to small whole numbers."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


def _stem(in_channel: int, channels: int, **neuron) -> list[nn.Module]:
    """Four conv3x3-BN-LIF up to ``channels``, the last two with a max pool before the LIF: patches of 4x4; position."""
    layers: list[nn.Module] = []
    width = in_channel
    for divisor in (8, 4, 2, 1):
        pool = [layer.MaxPool2d(3, stride=2, padding=1)] if divisor <= 2 else []
        layers += [*conv_bn(width, channels // divisor), *pool, make_neuron(**neuron)]
        width = channels // divisor
    position = nn.Sequential(*conv_bn(width, width), make_neuron(**neuron))
    return [*layers, Residual(position)]


def _mlp(channels: int, **neuron) -> nn.Sequential:
    """Two conv1x1-BN-LIF, four times as wide between them."""
    wide = 4 * channels
    return nn.Sequential(
        *conv_bn(channels, wide, kernel=1),
        make_neuron(**neuron),
        *conv_bn(wide, channels, kernel=1),
        make_neuron(**neuron),
    )


def _spikformer(depth: int, channels: int, heads: int, num_classes: int, in_channel: int, **neuron):
    layers = _stem(in_channel, channels, **neuron)
    for _ in range(depth):
        layers += [Residual(SelfAttention(channels, heads, **neuron)), Residual(_mlp(channels, **neuron))]
    features = nn.Sequential(*layers, layer.AdaptiveAvgPool2d(1), layer.Flatten())
    net = SpikingClassifier(features, layer.Linear(channels, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    nn.init.zeros_(net.classifier.bias)
    return net


def spikformer(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """Spikformer-4-384, the one of the CIFAR tables: 4 blocks, 384 channels, 12 heads, patches of 4x4 pixels.

    ``neuron``: see `model.layer.make_neuron`. Serves event frames with ``in_channel=2``, and any image size.
    """
    return _spikformer(4, 384, 12, num_classes, in_channel, **neuron)


def spikformer_small(num_classes: int = 10, in_channel: int = 3, **neuron) -> SpikingClassifier:
    """2 blocks, 128 channels, 4 heads: for a computer without a GPU. Not a published network."""
    return _spikformer(2, 128, 4, num_classes, in_channel, **neuron)
