"""Rate-based gradients beside BPTT's, layer by layer, and the term that the method drops."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..rate.check import compare_gradients
from ..train.method import Method
from .report import Row, colors, name_layers, picture

QUANTITIES = {
    "cosine": "cosine of the two gradients",
    "norm_ratio": "norm, rate-based over BPTT's",
    "dropped": "dropped term over BPTT's gradient",
}


def weight_layers(net: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers by name, in the order of the modules."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def weights_of(net: nn.Module) -> list[str]:
    """The names of the layers' weights, from input to output: parameters with more than one dimension."""
    return [name for name, p in net.named_parameters() if p.dim() > 1]


def compare_layers(net: nn.Module, x: Tensor, y: Tensor, time_dim: int = 0) -> list[Row]:
    """One row for all parameters together (``parameter`` ""), then one for each layer's weight, in order.

    The cosine, and the norm of the rate-based gradient over BPTT's, are None where no gradient comes to a layer. Works
    on copies of ``net`` in float64, step mode 'm'.

    Args:
        x: [T, B, ...] (time at ``time_dim``).
        y: [B], labels.
    """
    found = compare_gradients(net, x, y, "m", time_dim=time_dim)
    rows = []
    for layer, name in enumerate(["", *weights_of(net)]):
        cosine, ratio = found.get(name, (None, None))
        rows.append({"layer": layer or None, "parameter": name, "cosine": cosine, "norm_ratio": ratio})
    return rows


def dropped_terms(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The part of a weight's gradient that its layer loses by knowing its input's mean over time alone.

    BPTT's gradient of a convolution's or linear layer's weight is sum_t delta[t] s[t]; with the mean input it were
    (sum_t delta[t]) mean_t s[t]. The value is the norm of the difference over that of the whole, of a layer by itself:
    delta is BPTT's. 0 where the input is the same at every step.

    Args:
        net: set up for BPTT in step mode 'm', time first, its parameters in the precision of ``x``.
        x: [T, B, ...].
        y: [B], labels.
    """
    seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda delta: seen.__setitem__(name, (module, args[0].detach(), delta)))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in weight_layers(net).items()]
    try:
        functional.reset_net(net)
        out = net(x)
        nn.functional.cross_entropy(out.mean(0) if out.dim() == 3 else out, y).backward()
    finally:
        for handle in handles:
            handle.remove()
    functional.reset_net(net)
    found = {f"{name}.weight": _dropped(*what) for name, what in seen.items() if len(what[1]) == len(x)}
    net.zero_grad(set_to_none=True)
    return {name: value for name, value in found.items() if value is not None}


def _dropped(module: nn.Module, x: Tensor, delta: Tensor) -> float | None:
    """``x``: the inputs [T, B, ...]; ``delta``: the gradients of the outputs [T, B, ...]."""

    def gradient(x: Tensor, delta: Tensor) -> Tensor:
        return torch.autograd.grad(module(x), module.weight, delta)[0]

    whole = gradient(x, delta)
    kept = gradient(x.mean(0, keepdim=True), delta.sum(0, keepdim=True))
    size = whole.norm()
    return ((whole - kept).norm() / size).item() if size else None


def measure(net: nn.Module, method: Method, x: Tensor, y: Tensor) -> list[Row]:
    """`compare_layers` on one batch, with the dropped term of each layer.

    Args:
        net: in float32, ``method`` attached: BPTT in step mode 'm'.
        x: images [B, C, H, W] or frames [B, T, C, H, W].
        y: [B], labels.
    """
    shown = method.time_first(x)
    net.train()
    rows = compare_layers(net, shown, y)
    dropped = dropped_terms(copy.deepcopy(net).double(), shown.double(), y)
    return [{**row, "dropped": dropped.get(row["parameter"])} for row in rows]


def draw_layers(axes: Axes, rows: Sequence[Row], quantity: str, **style) -> None:
    """A curve over the layers, each at its place; it has a gap where a layer has no value.

    ``rows``: of one network in one state, as of `compare_layers`.
    """
    layers = [row for row in rows if row["parameter"]]
    values = [float("nan") if row[quantity] is None else row[quantity] for row in layers]
    axes.plot(range(len(values)), values, **{"marker": ".", "lw": 1.2, **style})
    axes.set_xlim(-0.5, len(values) - 0.5)


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """A panel a quantity over the layers, a colour an epoch. Raises OSError."""
    epochs = list(dict.fromkeys(row["epoch"] for row in rows))
    color = colors(epochs)
    with picture(file, title, columns=3, size=(14, 4.8)) as axes:
        for panel, (quantity, label) in zip(axes[0], QUANTITIES.items(), strict=True):
            for epoch in epochs:
                own = [row for row in rows if row["epoch"] == epoch]
                draw_layers(panel, own, quantity, color=color[epoch], label=f"epoch {epoch}")
            names = [row["parameter"].removesuffix(".weight") for row in own if row["parameter"]]
            name_layers(panel, names, "layer, from input to output")
            panel.set_ylabel(label)
            panel.set_ylim(bottom=min(0, panel.get_ylim()[0]), top=max(1.05, panel.get_ylim()[1]))
            panel.axhline(0 if quantity == "dropped" else 1, color="#999999", lw=0.6)
        axes[0][0].legend(fontsize=7)
