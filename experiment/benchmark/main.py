"""Time and memory of a training step: plain SpikingJelly BPTT, this project's BPTT and rate-based backpropagation.

python experiment/benchmark/main.py                          ResNet-18, batch 16, 32x32, T = 1 to 16, eager
python experiment/benchmark/main.py --compile --T 4 8
python experiment/benchmark/main.py --device cuda --batch_size 128 --amp bf16 --compile --channels_last

A step is forward, loss and backward, without the optimizer. The contenders take turns, so that whatever else the
machine does meets all of them alike. The options hold for this project's contenders; plain SpikingJelly runs as its
users write it. Prints a table; --out DIR also gets it as NAME.md, with NAME.csv and NAME.png (--name, benchmark if
not given). The convolutions' share is (T + 2) / (3 T) for rate-based steps: what they must cost, as a part of what
BPTT's cost. What else a step does may bring the whole below it or above.
"""

import argparse
import csv
import gc
import os
import platform
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.start  # noqa: F401  (before torch)

# The profiler counts memory on a CPU; its messages on GPUs that are not there would only disturb.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from model import MODELS
from util.errors import UserError
from util.rate.saved import saved_for_backward
from util.train.meter import peak_memory_bytes
from util.train.method import Method, Precision
from util.train.options import Parser, complain
from util.train.setup import choose_device
from util.train.signals import raise_on_interrupt
from util.train.values import number, one_of, path

WARM_UP = 2
PLAIN = ("SpikingJelly BPTT, m", "SpikingJelly BPTT, s")
CONTENDERS = {  # name: (rate-based, step mode)
    PLAIN[0]: (False, "m"),
    PLAIN[1]: (False, "s"),
    "BPTT, m": (False, "m"),
    "BPTT, s": (False, "s"),
    "rate-based, m": (True, "m"),
    "rate-based, s": (True, "s"),
}


@dataclass
class Row:
    """What one contender needs for a step. Times in seconds, over the repeats; memory in bytes."""

    name: str
    T: int
    median: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    images_per_second: float = 0.0
    to_m: float = 0.0  # ratio of medians, to plain SpikingJelly in step mode m
    to_faster: float = 0.0  # ratio of medians, to the faster of plain SpikingJelly's step modes
    limit: float = 1.0  # of these ratios: the convolutions' work alone
    saved: int = 0  # for backward, at the end of the forward
    peak: int = 0  # the most that was allocated at a time, over what was there before the step
    cosine: float = 1.0  # of the gradients to those without mixed precision


@dataclass
class Contender:
    """A network of its own, set up for one way to train."""

    name: str
    net: nn.Module
    method: Method
    precision: Precision
    x: Tensor
    y: Tensor
    seconds: list[tuple[float, float]] = field(default_factory=list)  # (forward, whole step) of each repeat

    def loss(self, precision: Precision | None = None) -> Tensor:
        with (precision or self.precision).autocast():
            return F.cross_entropy(self.method.forward(self.net, self.x), self.y)

    def step(self) -> tuple[float, float]:
        marks = [mark(self.x.device)]
        self.net.zero_grad(set_to_none=True)
        loss = self.loss()
        marks.append(mark(self.x.device))
        self.method.backward(self.precision.scaler.scale(loss))
        marks.append(mark(self.x.device))
        return seconds_between(*marks[:2]), seconds_between(marks[0], marks[2])

    def saved_bytes(self) -> int:
        with saved_for_backward(self.net) as count:
            loss = self.loss()
            saved = count()
        del loss
        return saved

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
            self.net.zero_grad(set_to_none=True)
            self.method.backward(precision.scaler.scale(self.loss(precision)))
            grads.append(torch.cat([p.grad.flatten().double() for p in self.net.parameters()]))
        return F.cosine_similarity(*grads, dim=0).item()


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


def contender(name: str, time_step: int, options: argparse.Namespace, device: torch.device) -> Contender:
    rate_based, step_mode = CONTENDERS[name]
    plain = name in PLAIN
    torch.manual_seed(0)
    layout = torch.channels_last if options.channels_last and not plain else torch.contiguous_format
    net = MODELS[options.arch](in_channel=options.channels).to(device, memory_format=layout)
    method = Method(rate_based, time_step, step_mode, scale_loss=True, compiled=options.compile)
    method.attach(net)
    precision = Precision("off" if plain else options.amp, device)
    precision.attach(net)
    shape = (options.batch_size, options.channels, options.image_size, options.image_size)
    x = torch.randn(shape, device=device).contiguous(memory_format=layout)
    return Contender(name, net, method, precision, x, torch.arange(options.batch_size, device=device) % 10)


def measure(
    time_step: int, options: argparse.Namespace, device: torch.device, names: Iterable[str] = CONTENDERS
) -> list[Row]:
    torch.compiler.reset()  # a training has one T; code made for all of these would be too much for the compiler
    contenders = [contender(name, time_step, options, device) for name in names]
    turns = [(repeat, c) for repeat in range(WARM_UP + options.repeats) for c in contenders]
    with tqdm(turns, desc=f"T = {time_step}", unit="step", leave=False, disable=None) as bar:
        for repeat, c in bar:
            bar.set_postfix_str(c.name)
            seconds = c.step()
            if repeat >= WARM_UP:
                c.seconds.append(seconds)
    rows = []
    for c in contenders:
        whole = [seconds for _, seconds in c.seconds]
        rows.append(
            Row(
                c.name, time_step, statistics.median(whole), min(whole), max(whole),
                statistics.median(forward for forward, _ in c.seconds),
                statistics.median(seconds - forward for forward, seconds in c.seconds),
                options.batch_size / statistics.median(whole),
                limit=(time_step + 2) / (3 * time_step) if c.method.rate_based else 1.0,
                saved=c.saved_bytes(), peak=c.peak_bytes(), cosine=c.cosine_to_full_precision(),
            )
        )  # fmt: skip
    plain = {row.name: row.median for row in rows if row.name in PLAIN}
    for row in rows if plain else ():
        row.to_m, row.to_faster = row.median / plain[PLAIN[0]], row.median / min(plain.values())
    return rows


