"""What the tests of the method share: small networks in float64, one training step of them, and comparisons."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from util.rate.saved import saved_for_backward
from util.util import bptt_model_setting, rate_model_setting

MODES = ("m", "s")
CLASSES = 5
SETTING = {"bptt": bptt_model_setting, "rate": rate_model_setting}


def lif_node(**options) -> neuron.LIFNode:
    """LIF with the method's defaults: decay 0.2, input not decayed, soft detached reset, Sigmoid(4)."""
    defaults = {"tau": 1.25, "decay_input": False, "v_reset": None, "detach_reset": True}
    return neuron.LIFNode(**{**defaults, "surrogate_function": surrogate.Sigmoid(4.0), **options})


def tiny_net(make_neuron: Callable[[], nn.Module] = lif_node, seed: int = 0) -> nn.Sequential:
    """conv-BN-neuron-conv-BN-neuron-linear for [.., 2, 6, 6] images; mode 'm' puts out [T, B, classes]."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        OrderedDict(
            conv1=layer.Conv2d(2, 4, 3, padding=1, bias=True),
            bn1=layer.BatchNorm2d(4),
            fire1=make_neuron(),
            conv2=layer.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
            bn2=layer.BatchNorm2d(6),
            fire2=make_neuron(),
            flat=layer.Flatten(),
            head=layer.Linear(6 * 3 * 3, CLASSES),
        )
    )
    return randomise_batch_norms(net.double())


def randomise_batch_norms(net: nn.Module) -> nn.Module:
    """Weights about 1 and biases about 0.5, so that neurons fire and no channel is like another."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                module.weight.uniform_(0.7, 1.3)
                module.bias.uniform_(0.2, 0.8)
    return net


def net_with(module: nn.Module, before: str = "conv2", name: str = "extra") -> nn.Sequential:
    """`tiny_net` with one more module in front of ``before``."""
    layers = OrderedDict()
    for child_name, child in tiny_net().named_children():
        if child_name == before:
            layers[name] = module
        layers[child_name] = child
    return nn.Sequential(layers).double()


class Wrapped(nn.Module):
    """A network whose forward is ``function(self, x)``."""

    def __init__(self, function: Callable, body: nn.Module | None = None):
        super().__init__()
        self.body, self.function = body or tiny_net(), function

    def forward(self, x: Tensor):
        return self.function(self, x)


def between(function: Callable) -> Callable:
    """A forward for `Wrapped`: ``function(y, net)`` between its first neurons and what comes then."""
    return lambda net, x: net.body[3:](function(net.body[:3](x), net))


def images(t: int, b: int = 3, channels: int = 2, size: int = 6, seed: int = 1) -> Tensor:
    """[T, B, C, H, W], another image at every step."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((t, b, channels, size, size), generator=generator, dtype=torch.float64)


def labels(b: int = 3, classes: int = CLASSES) -> Tensor:
    return torch.arange(b) % classes


def attached(net: nn.Module, method: str, time_step: int, mode: str) -> nn.Module:
    """A copy of ``net`` set to train with 'bptt' or 'rate'."""
    return SETTING[method](copy.deepcopy(net), time_step, mode)


def outputs(net: nn.Module, x: Tensor, mode: str) -> Tensor:
    """Every step's output [T, B, classes], or [B, classes] where the network averages over time itself."""
    return net(x) if mode == "m" else torch.stack([net(step) for step in x])


def mean_output(net: nn.Module, x: Tensor, mode: str) -> Tensor:
    """The time-averaged output [B, classes]."""
    out = outputs(net, x, mode)
    return out.mean(0) if out.dim() == 3 else out


def bytes_saved(net: nn.Module, x: Tensor, method: str, mode: str) -> int:
    """Kept for backward at the end of the forward, the loss of the mean output not counted."""
    net = attached(net, method, len(x), mode)
    with saved_for_backward(net) as count:
        out = mean_output(net, x, mode)
        total = count()
    assert out.requires_grad
    return total


@dataclass
class Step:
    """What one training step leaves behind, by name."""

    output: Tensor
    grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    potentials: dict[str, Tensor]


def train_step(net: nn.Module, x: Tensor, y: Tensor, mode: str) -> Step:
    """Reset, forward, backward of the cross-entropy of the time-averaged output, on fresh gradients."""
    functional.reset_net(net)
    net.zero_grad(set_to_none=True)
    out = mean_output(net, x, mode)
    F.cross_entropy(out, y).backward()
    return Step(out.detach(), gradients(net), state_of(net.named_buffers()), potentials(net))


def assert_rate_equals_bptt(net: nn.Module, x: Tensor, y: Tensor, mode: str) -> None:
    """Oracle 1, for ``x`` of one step: outputs and gradients of rate-based training are BPTT's.

    ``net`` itself is trained by the one method and then by the other, with the same random numbers.
    """
    found = {}
    for method, setting in SETTING.items():
        torch.manual_seed(3)
        found[method] = train_step(setting(net, len(x), mode), x, y, mode)
    torch.testing.assert_close(found["rate"].output, found["bptt"].output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found["rate"].grads, found["bptt"].grads, 1e-9)


def assert_served(net: nn.Module, x: Tensor, mode: str = "m", train: Callable = train_step) -> None:
    """Outputs and buffers are BPTT's, gradients too at one step and with a window for each step."""
    for steps, windows in ((1, 1), (len(x), 1), (len(x), len(x))):
        found, where = [], f"T = {steps}, {windows} windows"
        for setting, options in ((bptt_model_setting, {}), (rate_model_setting, {"windows": windows})):
            torch.manual_seed(3)
            trained = setting(copy.deepcopy(net), steps, mode, **options)
            found.append(train(trained, x[:steps], labels(x.shape[1]), mode))
        bptt, rate = found
        torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12, msg=lambda m, w=where: f"{w}: {m}")
        assert_same_tensors(rate.buffers, bptt.buffers)
        if steps == windows:
            assert_same_gradients(rate.grads, bptt.grads, 1e-9)


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters()}


def state_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named}


def potentials(net: nn.Module) -> dict[str, Tensor]:
    """The membrane potentials v of all neurons that ran."""
    nodes = {name: m for name, m in net.named_modules() if isinstance(m, neuron.BaseNode)}
    return state_of((name, m.v) for name, m in nodes.items() if isinstance(m.v, Tensor))


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float):
    """Norm of the difference relative to the gradient's own norm, parameter by parameter.

    A gradient that is 0 but for rounding (a bias in front of a BatchNorm) is held against the largest norm instead.
    """
    assert actual.keys() == expected.keys()
    assert [n for n, g in actual.items() if g is None] == [n for n, g in expected.items() if g is None]
    norms = {name: g.norm().item() for name, g in expected.items() if g is not None}
    assert max(norms.values()) > 1e-6, "nothing to compare: all gradients vanish"
    floor = 1e-5 * max(norms.values())
    for name, norm in norms.items():
        difference = (actual[name] - expected[name]).norm().item() / max(norm, floor)
        assert difference <= tolerance, f"{name}: relative difference {difference:.3g}"


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")
