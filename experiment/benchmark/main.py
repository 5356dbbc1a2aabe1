"""Time and memory of a training step: BPTT, rate-based backpropagation, and what one would use in its place.

python experiment/benchmark/main.py                          ResNet-18, batch 16, 32x32, T = 1 to 16
python experiment/benchmark/main.py --T 4 8 --compile --windows 2
python experiment/benchmark/main.py --device cuda --batch_size 128 --amp bf16 --channels_last

A step is forward, loss and backward, without the optimizer. The contenders take turns, so that whatever else the
machine does meets all of them alike. Prints a table; --out DIR also gets cpu.md, .csv and .png.
"""

import argparse
import csv
import gc
import os
import platform
import shlex
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401  (before torch)

# The profiler counts memory on a CPU; its messages on GPUs that are not there would only disturb.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from model import MODELS
from util.errors import UserError
from util.rate.saved import saved_for_backward
from util.train.meter import peak_memory_bytes
from util.train.method import Bptt, Method, OneForward, Precision, Rate, Sltt
from util.train.options import Parser, complain
from util.train.setup import choose_device
from util.train.signals import raise_on_interrupt
from util.train.values import number, one_of, path

try:
    from spikingjelly.activation_based import memopt
except ImportError:  # before version 2
    memopt = None

WARM_UP = 2
ABOUT = """\
- BPTT: SpikingJelly's neurons and autograd, in its step modes m and s.
- memopt: the same, made over by SpikingJelly's `memopt.optimize_memory`, level 1: each block, of the layers up to a
  neuron layer, or residual, keeps its input, a binary one as bits, and is computed again in the backward pass.
- SLTT (Meng et al., ICCV 2023): step by step, a backward pass each, no gradient from one step to another; SLTT-1: of
  one step alone.
- rate-based: this project's; K: windows of rates.

Convolutions' share: (T + 2 K) / (3 T), of K steps (or windows) that have a backward pass: what the step must cost, as a
part of BPTT's; other work brings it below or above. To BPTT: of the faster step mode, the median over the turns. Saved:
at most, for a backward pass. Peak: the most that is allocated at a time, gradients included, over what was there
before."""


class Kind(NamedTuple):
    """A way to train. ``kept``: of how many steps, or windows, there is a backward pass; None: of all."""

    method: type[Method]
    step_mode: str
    kept: int | None = None
    compiled: bool = False
    memopt: bool = False


BPTT = {"BPTT, m": Kind(Bptt, "m"), "BPTT, s": Kind(Bptt, "s")}
RATE_BASED = {"rate-based, m": Kind(Rate, "m", 1), "rate-based, s": Kind(Rate, "s", 1)}
RIVALS = {"memopt, m": Kind(Bptt, "m", memopt=True)} if memopt else {}
RIVALS |= {"SLTT": Kind(Sltt, "s"), "SLTT-1": Kind(Sltt, "s", 1)}
CONTENDERS = {**BPTT, **RIVALS, **RATE_BASED}


@dataclass
class Row:
    """What one contender needs for a step. Times in seconds, over the repeats; memory in bytes."""

    name: str
    T: int
    median: float
    fastest: float
    slowest: float
    images_per_second: float
    share: float  # of the convolutions' work in BPTT's
    saved: int  # for backward
    peak: int  # the most that was allocated at a time, over what was there before the step
    cosine: float  # of the gradients to those without mixed precision
    to_bptt: float = 0.0  # of its step modes the faster: the median of the turns' ratios; 0: BPTT was not measured


