"""Stages fast, profile and defaults of `gpu.py`: time and memory of a training step, beside the targets."""

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from experiment.benchmark import main
from experiment.benchmark.gpu_report import Bench, Rows
from experiment.benchmark.main import BPTT, CONTENDERS, RATE_BASED, WARM_UP, Contender, Kind, mark, seconds_between
from util.rate.compiled import run_steps_compiled
from util.rate.dynamics import dynamics_of
from util.rate.eligibility import NeuronRecord, NeuronState
from util.rate.function import ConvolutionArgs, ConvolutionRate, LinearRate
from util.train.graphed import Graphed, Recorder

# The first are wanted most. What --compile does is rate-based alone.
VARIANTS = {
    "eager": {},
    "bf16, compiled, channels_last": {"amp": "bf16", "compile": True, "channels_last": True},
    "TF32, compiled, channels_last": {"tf32": True, "compile": True, "channels_last": True},
    "compiled": {"compile": True},
    "bf16, channels_last": {"amp": "bf16", "channels_last": True},
    "TF32, channels_last": {"tf32": True, "channels_last": True},
    "TF32": {"tf32": True},
    "TF32, compiled": {"tf32": True, "compile": True},
    "bf16": {"amp": "bf16"},
    "channels_last": {"channels_last": True},
    "compiled, channels_last": {"compile": True, "channels_last": True},
    "bf16, compiled": {"amp": "bf16", "compile": True},
    "bf16, compiled, channels_last, cudnn.benchmark": {
        "amp": "bf16", "compile": True, "channels_last": True, "cudnn_benchmark": True
    },
    "TF32, compiled, channels_last, cudnn.benchmark": {
        "tf32": True, "compile": True, "channels_last": True, "cudnn_benchmark": True
    },
    "TF32, channels_last, cudnn.benchmark": {"tf32": True, "channels_last": True, "cudnn_benchmark": True},
}  # fmt: skip
BEST = tuple(VARIANTS)[:3]
# What each option brings is measured with steps replayed as CUDA graphs, so that launches do not hide it.
GRAPHED = ("TF32, compiled, channels_last", "bf16, compiled, channels_last", "compiled")
COMPARED = ("TF32", "TF32, channels_last", "TF32, compiled", "TF32, compiled, channels_last, cudnn.benchmark", "eager")
IN_SMALL = ("eager", "bf16, compiled, channels_last")
LIF_KERNEL = "SJ_LIF_CUDA_IMPLEMENTATION"  # by which SpikingJelly 2 is told
TOLERANCE, BANDWIDTH, CONVOLUTIONS = 1.1, 0.7, 1.25  # the targets; see `verdicts`


def parts(bench: Bench) -> dict[str, Callable[[Bench], Rows]]:
    steps = (1, 2) if bench.small else (1, 2, 4, 8, 16)
    variants = IN_SMALL if bench.small else VARIANTS
    one = {f"T = {t}, {v}": partial(steps_of, v, t) for v in variants for t in steps}
    return {
        "neuron kernel": neuron_kernel,
        "convolutions alone": partial(convolutions_alone, steps[1:]),
        **one,
        "SpikingJelly as it is": partial(plain_steps, steps),
        "SpikingJelly's backends": partial(backend_steps, steps),
        "ResNet-34 at 224": imagenet,
        "largest": largest,
        **{f"T = {t}, CUDA graphs": partial(graphs, t) for t in ((2,) if bench.small else (4, 16, 2, 8))},
        "verdicts": verdicts,
    }


def options_of(bench: Bench, variant: str, **more: object) -> argparse.Namespace:
    size = {"batch_size": 2, "image_size": 16, "arch": "vggsnn_small", "repeats": 1}
    full = {"batch_size": 128, "image_size": 32, "arch": "resnet18", "repeats": 9}
    defaults = {"channels": 3, "compile": False, "channels_last": False, "amp": "off", "tf32": False,
                "cudnn_benchmark": False}  # fmt: skip
    return argparse.Namespace(**{**defaults, **(size if bench.small else full), **VARIANTS[variant], **more})


