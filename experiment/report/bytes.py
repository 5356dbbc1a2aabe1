"""How many bytes a rate-based training step has to move, by kind of layer: an account on paper, from shapes alone.

python experiment/report/bytes.py               resnet18, T = 4, batch 128, float32
python experiment/report/bytes.py --T 8 --arch vggsnn_small

Prints the sizes, and how often the spikes of T steps are read or written: by the code as it is, and at the least.
Writes nothing; doc/benchmark/gpu.md quotes it.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from spikingjelly.activation_based import neuron
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import MODELS
from util.util import bptt_model_setting

# Passes over T steps' values in one layer's forward, then over those of one step (rates, in the forward and back).
# As it is, with --compile on a GPU: a convolution reads spikes, writes currents, which its mean reads; BatchNorm reads
# twice and writes, the neurons' kernel reads and writes. At the least: currents are read once for statistics and mean,
# once to be normalised, summed with the shortcut and stepped, and the spikes are written.
PASSES = {
    "convolution": {"as it is": (2, 4), "at the least": (2, 4)},
    "its mean over time": {"as it is": (1, 1), "at the least": (0, 1)},
    "BatchNorm": {"as it is": (3, 6), "at the least": (1, 6)},
    "neurons": {"as it is": (2, 4), "at the least": (2, 4)},
    "sum with a shortcut": {"as it is": (3, 3), "at the least": (1, 3)},
}


def sizes(arch: str) -> Counter[str]:
    """Of each kind the values that it puts out, of one step of one image."""
    net, found = bptt_model_setting(MODELS[arch](num_classes=10), 1, "m"), Counter()

    def count(kind: str):
        return lambda module, args, out: found.update({kind: out.numel()})

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count("convolution"))
            module.register_forward_hook(count("its mean over time"))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(count("BatchNorm"))
        elif isinstance(module, neuron.BaseNode):
            module.register_forward_hook(count("neurons"))
        elif hasattr(module, "shortcut"):
            module.register_forward_hook(count("sum with a shortcut"))
    with torch.no_grad():
        net(torch.zeros(1, 1, 3, 32, 32))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18", choices=MODELS)
    parser.add_argument("--T", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bandwidth", type=float, default=4.0, help="of the memory, TB/s")
    options = parser.parse_args()
    print(f"{options.arch}, T = {options.T}, batch {options.batch}, float32")
    print("| kind | a pass, GB | passes of T, of 1: as it is | at the least | as it is, GB | at the least, GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    totals = Counter()
    for kind, values in sizes(options.arch).items():
        one = 4 * values * options.batch / 1e9
        moved = {how: one * (of_t * options.T + of_1) for how, (of_t, of_1) in PASSES[kind].items()}
        totals.update({how: size for how, size in moved.items() if kind != "convolution"})
        passes = " | ".join(f"{of_t}, {of_1}" for of_t, of_1 in PASSES[kind].values())
        print(f"| {kind} | {one * options.T:.2f} | {passes} | {' | '.join(f'{size:.1f}' for size in moved.values())} |")
    times = ", ".join(f"{how} {size:.1f} GB, {size / options.bandwidth:.2f} ms" for how, size in totals.items())
    print(f"beside the convolutions' own, at {options.bandwidth:g} TB/s: {times}")


if __name__ == "__main__":
    main()
