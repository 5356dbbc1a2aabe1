"""Deterministic weights, inputs and fingerprints: the same recipe on any implementation of a network.

Weights are set by shape and by the order in which layers of that shape run, so that module names do not matter.
`fingerprints.json` holds what the authors' published code gives for such a network and batch, in float64.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def seed_of(shape: tuple[int, ...], k: int) -> int:
    return (1_000_003 * (k + 1) + sum(d * 31**i for i, d in enumerate(shape))) % (2**31)


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers_in_order(net: nn.Module, run: Callable[[], object]) -> list[nn.Module]:
    """Conv2d and Linear modules in the order of their first call while run() executes."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, _args: tuple) -> None:
        if all(module is not other for other in seen):
            seen.append(module)

    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    handles = [m.register_forward_pre_hook(note) for m in layers]
    run()
    for handle in handles:
        handle.remove()
    return seen


def numbered(layers: list[nn.Module]) -> Iterator[tuple[nn.Module, tuple[int, ...], int]]:
    """Each layer with the shape of its weight and how many layers of that shape ran before it."""
    count: dict[tuple[int, ...], int] = {}
    for m in layers:
        shape = tuple(m.weight.shape)
        k = count.get(shape, 0)
        count[shape] = k + 1
        yield m, shape, k


@torch.no_grad()
def fill(net: nn.Module, layers: list[nn.Module]) -> None:
    for m, shape, k in numbered(layers):
        fan_in = m.weight[0].numel()
        std = math.sqrt(2 / fan_in) if m.weight.dim() == 4 else 1 / math.sqrt(fan_in)
        m.weight.copy_(std * randn(shape, seed_of(shape, k)))
        if m.bias is not None:
            m.bias.zero_()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.fill_(1.0)
            m.bias.fill_(0.2)


def batch(t: int, b: int, c: int, size: int, classes: int, static: bool = True) -> tuple[Tensor, Tensor]:
    """x [B, C, size, size] where ``static``, else [T, B, C, size, size]; y [B]."""
    x = randn((b, c, size, size), 11) if static else (randn((t, b, c, size, size), 12) > 1.0).double()
    y = torch.randint(0, classes, (b,), generator=torch.Generator().manual_seed(13))
    return x, y


def fingerprint(net: nn.Module, layers: list[nn.Module]) -> dict:
    """One row a conv/linear weight, in order: shape, norm of the gradient, its dot product with a fixed direction."""
    rows = []
    for m, shape, k in numbered(layers):
        g = m.weight.grad
        dot = (g * randn(shape, seed_of(shape, k) + 1)).sum().item()
        rows.append({"shape": list(shape), "k": k, "norm": g.norm().item(), "dot": dot})
    bn = sorted(
        [m.weight.shape[0], m.weight.grad.norm().item(), m.bias.grad.norm().item()]
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d)
    )
    return {"weights": rows, "batchnorm": bn}
