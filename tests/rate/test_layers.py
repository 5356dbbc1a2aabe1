"""The layers that a network around spiking neurons may have: each one, in both step modes, against BPTT."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
from torch import Tensor, nn

from tests.rate.method_helpers import (
    CLASSES,
    MODES,
    assert_rate_equals_bptt,
    assert_same_gradients,
    attached,
    bytes_saved,
    labels,
    lif_node,
    outputs,
    randomise_batch_norms,
    train_step,
)

pytestmark = pytest.mark.quick


def steps(module: nn.Module, mode: str) -> nn.Module:
    """A plain torch module that knows nothing of a time dimension."""
    return layer.SeqToANNContainer(module) if mode == "m" else module


def convolution(n: int, kind: str, **options) -> Callable[[str], nn.Module]:
    return lambda mode: getattr(layer, f"{kind}{n}d")(4, 6, 3, **options)


def plain(make: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    return lambda mode: steps(make(), mode)


def same(make: Callable[[], nn.Module]) -> Callable[[str], nn.Module]:
    return lambda mode: make()


LAYERS: dict[str, tuple[int, Callable[[str], nn.Module]]] = {  # spatial dimensions, and how to make it
    **{f"Conv{n}d": (n, convolution(n, "Conv", padding=1, stride=2)) for n in (1, 2, 3)},
    "Conv2d, padding 'same'": (2, convolution(2, "Conv", padding="same", dilation=2)),
    **{f"ConvTranspose{n}d": (n, convolution(n, "ConvTranspose", stride=2, output_padding=1)) for n in (1, 2, 3)},
    **{
        f"torch {kind}{n}d": (n, plain(lambda n=n, kind=kind: getattr(nn, f"{kind}{n}d")(4, 6, 2, groups=2)))
        for kind in ("Conv", "ConvTranspose")
        for n in (1, 2, 3)
    },
    **{f"BatchNorm{n}d": (n, same(lambda n=n: getattr(layer, f"BatchNorm{n}d")(4))) for n in (1, 2, 3)},
    **{f"torch BatchNorm{n}d": (n, plain(lambda n=n: getattr(nn, f"BatchNorm{n}d")(4))) for n in (1, 2, 3)},
    **{
        f"{kind}{n}d": (n, same(lambda n=n, kind=kind: getattr(layer, f"{kind}{n}d")(2)))
        for kind in ("AvgPool", "MaxPool", "AdaptiveAvgPool")
        for n in (1, 2, 3)
    },
    "torch AdaptiveMaxPool2d": (2, plain(lambda: nn.AdaptiveMaxPool2d(2))),
    "torch LPPool2d": (2, plain(lambda: nn.LPPool2d(2, 2))),
    "Linear": (1, same(lambda: layer.Linear(5, 7))),
    "torch Linear": (2, same(lambda: nn.Linear(5, 3, bias=False))),
    "Dropout": (2, same(lambda: layer.Dropout(0.4))),
    "Dropout2d": (2, same(lambda: layer.Dropout2d(0.4))),
    "torch Dropout": (2, same(lambda: nn.Dropout(0.4))),
    "torch Dropout2d": (2, plain(lambda: nn.Dropout2d(0.4))),
    "Flatten": (2, same(lambda: layer.Flatten(2))),
    "torch Upsample": (2, plain(lambda: nn.Upsample(scale_factor=2))),
    "ReLU": (2, same(nn.ReLU)),
    "GELU": (2, same(nn.GELU)),
    "PReLU": (2, plain(lambda: nn.PReLU(4))),
    "GroupNorm": (2, same(lambda: layer.GroupNorm(2, 4))),
    "torch GroupNorm": (2, plain(lambda: nn.GroupNorm(4, 4))),
    "LayerNorm": (2, same(lambda: nn.LayerNorm((5, 5)))),
    "LayerNorm without weights": (1, same(lambda: nn.LayerNorm(5, elementwise_affine=False))),
    "LayerNorm without bias": (1, same(lambda: nn.LayerNorm(5, bias=False))),
    "InstanceNorm2d": (2, plain(lambda: nn.InstanceNorm2d(4, affine=True))),
    "ZeroPad2d": (2, same(lambda: nn.ZeroPad2d(1))),
    "PixelShuffle": (2, plain(lambda: nn.PixelShuffle(2))),
}

if hasattr(layer, "Upsample"):  # SpikingJelly 2
    LAYERS["Upsample"] = (2, same(lambda: layer.Upsample(scale_factor=2, mode="bilinear", align_corners=False)))


def net_around(make: Callable[[str], nn.Module], n: int, mode: str) -> nn.Module:
    """conv-BN-neuron-layer-neuron-linear for [.., 2, 5, ..] inputs with n spatial dimensions."""
    torch.manual_seed(0)
    stem = [getattr(layer, f"Conv{n}d")(2, 4, 3, padding=1), getattr(layer, f"BatchNorm{n}d")(4), lif_node()]
    body = nn.Sequential(*stem, make(mode), lif_node(v_threshold=0.3), layer.Flatten())
    functional.set_step_mode(body, mode)
    with torch.no_grad():
        features = copy.deepcopy(body)(inputs(2, n).float() if mode == "m" else inputs(1, n)[0].float()).shape[-1]
    body.append(layer.Linear(features, CLASSES))
    for module in body.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.7, 1.3)
    return randomise_batch_norms(body.double())


def inputs(t: int, n: int, b: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((t, b, 2, *[5] * n), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_one_step_gives_bptt_s_gradients(mode, name):
    n, make = LAYERS[name]
    assert_rate_equals_bptt(net_around(make, n, mode), inputs(1, n), labels(), mode)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_many_steps_put_out_bptt_s_values_in_the_memory_of_one(mode, name):
    n, make = LAYERS[name]
    net, found = net_around(make, n, mode), []
    for method in ("bptt", "rate"):
        torch.manual_seed(3)
        found.append(outputs(attached(net, method, 3, mode), inputs(3, n), mode).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    one, eight = (bytes_saved(net, inputs(t, n), "rate", mode) for t in (1, 8))
    assert one == eight > 0


def by_hand(norm: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """method.md's BatchNorm of single steps, with a group or row of one sample in place of a channel of the batch.

    x [T, B, C, ...]: the layer's inputs; c [B, C, ...]: their mean, with a graph.
    """
    if isinstance(norm, nn.GroupNorm):
        rows, affine = (norm.num_groups, -1), (-1, *[1] * (x.dim() - 3))
    else:
        rows, affine = (*x.shape[2 : x.dim() - len(norm.normalized_shape)], -1), norm.normalized_shape
    each, mean = x.reshape(*x.shape[:2], *rows), c.reshape(len(c), *rows)
    mu = each.mean(-1).mean(0)
    variance = each.var(-1, unbiased=False).mean(0)
    m = mean.mean(-1)
    m = (mu + m - m.detach()).unsqueeze(-1)
    q = (mean - m).square().mean(-1)
    q = (variance + q - q.detach()).unsqueeze(-1)
    normal = ((mean - m) / (q + norm.eps).sqrt()).view_as(c)
    return normal * norm.weight.view(affine) + norm.bias.view(affine)


class Shift(nn.Module):
    """Adds 0: its parameter's gradient is that of the input's rate."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3, 4, 5, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize("name", ["GroupNorm", "torch GroupNorm", "LayerNorm"])