@contextlib.contextmanager
def set_backends(options: argparse.Namespace) -> Iterator[None]:
    """TF32 and cuDNN's choice of algorithms by measurement, as the variant says."""
    cublas, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cublas.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    cublas.allow_tf32 = cudnn.allow_tf32 = options.tf32
    cudnn.benchmark = options.cudnn_benchmark
    try:
        yield
    finally:
        cublas.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def steps_of(variant: str, time_step: int, bench: Bench) -> Rows:
    """All contenders that the variant makes a difference for, in turns."""
    options = options_of(bench, variant)
    kinds = {name: kind_of(name, options) for name in (RATE_BASED if options.compile else CONTENDERS)}
    with set_backends(options):
        rows = main.measure(kinds, time_step, options, bench.device)
    return [
        {
            "name": r.name, "variant": variant, "T": r.T, "tf32": options.tf32, "seconds": r.median,
            "fastest": r.fastest, "slowest": r.slowest, "images/s": r.images_per_second, "to BPTT": r.to_bptt,
            "share": r.share, "saved MiB": r.saved / 2**20, "peak MiB": r.peak / 2**20, "cosine": r.cosine,
        }
        for r in rows
    ]  # fmt: skip


def kind_of(name: str, options: argparse.Namespace) -> Kind:
    return CONTENDERS[name]._replace(compiled=options.compile and name in RATE_BASED)


def contender(name: str, time_step: int, options: argparse.Namespace, bench: Bench) -> Contender:
    return main.contender(name, kind_of(name, options), time_step, options, bench.device)


def timed(bench: Bench, function: Callable[[], object], repeats: int | None = None) -> float:
    """Median of seconds, after some that do not count."""
    seconds = []
    for _ in range(WARM_UP + (repeats or (1 if bench.small else 9))):
        start = mark(bench.device)
        function()
        seconds.append(seconds_between(start, mark(bench.device)))
    return statistics.median(seconds[WARM_UP:])


def row_of(c: Contender, bench: Bench, options: argparse.Namespace, label: str) -> dict:
    with set_backends(options):
        seconds = timed(bench, c.step)
        saved, peak = (count / 2**20 for count in (c.saved_bytes(), c.peak_bytes()))
    return {"name": c.name, "variant": label, "T": c.method.T, "tf32": options.tf32, "seconds": seconds,
            "images/s": len(c.x) / seconds, "saved MiB": saved, "peak MiB": peak}  # fmt: skip


def plain_steps(steps: tuple[int, ...], bench: Bench) -> Rows:
    """SpikingJelly's BPTT with the neuron kernels that it chooses, or that its environment variable names."""
    chosen = os.environ.get(LIF_KERNEL, "its own choice")
    options = options_of(bench, "eager")
    return [
        row_of(contender(name, t, options, bench), bench, options, f"kernel: {chosen}") for t in steps for name in BPTT
    ]


def backend_steps(steps: tuple[int, ...], bench: Bench) -> Rows:
    """SpikingJelly's neuron kernels. Version 2 takes the kernel from the environment."""
    rows, options = [], options_of(bench, "eager")
    nodes = contender("BPTT, m", 1, options, bench).net.modules()
    known = set.intersection(
        *(set(getattr(m, "supported_backends", ())) for m in nodes if isinstance(m, neuron.BaseNode))
    )
    for kernel in ("torch", "cupy") if known else ("torch", "triton"):
        if not known:
            rows += _told(kernel, bench)
        elif kernel != "torch" and (not find_spec(kernel) or bench.device.type != "cuda"):
            rows.append({"name": "BPTT, m", "variant": f"kernel: {kernel}", "said": "not installed, or no GPU"})
        else:
            for t in steps:
                c = contender("BPTT, m", t, options, bench)
                functional.set_backend(c.net, kernel)
                rows.append(row_of(c, bench, options, f"kernel: {kernel}"))
    return rows


def _told(kernel: str, bench: Bench) -> Rows:
    """The part "SpikingJelly as it is" of a process in which SpikingJelly 2 is told which kernel to use."""
    out = bench.out / "kernels" / kernel
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--out", str(out), "--stage", "fast"]
    command += ["--part", "SpikingJelly as it is", *(["--dry_run"] if bench.small else [])]
    done = subprocess.run(command, env={**os.environ, LIF_KERNEL: kernel}, capture_output=True, text=True)
    parts = [json.loads(file.read_text()) for file in (out / "parts").glob("*.json")]
    rows = [row for part in parts for row in part["rows"]]
    said = [*done.stderr.strip().splitlines(), *(part["error"] for part in parts if part["error"])]
    return rows or [{"name": "BPTT, m", "variant": f"kernel: {kernel}", "said": said[-1] if said else "nothing"}]


