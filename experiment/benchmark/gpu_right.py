"""Stage right of `gpu.py`: the oracles on the device, and what only a device can do wrong."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from experiment.benchmark.gpu_report import Bench, Rows
from experiment.benchmark.main import Contender
from experiment.cifar.main import ImageOptions, load_data
from model import MODELS
from util.train.guard import Guard, NotFiniteError
from util.train.method import Precision, Rate
from util.train.optim import OPTIMIZERS, parameter_groups
from util.train.script import run

ROOT = Path(__file__).resolve().parents[2]
# The tests whose networks and batches are made on the device that --device of pytest names.
ORACLES = {
    "fingerprints, eager": ["tests/rate/test_fingerprints.py", "-k", "not fast"],
    "fingerprints, compiled and channels_last": ["tests/rate/test_fingerprints.py", "-k", "fast"],
    "T = 1, value, the method written out": [
        "tests/rate/test_gradients.py", "-k", "TestOneStep or TestValue or TestManySteps"
    ],
    "eligibility": ["tests/rate/test_eligibility.py"],
    "cost": ["tests/rate/test_cost.py"],
    "compiled": ["tests/rate/test_compiled.py", "-k", "gives or images"],
    "half precision": ["tests/rate/test_half_precision.py"],
    "the neurons' kernel": ["tests/rate/test_lif_kernel.py"],
    "all tests of the method": ["tests/rate", "-n", "12", "--dist", "loadfile"],
}  # fmt: skip
IN_SMALL = ["tests/rate/test_gradients.py", "-k", "test_of_a_network_that_is_not_the_project_s"]


def parts(bench: Bench) -> dict[str, Callable[[Bench], Rows]]:
    oracles = {"oracle T = 1": IN_SMALL} if bench.small else ORACLES
    return {
        **{name: partial(oracle, name, tests) for name, tests in oracles.items()},
        "guard, fused optimizer": guard,
        "precisions": precisions,
        "two runs of one seed": two_runs,
        "CUDA graph, trained": graphed,
        "kill and resume": kill_and_resume,
        "out of memory": out_of_memory,
    }


def oracle(name: str, tests: list[str], bench: Bench) -> Rows:
    """Runs tests in a process of their own, in float64, for which TF32 does not count."""
    command = [sys.executable, "-m", "pytest", *tests, f"--device={bench.device}", "--tb=short", "-rfE"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"],
        cwd=ROOT, env={**os.environ, "COLUMNS": "300"}, capture_output=True, text=True,
    )  # fmt: skip
    (bench.out / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.log").write_text(done.stdout + done.stderr)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1].strip("= ")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)(.*)", done.stdout, re.MULTILINE)
    rows = [{"what": name, "right": done.returncode == 0, "said": last}]
    return rows + [{"what": test, "right": False, "said": said.strip(" -")[:200]} for test, said in failed]


def small_training(bench: Bench, compiled: bool = False) -> tuple[Contender, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = MODELS["vggsnn_small" if bench.small else "resnet18"](in_channel=3).to(bench.device).train()
    method, precision = Rate(2 if bench.small else 4, "m", compile=compiled), Precision("off", bench.device)
    method.attach(net)
    size = 4 if bench.small else 128
    x = torch.randn(size, 3, 32, 32, device=bench.device)
    optimizer = OPTIMIZERS["SGD"](parameter_groups(net, 5e-4), 0.05, fused=True)
    y = torch.arange(size, device=bench.device) % 10
    return Contender("rate-based, m", net, method, precision, x, y), optimizer


def guard(bench: Bench) -> Rows:
    """A gradient that is not finite must not reach the weights, and must be named."""
    c, optimizer = small_training(bench)
    watch = Guard(c.net, optimizer, bench.device)
    before = [p.detach().clone() for p in c.net.parameters()]
    said = "nothing was said"
    for step in range(3):
        optimizer.zero_grad()
        loss = c.gradients()
        if step == 0:
            next(c.net.parameters()).grad.view(-1)[0] = float("inf")
        watch.watch(loss, step + 1)
        optimizer.step()
    try:
        watch.check()
    except NotFiniteError as error:
        said = str(error)
    kept = all(torch.equal(a, b) for a, b in zip(before, c.net.parameters(), strict=True))
    return [{"what": "inf in a gradient, fused SGD", "right": kept and "not finite at step 1" in said, "said": said}]


def script(*args: str | Path) -> tuple[int, str]:
    """experiment/cifar/main.py in this process -> exit status and what it said on stderr."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = ["experiment/cifar/main.py", *map(str, args)]
    try:
        with contextlib.redirect_stderr(said):
            status = run(ImageOptions, load_data, None)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
    return status, said.getvalue().strip()