@pytest.mark.parametrize("mode", MODES)
def test_per_sample_norms_keep_the_spike_pass_s_statistics_as_values(mode, name):
    net = net_around(LAYERS[name][1], 2, mode)
    net[3] = nn.Sequential(Shift(), net[3])
    x = inputs(4, 2)
    spiking, caught = attached(net, "bptt", 4, mode), []
    spiking[2].register_forward_hook(lambda _, args, out: caught.append(out))
    spiking[3].register_forward_hook(lambda _, args, out: caught.append(out))
    with torch.no_grad():
        outputs(spiking, x, mode)
    normed, currents = (torch.cat(caught[i::2]).view(4, 3, *caught[i].shape[-3:]) for i in (0, 1))

    norm = next(module for module in net[3].modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm)))
    node = copy.deepcopy(net[4])
    node.step_mode = "s"
    shift = torch.zeros_like(currents[0], requires_grad=True)
    r = torch.stack([node(current + shift) for current in currents]).mean(0)
    (e,) = torch.autograd.grad(r.sum(), shift)
    c = normed.mean(0).requires_grad_()
    z = by_hand(norm, normed, c)
    out = F.linear((r.detach() + e * (z - z.detach())).flatten(1), net[6].weight, net[6].bias)
    expected = torch.autograd.grad(F.cross_entropy(out, labels()), [norm.weight, norm.bias, c])

    found = train_step(attached(net, "rate", 4, mode), x, labels(), mode).grads
    inner = next(name for name, module in net.named_modules() if module is norm)
    found = [found[name] for name in (f"{inner}.weight", f"{inner}.bias", "3.0.shift")]
    names = ("weight", "bias", "input")
    assert_same_gradients(dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)), 1e-10)