def convolutions_alone(steps: tuple[int, ...], bench: Bench) -> Rows:
    """T forwards and one backward of a step's convolutions and linear layers, timed by themselves; beside rate-m."""
    rows = []
    for variant in ("eager", "TF32, channels_last", "bf16, channels_last"):
        options = options_of(bench, variant)
        for time_step in steps:
            c = contender("rate-based, m", time_step, options, bench)
            calls: list[tuple[nn.Module, torch.Tensor]] = []

            def note(module: nn.Module, args: tuple, y: torch.Tensor, calls: list = calls) -> None:
                calls.append((module, args[0]))

            layers = [m for m in c.net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            hooks = [m.register_forward_hook(note) for m in layers]
            with torch.no_grad(), c.precision.autocast(), set_backends(options):
                c.method.forward(c.net, c.x)
            for hook in hooks:
                hook.remove()
            functional.reset_net(c.net)
            with set_backends(options):
                seconds = timed(bench, partial(_convolve, c, [(m, x.detach()) for m, x in calls]))
            rows.append({"variant": precision_of({"tf32": options.tf32, "variant": variant}), "T": time_step,
                         "seconds of convolutions": seconds})  # fmt: skip
    return rows


def _convolve(c: Contender, calls: list[tuple[nn.Module, torch.Tensor]]) -> None:
    """``calls``: in order, each layer with its input of all steps, [T, B, ...] or [B, ...] behind the time average."""
    for i, (module, x) in enumerate(calls):
        steps = x.flatten(0, 1) if x.dim() == (5 if isinstance(module, nn.Conv2d) else 3) else x
        one = steps[: len(c.x)].detach().requires_grad_(i > 0)  # nobody asks for the image's gradient
        with torch.no_grad(), c.precision.autocast():
            if isinstance(module, nn.Linear):
                y = nn.functional.linear(steps, module.weight, module.bias)[: len(c.x)]
            else:
                y = module._conv_forward(steps, module.weight, module.bias)[: len(c.x)]
        weight, bias = module.weight.to(y.dtype), None if module.bias is None else module.bias.to(y.dtype)
        if isinstance(module, nn.Linear):
            LinearRate.apply(one.to(y.dtype), weight, bias, (y,), None, 1).backward(y)
        else:
            places = (module.stride, module.padding, module.dilation, False, (0, 0), module.groups)
            ConvolutionRate.apply(one.to(y.dtype), weight, bias, (y,), None, 1, ConvolutionArgs(*places)).backward(y)


def imagenet(bench: Bench) -> Rows:
    small = {"arch": "sew_resnet34", "image_size": 32 if bench.small else 224, "batch_size": 2 if bench.small else 64}
    rows = []
    for variant in IN_SMALL[:1] if bench.small else BEST[:2]:
        for name in [*RATE_BASED][:1] if bench.small else ("BPTT, m", *RATE_BASED):
            try:
                options = options_of(bench, variant, **small)
                c = contender(name, 2 if bench.small else 4, options, bench)
                rows.append({"arch": "sew_resnet34", **row_of(c, bench, options, variant)})
            except torch.cuda.OutOfMemoryError:
                rows.append({"arch": "sew_resnet34", "name": name, "variant": variant, "said": "out of memory"})
    return rows


def largest(bench: Bench) -> Rows:
    """The largest T at batch 128 and the largest batch at T = 4 that fit, of powers of two."""
    rows, most = [], 4 if bench.small else 2**14
    for name in ("BPTT, m", "BPTT, s", *RATE_BASED):
        for what in ("T", "batch_size"):
            fits, size, said = 0, 2, ""
            while size <= most and not said:
                more = {"batch_size": size} if what == "batch_size" else {}
                try:
                    c = contender(name, size if what == "T" else 4, options_of(bench, "eager", **more), bench)
                    slow = c.step() > 4
                    fits, said = size, "the next would take too long" if slow else ""
                except RuntimeError as error:  # out of memory, or a size that cuDNN does not serve
                    said = f"{size}: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
                c, size = None, 2 * size  # before the next one is made
            rows.append({"name": name, "what": what, "largest that fits": fits, "said": said})
    return rows


def neuron_kernel(bench: Bench) -> Rows:
    """Bytes a second of the compiled neuron layer beside those of a copy of as many bytes."""
    rows = []
    for time_step in (2,) if bench.small else (1, 4, 16):
        currents = torch.randn(time_step, 2**12 if bench.small else 2**23, device=bench.device)
        out = torch.empty_like(currents)
        dynamics = dynamics_of(neuron.LIFNode(tau=1.25, decay_input=False, v_reset=None, detach_reset=True))
        # Currents and spikes of T steps; potential, rate and eligibility of one.
        moved = 2 * currents.nbytes + 3 * currents[0].nbytes
        copied = 2 * currents.nbytes / launched(bench, partial(out.copy_, currents))
        moved = moved / launched(bench, partial(_fused, dynamics, currents))
        rows.append({"T": time_step, "kernel GB/s": moved / 1e9, "copy GB/s": copied / 1e9,
                     "part of the copy": moved / copied})  # fmt: skip
    return rows


def launched(bench: Bench, function: Callable[[], object], times: int = 10) -> float:
    """Seconds of a function whose kernels are shorter than their launches take."""
    if bench.device.type != "cuda":
        return timed(bench, function)
    recorder = Recorder(bench.device)
    recorder.beside(function)
    replay, _ = recorder.record(lambda: [function() for _ in range(times)] and None)
    return timed(bench, replay) / times


def _fused(dynamics: object, currents: torch.Tensor) -> None:
    run_steps_compiled(dynamics, NeuronRecord(NeuronState.start((0.0,))), currents)


def graphs(time_step: int, bench: Bench) -> Rows:
    """A whole step captured as a CUDA graph: what launches cost."""
    if bench.device.type != "cuda":
        return [{"variant": "CUDA graph", "said": "needs a GPU"}]
    rows = []
    pairs = [(variant, name) for variant in GRAPHED for name in ("BPTT, m", *RATE_BASED)]
    pairs += [(variant, name) for variant in COMPARED if time_step == 4 for name in ("BPTT, m", "rate-based, m")]
    for variant, name in pairs:
        options = options_of(bench, variant)
        row = {"name": name, "variant": f"{variant}, CUDA graph", "T": time_step, "tf32": options.tf32}
        try:
            with set_backends(options):
                torch.compiler.reset()  # as a training, which has one variant: the compiler makes eight of a function
                c = contender(name, time_step, options, bench)
                recorder = Recorder(bench.device)
                for _ in range(Graphed.WARM_UP):
                    recorder.beside(c.step)
                peak = recorder.beside(c.peak_bytes)
                c.net.zero_grad(set_to_none=True)
                replay, _ = recorder.record(c.gradients)
                seconds = timed(bench, replay, 5)
            rows.append({**row, "seconds": seconds, "images/s": len(c.x) / seconds, "peak MiB": peak / 2**20})
        except RuntimeError as error:
            rows.append({**row, "said": str(error).splitlines()[0][:120]})
        c = replay = None
        gc.collect()
    return rows


def verdicts(bench: Bench) -> Rows:
    """The targets: a rate-based step within 10 % of (T + 2) / (3 T) of the fastest BPTT at every T >= 2, and at most
    1.25 times its convolutions alone; the neuron kernel at 70 % of a copy's bandwidth.
    """
    found = [row for row in bench.rows("fast") if "seconds" in row and "arch" not in row]
    rows = [
        {"target": f"neuron kernel, T = {row['T']}: {BANDWIDTH:.0%} of a copy", "found": row["part of the copy"],
         "at": BANDWIDTH, "met": row["part of the copy"] >= BANDWIDTH}
        for row in bench.rows("fast") if "part of the copy" in row
    ]  # fmt: skip
    alone = {(r["variant"], r["T"]): r["seconds of convolutions"]
             for r in bench.rows("fast") if "seconds of convolutions" in r}  # fmt: skip
    for kind in ("float32", "TF32", "bf16"):
        own = [row for row in found if kind == precision_of(row)]
        for time_step in sorted({row["T"] for row in own if row["T"] >= 2}):
            at = [row for row in own if row["T"] == time_step]
            bptt = [row for row in at if row["name"] in BPTT]
            for name in RATE_BASED:
                rated = [row for row in at if row["name"] == name]
                if not bptt or not rated:
                    continue
                fastest, best = (min(group, key=lambda row: row["seconds"]) for group in (bptt, rated))
                limit = TOLERANCE * (time_step + 2) / (3 * time_step)
                ratio = best["seconds"] / fastest["seconds"]
                rows.append({"target": f"{kind}, T = {time_step}: {name} ({best['variant']}) of the fastest BPTT "
                             f"({fastest['name']}, {fastest['variant']})", "found": ratio, "at": limit,
                             "met": ratio <= limit})  # fmt: skip
                convolutions = alone.get((kind, time_step))
                if convolutions:
                    times = best["seconds"] / convolutions
                    rows.append({"target": f"{kind}, T = {time_step}: {name} of its convolutions alone",
                                 "found": times, "at": CONVOLUTIONS, "met": times <= CONVOLUTIONS})  # fmt: skip
    return rows


def precision_of(row: dict) -> str:
    return "TF32" if row["tf32"] else "bf16" if "bf16" in row["variant"] else "float32"


def profile_parts(bench: Bench) -> dict[str, Callable[[Bench], Rows]]:
    variants = IN_SMALL[:1] if bench.small else BEST
    return {f"{name}, {variant}": partial(profiled, name, variant) for variant in variants for name in RATE_BASED}


def profiled(name: str, variant: str, bench: Bench) -> Rows:
    """Where a step's time goes, kernel by kernel, and how much of it the GPU waits for launches."""
    options = options_of(bench, variant)
    c = contender(name, 2 if bench.small else 4, options, bench)
    gpu = bench.device.type == "cuda"
    with set_backends(options):
        wall = timed(bench, c.step, 3)
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as profiler:
            c.step()
            if gpu:
                torch.cuda.synchronize()

    def own(event: object) -> float:  # microseconds; torch 2.3 names it otherwise
        if not gpu:
            return event.self_cpu_time_total
        return getattr(event, "self_device_time_total", None) or getattr(event, "self_cuda_time_total", 0)

    # Of a GPU its kernels alone: what launched them is said to take their time too.
    events = [e for e in profiler.key_averages() if own(e) and (not gpu or e.device_type == DeviceType.CUDA)]
    busy = sum(map(own, events)) / 1e6
    rows = [
        {"kernel": "all", "ms": busy * 1e3, "share of the step": busy / wall, "calls": sum(e.count for e in events)}
    ]
    return rows + [
        {"kernel": event.key[:90], "ms": own(event) / 1e3, "share of the step": own(event) / 1e6 / wall,
         "calls": event.count}
        for event in sorted(events, key=own, reverse=True)[:40]
    ]  # fmt: skip


def default_parts(bench: Bench) -> dict[str, Callable[[Bench], Rows]]:
    return {"what the numbers ask for": defaults}


def defaults(bench: Bench) -> Rows:
    """Each option's step time over that without it: below 0.95 it asks to be the default where it changes no result."""
    found = {(r["name"], r["variant"], r["T"]): r for r in bench.rows("fast") if "seconds" in r and "arch" not in r}
    pairs = {
        "--cuda_graph": ("eager", "eager, CUDA graph"),
        "--compile": ("TF32, CUDA graph", "TF32, compiled, CUDA graph"),
        "--channels_last, compiled": ("TF32, compiled, CUDA graph", "TF32, compiled, channels_last, CUDA graph"),
        "--channels_last": ("TF32, CUDA graph", "TF32, channels_last, CUDA graph"),
        "--tf32": ("compiled, CUDA graph", "TF32, compiled, CUDA graph"),
        "--amp bf16": ("TF32, compiled, channels_last, CUDA graph", "bf16, compiled, channels_last, CUDA graph"),
        "cudnn.benchmark": (
            "TF32, compiled, channels_last, CUDA graph",
            "TF32, compiled, channels_last, cudnn.benchmark, CUDA graph",
        ),
    }
    rows = []
    for option, (without, with_it) in pairs.items():
        ratios = [
            found[name, with_it, t]["seconds"] / row["seconds"]
            for (name, variant, t), row in found.items()
            if variant == without and t >= 2 and (name, with_it, t) in found
            and (name in RATE_BASED or option != "--compile")
        ]  # fmt: skip
        if ratios:
            rows.append({"option": option, "median of ratios": statistics.median(ratios), "worst": max(ratios),
                         "asks for": "on" if statistics.median(ratios) < 0.95 else "off"})  # fmt: skip
    loaders = [row for row in bench.rows("learns") if "workers" in row]
    rows += [
        {"option": f"--num_workers {row['workers']}", "asks for": f"{row['images/s']:.0f} images/s"} for row in loaders
    ]
    return rows or [{"option": "none", "asks for": "the stage fast has not run"}]
