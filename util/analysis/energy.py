"""Operations of one inference, and an estimate of their energy.

Counted by SpikingJelly's op counters as the network runs: a convolution or linear layer that sees nothing but spikes
needs an accumulation (AC) for each weight that a spike meets; any other, as behind an average pool, does MACs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..train.setup import Setup
from .gradients import weight_layers
from .report import Row, name_layers, picture

try:
    from spikingjelly.activation_based import op_counter
except ImportError:  # before SpikingJelly 2
    op_counter = None

# Horowitz, "Computing's energy problem", ISSCC 2014: 32-bit floating point in 45 nm; memory is not in it.
PICOJOULES_PER_MAC = 4.6
PICOJOULES_PER_AC = 0.9
CONSTANTS = f"{PICOJOULES_PER_MAC} pJ a MAC, {PICOJOULES_PER_AC} pJ an AC (45 nm, float32; Horowitz 2014), no memory"
WEIGHT_LAYERS, WHOLE = "weight layers together", "all modules but BatchNorm"


@torch.no_grad()
def measure(setup: Setup) -> list[Row]:
    """Per sample, mean over the test samples: a row a weight layer, then these together, then the whole network.

    BatchNorm is left out, for a convolution can take it over in inference. ``dense_mac``: what a network without spikes
    would need in one pass; ``energy_mj``, ``dense_energy_mj``: the two in millijoules by `CONSTANTS`.

    Args:
        setup: its network in step mode 'm', set up for BPTT.

    Raises:
        UserError: this version of SpikingJelly has no op counters.
    """
    if op_counter is None:
        raise UserError("energy needs the op counters of SpikingJelly 2: install a newer spikingjelly")
    net = setup.net.eval()
    layers = weight_layers(net)
    ignored = [nn.modules.batchnorm._BatchNorm]
    synaptic, mac, ac = (
        kind(extra_ignore_modules=ignored)
        for kind in (op_counter.SynOpCounter, op_counter.MACCounter, op_counter.ACCounter)
    )
    dense = dict.fromkeys(layers, 0)
    handles = [module.register_forward_hook(_dense_counter(dense, name)) for name, module in layers.items()]
    samples = 0
    try:
        for x, _ in setup.test_loader:
            with op_counter.DispatchCounterMode([synaptic, mac, ac]):
                setup.method.forward(net, x.to(setup.device))
            samples += len(x)
    finally:
        for handle in handles:
            handle.remove()

    def of(counter: "op_counter.BaseCounter", name: str) -> float:
        return sum(counter.records.get(f"{type(net).__name__}.{name}", {}).values()) / samples

    rows = [_row(name, of(synaptic, name), of(mac, name), dense[name] / samples) for name in layers]
    sums = [sum(row[column] for row in rows) for column in ("ac", "mac", "dense_mac")]
    whole = ac.get_total() / samples, mac.get_total() / samples, sums[2]
    return [*rows, _row(WEIGHT_LAYERS, *sums), _row(WHOLE, *whole)]


def _dense_counter(dense: dict[str, int], name: str):
    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:  # out: [T, B, channels, ...] or [T, B, features]
        dense[name] += out[0].numel() * module.weight[0].numel()

    return hook


def _row(name: str, ac: float, mac: float, dense: float) -> Row:
    energy = (mac * PICOJOULES_PER_MAC + ac * PICOJOULES_PER_AC) * 1e-9
    dense_energy = dense * PICOJOULES_PER_MAC * 1e-9
    return {
        "layer": name,
        "ac": ac,
        "mac": mac,
        "dense_mac": dense,
        "energy_mj": energy,
        "dense_energy_mj": dense_energy,
    }


def plot(rows: Sequence[Row], file: Path, title: str) -> None:
    """Operations of each layer, and the energy beside a network's without spikes. Raises OSError."""
    layers = [row for row in rows if row["layer"] not in (WEIGHT_LAYERS, WHOLE)]
    (total,) = [row for row in rows if row["layer"] == WEIGHT_LAYERS]
    places = range(len(layers))
    with picture(file, f"{title}\n{CONSTANTS}", columns=2, size=(13, 5.2)) as ((left, right),):
        for shift, column, color in ((-0.2, "ac", "#2b6cb0"), (0.2, "mac", "#c05621")):
            counts = [row[column] / 1e6 for row in layers]
            left.bar([p + shift for p in places], counts, 0.4, color=color, label=column.upper())
        left.set_ylabel("million operations a sample")
        name_layers(left, [row["layer"] for row in layers], "weight layer, from input to output")
        right.bar([p - 0.2 for p in places], [1e3 * row["energy_mj"] for row in layers], 0.4, color="#2f855a",
                  label=f"this network: {1e3 * total['energy_mj']:.3g} µJ in all")  # fmt: skip
        right.bar([p + 0.2 for p in places], [1e3 * row["dense_energy_mj"] for row in layers], 0.4, color="#a0aec0",
                  label=f"without spikes, one pass: {1e3 * total['dense_energy_mj']:.3g} µJ in all")  # fmt: skip
        right.set_ylabel("µJ a sample")
        name_layers(right, [row["layer"] for row in layers], "weight layer, from input to output")
        for panel in (left, right):
            panel.set_ylim(top=1.2 * panel.get_ylim()[1])  # room for the legend
            panel.legend(fontsize=8)