def digits(bench: Bench) -> list[str]:
    small = ["--arch", "vggsnn_small", "--T", "2", "--train_batch_size", "512", "--val_batch_size", "512"]
    return ["--dataset", "DIGITS", "--device", str(bench.device), "--rate_flag", *(small if bench.small else [])]


def precisions(bench: Bench) -> Rows:
    """Trainings as a user starts them: pinned memory, copies that nothing waits for, the scaler of fp16."""
    rows = []
    ways = [["--amp", "off"], ["--amp", "bf16"], ["--amp", "fp16"], ["--amp", "bf16", "--compile", "--channels_last"]]
    for flags in ways[1:2] if bench.small else ways:
        log = bench.out / "runs" / f"right-{time.time_ns()}"
        status, said = script(*digits(bench), *flags, "--num_epoch", "1" if bench.small else "6", "--log_path", log)
        best = [line for line in _logged(log) if "best test accuracy" in line]
        rows.append({"what": " ".join(flags), "right": status == 0, "said": said or (best or ["?"])[0]})
    return rows


def _logged(log: Path) -> Iterator[str]:
    for file in log.glob("*/train.log"):
        yield from file.read_text().splitlines()


def two_runs(bench: Bench) -> Rows:
    """Whether bits repeat, and what asking for it costs."""
    rows, steps = [], 2 if bench.small else 30
    for name, mode in (("as it is", "default"), ("torch.use_deterministic_algorithms", "error")):
        torch.set_deterministic_debug_mode(mode)
        try:
            ends, seconds = [], []
            for _ in range(2):
                c, optimizer = small_training(bench)
                for _ in range(steps):
                    seconds.append(c.step())
                    optimizer.step()
                ends.append([p.detach().clone() for p in c.net.parameters()])
            same = all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
            rows.append({"what": name, "bits repeat": same, "seconds a step": sorted(seconds)[len(seconds) // 2]})
        except RuntimeError as error:
            rows.append({"what": name, "bits repeat": False, "said": str(error).splitlines()[0][:200]})
        finally:
            torch.set_deterministic_debug_mode("default")
    return rows


def graphed(bench: Bench) -> Rows:
    """Whether a training whose steps are replayed ends with the bits of one whose steps run."""
    ways = [["--step_mode", "m"], ["--step_mode", "s"], ["--amp", "bf16", "--compile", "--channels_last"],
            ["--no-rate_flag"], ["--amp", "fp16"]]  # fmt: skip
    rows = []
    for flags in ways[:1] if bench.small else ways:
        weights = []
        for graph in ([], ["--no-cuda_graph"]):
            log = bench.out / "runs" / f"graph-{time.time_ns()}"
            _, said = script(*digits(bench), "--deterministic", "--num_epoch", "2", *flags, *graph, "--log_path", log)
            torch.use_deterministic_algorithms(False)
            said = said or next((line for line in _logged(log) if "no CUDA graph" in line), "")
            weights += [
                torch.load(file, map_location="cpu", weights_only=True)["model"] for file in log.glob("*/last.pth")
            ]
        same = len(weights) == 2 and all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
        rows.append({"what": " ".join(flags), "right": same and not said, "said": said})
    return rows


def kill_and_resume(bench: Bench) -> Rows:
    command = [sys.executable, "tests/experiment/kill_test.py", "--kills", "1" if bench.small else "3"]
    flags = [
        "--device",
        str(bench.device),
        "--deterministic",
        *([] if bench.small else ["--arch", "resnet18"]),  # of the others the adaptive pool is never deterministic
        *(["--num_epoch", "1", "--num_workers", "0"] if bench.small else []),
    ]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    said = [*done.stdout.strip().splitlines(), *done.stderr.strip().splitlines()]
    row = {"what": "killed, continued, compared bit by bit (--deterministic)", "right": done.returncode == 0}
    return [{**row, "said": said[-1][:300] if said else ""}]


def out_of_memory(bench: Bench) -> Rows:
    """One line on stderr, and the run is saved."""
    if bench.device.type != "cuda":
        return [{"what": "out of memory", "right": "not tried", "said": "needs a GPU"}]
    log = bench.out / "runs" / f"oom-{time.time_ns()}"
    torch.cuda.set_per_process_memory_fraction(0.05)  # so that it comes soon
    try:
        big = ["--T", "1000", "--train_batch_size", "1024", "--num_epoch", "1", "--no-rate_flag", "--log_path", log]
        status, said = script(*digits(bench), *big)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    saved = [torch.load(file, map_location="cpu", weights_only=True) for file in log.glob("*/last.pth")]
    right = status == 2 and len(said.splitlines()) == 1 and len(saved) == 1 and said.count("--resume") == 1
    return [{"what": "out of memory", "right": right, "said": f"status {status}: {said[:300]}"}]