@dataclass
class Contender:
    """A network of its own, set up for one way to train."""

    name: str
    net: nn.Module
    method: Method
    precision: Precision
    x: Tensor
    y: Tensor
    seconds: list[float] = field(default_factory=list)  # of each repeat

    def gradients(self, precision: Precision | None = None, look: Callable[[], object] = lambda: None) -> Tensor:
        """Returns the loss. ``look``: called before each backward pass."""
        self.net.zero_grad(set_to_none=True)

        def loss_of(outputs: Tensor) -> Tensor:
            loss = F.cross_entropy(outputs.mean(0), self.y)
            look()
            return loss

        model = OneForward(self.net, self.method)
        return self.method.learn(model, self.x, loss_of, precision or self.precision)[0]

    def step(self) -> float:
        """Returns its seconds."""
        start = mark(self.x.device)
        self.gradients()
        return seconds_between(start, mark(self.x.device))

    def saved_bytes(self) -> int:
        counts = []
        with saved_for_backward(self.net) as count:
            self.gradients(look=lambda: counts.append(count()))
        return max(counts)

    def peak_bytes(self) -> int:
        """Gradients are part of it, weights are not. By the CUDA allocator's count, on a CPU by PyTorch's profiler."""
        self.net.zero_grad(set_to_none=True)
        if self.x.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.x.device)
            torch.cuda.reset_peak_memory_stats(self.x.device)
            self.step()
            return peak_memory_bytes(self.x.device) - before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the profiler's, on how to use it over several cycles
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                self.step()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        clock = "start_ns" if hasattr(events[0], "start_ns") else "start_us"  # the latter in torch 2.3
        changes = [event.nbytes() for event in sorted(events, key=lambda event: getattr(event, clock)())]
        return max(accumulate(changes))

    def cosine_to_full_precision(self) -> float:
        """Of all parameters' gradients, on the same weights and batch."""
        if not self.precision.enabled:
            return 1.0
        grads = []
        for precision in (self.precision, Precision("off", self.x.device)):
            self.gradients(precision)
            grads.append(torch.cat([p.grad.flatten().double() for p in self.net.parameters()]))
        return F.cosine_similarity(*grads, dim=0).item()


class Block(nn.Sequential):
    """Layers that memopt computes again together."""


def blocks(features: nn.Sequential) -> nn.Sequential:
    """The same layers, cut behind each that has neurons."""
    found, layers = [], []
    for part in features:
        layers.append(part)
        if any(isinstance(m, neuron.BaseNode) for m in part.modules()):
            found.append(Block(*layers))
            layers = []
    return nn.Sequential(*found, *layers)


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment: on a GPU one of its own stream, for which nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000  # of milliseconds


def contender(name: str, kind: Kind, time_step: int, options: argparse.Namespace, device: torch.device) -> Contender:
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    net = MODELS[options.arch](in_channel=options.channels).to(device, memory_format=layout)
    own = {Rate: {"windows": kind.kept, "compile": kind.compiled}, Sltt: {"sltt_steps": kind.kept}}
    method = kind.method(time_step, kind.step_mode, **own.get(kind.method, {}))
    method.attach(net)
    precision = Precision(options.amp, device)
    precision.attach(net)
    shape = (options.batch_size, options.channels, options.image_size, options.image_size)
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    if kind.memopt:
        net.features = blocks(net.features)
        memopt.optimize_memory(net, Block, lambda net: method.forward(net, x), level=1)
    return Contender(name, net, method, precision, x, torch.arange(options.batch_size, device=device) % 10)


def measure(kinds: dict[str, Kind], time_step: int, options: argparse.Namespace, device: torch.device) -> list[Row]:
    torch.compiler.reset()  # a training has one T; code made for all of these would be too much for the compiler
    contenders = [contender(name, kind, time_step, options, device) for name, kind in kinds.items()]
    turns = [(repeat, c) for repeat in range(WARM_UP + options.repeats) for c in contenders]
    with tqdm(turns, desc=f"T = {time_step}", unit="step", leave=False, disable=None) as bar:
        for repeat, c in bar:
            bar.set_postfix_str(c.name)
            seconds = c.step()
            if repeat >= WARM_UP:
                c.seconds.append(seconds)
    bptt = min((c.seconds for c in contenders if c.name in BPTT), key=statistics.median, default=None)
    rows = []
    for c, kind in zip(contenders, kinds.values(), strict=True):
        median, work = statistics.median(c.seconds), time_step + 2 * (kind.kept or time_step)
        row = Row(
            c.name, time_step, median, min(c.seconds), max(c.seconds), options.batch_size / median,
            4 / 3 if kind.memopt else work / (3 * time_step),
            c.saved_bytes(), c.peak_bytes(), c.cosine_to_full_precision(),
        )  # fmt: skip
        if bptt:
            row.to_bptt = statistics.median(own / its for own, its in zip(c.seconds, bptt, strict=True))
        rows.append(row)
    return rows


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| T | | seconds (min to max) | images/s | to BPTT | convolutions' share | saved MiB | peak MiB | "
        "cosine to full precision |",
        "| --- |" + " --- |" * 8,
    ]
    for r in rows:
        lines.append(
            f"| {r.T} | {r.name} | {r.median:.3f} ({r.fastest:.3f} to {r.slowest:.3f}) | {r.images_per_second:.0f} | "
            f"{r.to_bptt:.2f} | {r.share:.2f} | {r.saved / 2**20:.1f} | {r.peak / 2**20:.0f} | {r.cosine:.3f} |"
        )
    return "\n".join(lines)


