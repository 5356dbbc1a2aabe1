"""SpikingJelly's own networks, as its users build them, at sizes a CPU can bear."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg
from torch import nn

try:  # SpikingJelly 2
    from spikingjelly.activation_based.examples.memopt.models import CIFAR10DVSVGG
    from spikingjelly.activation_based.model import ms_resnet, spikformer
except ImportError:
    CIFAR10DVSVGG = ms_resnet = spikformer = None

NEURON = {"spiking_neuron": neuron.LIFNode, "surrogate_function": surrogate.ATan(), "detach_reset": True}


@dataclass(frozen=True)
class Zoo:
    """How to make a network, and what it takes: [T, B, channels, size, size] in step mode 'm'."""

    make: Callable[[], nn.Module]
    channels: int = 3
    size: int = 32
    modes: tuple[str, ...] = ("m", "s")
    time_dim: int = 0  # of the input in step mode 'm'


ZOO = {
    **{
        f"spiking_resnet{n}": Zoo(partial(getattr(spiking_resnet, f"spiking_resnet{n}"), num_classes=10, **NEURON))
        for n in (18, 34, 50)
    },
    **{
        f"sew_resnet{n} {cnf}": Zoo(partial(getattr(sew_resnet, f"sew_resnet{n}"), num_classes=10, cnf=cnf, **NEURON))
        for n, cnf in ((18, "ADD"), (34, "ADD"), (18, "AND"), (18, "IAND"))
    },
    **{
        f"spiking_vgg{n}_bn": Zoo(partial(getattr(spiking_vgg, f"spiking_vgg{n}_bn"), num_classes=10, **NEURON))
        for n in (11, 13)
    },
    "MNISTNet": Zoo(partial(parametric_lif_net.MNISTNet, 8, **NEURON), 1, 28),
    "CIFAR10Net": Zoo(partial(parametric_lif_net.CIFAR10Net, 8, **NEURON)),
    "CIFAR10DVSNet": Zoo(partial(parametric_lif_net.CIFAR10DVSNet, 8, **NEURON), 2, 128),
    "DVSGestureNet": Zoo(partial(parametric_lif_net.DVSGestureNet, 8, **NEURON), 2, 128),
    "DVSGestureNet, ParametricLIFNode": Zoo(
        partial(parametric_lif_net.DVSGestureNet, 8, neuron.ParametricLIFNode, detach_reset=True), 2, 128
    ),
}
if CIFAR10DVSVGG is not None:
    ZOO["CIFAR10DVSVGG"] = Zoo(CIFAR10DVSVGG, 2, 48, ("m",), time_dim=1)
    ZOO["ms_resnet18"] = Zoo(partial(ms_resnet.ms_resnet18, T=1, num_classes=10), modes=("m",))
    ZOO["spikformer_cifar10"] = Zoo(partial(spikformer.spikformer_cifar10, T=1), modes=("m",))


def make(name: str) -> nn.Module:
    """With weights at which every layer fires, in float64, and VGG's linear layers narrow."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = ZOO[name].make()
        _narrow_linear_layers(net)
    net = net.double().to_empty(device="cpu")
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
                flat = module.weight.view(len(module.weight), -1)
                block = torch.randn(64, flat.shape[1], dtype=torch.float64) * (2 / flat.shape[1]) ** 0.5
                for first in range(0, len(flat), 64):
                    rows = flat[first : first + 64]
                    rows.copy_(block.roll(first // 64, 1)[: len(rows)])
                if isinstance(module, nn.Linear):
                    module.weight.mul_(3)
                if module.bias is not None:
                    module.bias.uniform_(0, 2)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(0.3, 0.9)
            elif isinstance(module, neuron.ParametricLIFNode):
                module.w.fill_(0.2)
    return net


def _narrow_linear_layers(net: nn.Module) -> None:
    """64 hidden features in place of VGG's 4096: nearly all of its weights, and of the time that they take."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and 4096 in (child.in_features, child.out_features):
                features = [64 if n == 4096 else n for n in (child.in_features, child.out_features)]
                setattr(parent, name, layer.Linear(*features, step_mode=child.step_mode))