def table(rows: list[Row]) -> str:
    lines = [
        "| T | | seconds (min to max) | forward | backward | images/s | to BPTT, m | to the faster | "
        "convolutions' share | saved MiB | peak MiB | cosine to full precision |",
        "| --- |" + " --- |" * 11,
    ]
    for r in rows:
        lines.append(
            f"| {r.T} | {r.name} | {r.median:.3f} ({r.fastest:.3f} to {r.slowest:.3f}) | {r.forward:.3f} | "
            f"{r.backward:.3f} | {r.images_per_second:.0f} | {r.to_m:.2f} | {r.to_faster:.2f} | {r.limit:.2f} | "
            f"{r.saved / 2**20:.1f} | {r.peak / 2**20:.0f} | {r.cosine:.3f} |"
        )
    return "\n".join(lines)


def conditions(options: argparse.Namespace, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "spikingjelly"))
    flags = [f"--{flag}" for flag in ("compile", "channels_last") if getattr(options, flag)]
    memory = os.environ.get("MALLOC_MMAP_MAX_"), os.environ.get("MALLOC_TRIM_THRESHOLD_")
    allocator = f"; MALLOC_MMAP_MAX_={memory[0]} MALLOC_TRIM_THRESHOLD_={memory[1]}" if all(memory) else ""
    return (
        f"{options.arch}, batch {options.batch_size}, {options.image_size}x{options.image_size}, amp {options.amp}"
        f"{''.join(f', {flag}' for flag in flags)}; {name}, {platform.machine()}, {versions}{allocator}; "
        f"medians of {options.repeats} steps after {WARM_UP}"
    )


def read_rows(file: Path) -> list[Row]:
    """What an earlier call wrote. Raises UserError."""
    kinds = {f.name: f.type for f in fields(Row)}
    try:
        with open(file, newline="") as opened:
            return [Row(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(opened)]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no table of this benchmark: name a CSV that --out wrote") from error


def plot(rows: list[Row], file: Path) -> None:
    """Time and memory over T, as in the paper."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for name in CONTENDERS:
        own = [row for row in rows if row.name == name]
        style = "--" if name in PLAIN else "-"
        axes[0].plot([row.T for row in own], [row.median for row in own], style, marker="o", label=name)
        axes[1].plot([row.T for row in own], [row.peak / 2**20 for row in own], style, marker="o")
    steps = sorted({row.T for row in rows})
    faster = [min(row.median for row in rows if t == row.T and row.name in PLAIN) for t in steps]
    share = [seconds * (t + 2) / (3 * t) for t, seconds in zip(steps, faster, strict=True)]
    axes[0].plot(steps, share, ":", color="black", label="convolutions' share,\n(T + 2) / (3 T) of BPTT")
    axes[0].set_title("time of a training step")
    axes[0].set_ylabel("seconds")
    axes[1].set_title("most memory allocated at a time in a step")
    axes[1].set_ylabel("MiB")
    for ax in axes:
        ax.set_xlabel("time steps T")
        ax.set_ylim(bottom=0)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=one_of(tuple(MODELS)), default="resnet18")
    parser.add_argument("--T", type=number(int, 1), nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch_size", type=number(int, 1), default=16)
    parser.add_argument("--image_size", type=number(int, 1), default=32)
    parser.add_argument("--channels", type=number(int, 1), default=3)
    parser.add_argument("--device")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--channels_last", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--repeats", type=number(int, 1), default=7)
    parser.add_argument("--out", type=path, help="directory for the table, as .md and .csv, and the plot")
    parser.add_argument("--name", default="benchmark", help="what these files are called")
    parser.add_argument("--redraw", metavar="CSV", type=path, help="measure nothing: draw the picture of an earlier "
                        "call's table again, beside it")  # fmt: skip
    return parser


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        raise_on_interrupt()
        if options.redraw:
            plot(read_rows(Path(options.redraw)), Path(options.redraw).with_suffix(".png"))
            return 0
        device = choose_device(options.device)
        if options.amp == "fp16" and device.type != "cuda":
            raise UserError(f"--amp fp16 needs a GPU, not {device}: use --amp bf16 or off")
        rows: list[Row] = []
        if options.out:  # before the work
            Path(options.out).mkdir(parents=True, exist_ok=True)
        print(conditions(options, device))
        for time_step in options.T:
            rows += measure(time_step, options, device)
            print(table(rows[-len(CONTENDERS) :]), flush=True)
            gc.collect()
        if options.out:
            out = Path(options.out)
            (out / f"{options.name}.md").write_text(f"{conditions(options, device)}\n\n{table(rows)}\n")
            with open(out / f"{options.name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(asdict(rows[0])), lineterminator="\n")
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
            plot(rows, out / f"{options.name}.png")
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