def conditions(options: argparse.Namespace, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    layout = ", channels last" if options.channels_last else ""
    memory = os.environ.get("MALLOC_MMAP_MAX_"), os.environ.get("MALLOC_TRIM_THRESHOLD_")
    allocator = f"; MALLOC_MMAP_MAX_={memory[0]} MALLOC_TRIM_THRESHOLD_={memory[1]}" if all(memory) else ""
    absent = "" if memopt else "; no memopt: this SpikingJelly has none"
    return (
        f"{options.arch}, batch {options.batch_size}, {options.image_size}x{options.image_size}, amp {options.amp}"
        f"{layout}; {name}, {platform.machine()}, {versions}{allocator}; medians of {options.repeats} steps after "
        f"{WARM_UP}{absent}"
    )


def plot(rows: list[Row], file: Path) -> None:
    """Time and memory over T, as in the paper."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name in dict.fromkeys(row.name for row in rows):
        own, style = [row for row in rows if row.name == name], "-" if name.startswith("rate") else "--"
        axes[0].plot([row.T for row in own], [row.median for row in own], style, marker="o", label=name)
        axes[1].plot([row.T for row in own], [row.peak / 2**20 for row in own], style, marker="o")
    axes[0].set(title="time of a training step", ylabel="seconds")
    axes[1].set(title="most memory allocated at a time in a step", ylabel="MiB")
    for ax in axes:
        ax.set_xlabel("time steps T")
        ax.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def write(rows: list[Row], about: str, out: Path) -> None:
    """The page, its table and its picture."""
    command = shlex.join(["python", "experiment/benchmark/main.py", *sys.argv[1:]])
    parts = ["# What a training step costs", f"    {command}", about, ABOUT, "![Time and memory over T](cpu.png)"]
    (out / "cpu.md").write_text("\n\n".join([*parts, table(rows)]) + "\n")
    with open(out / "cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, out / "cpu.png")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=one_of(tuple(MODELS)), default="resnet18")
    parser.add_argument("--T", type=number(int, 1), nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--windows", type=number(int, 2), nargs="+", default=[], metavar="K",
                        help="also rate-based steps with K windows, in step mode m, where K divides T")  # fmt: skip
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                        help="also rate-based steps compiled")  # fmt: skip
    parser.add_argument("--batch_size", type=number(int, 1), default=16)
    parser.add_argument("--image_size", type=number(int, 1), default=32)
    parser.add_argument("--channels", type=number(int, 1), default=3)
    parser.add_argument("--device")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    parser.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--repeats", type=number(int, 1), default=7)
    parser.add_argument("--out", type=path, help="directory for cpu.md, .csv and .png")
    return parser


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    kinds = dict(CONTENDERS)
    if options.compile:
        kinds |= {f"{name}, compiled": kind._replace(compiled=True) for name, kind in RATE_BASED.items()}
    kinds |= {f"rate-based, m, K = {k}": Kind(Rate, "m", k) for k in options.windows}
    try:
        raise_on_interrupt()
        device = choose_device(options.device)
        if options.amp == "fp16" and device.type != "cuda":
            raise UserError(f"--amp fp16 needs a GPU, not {device}: use --amp bf16 or off")
        if options.out:  # before the work
            Path(options.out).mkdir(parents=True, exist_ok=True)
        about, rows = conditions(options, device), []
        print(about)
        for time_step in options.T:
            own = {name: kind for name, kind in kinds.items() if time_step % (kind.kept or 1) == 0}
            rows += (found := measure(own, time_step, options, device))
            print(table(found), flush=True)
            gc.collect()
        if options.out:
            write(rows, about, Path(options.out))
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
