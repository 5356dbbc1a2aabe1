"""What test_distributed.py does in one process and in two: `python -m tests.train.two_processes RANK DIRECTORY`;
without arguments a table of the differences."""

import contextlib
import datetime
import io
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import util.train.batches
from model.branch import branch
from model.layer import SpikingClassifier
from tests.cifar_format import write_cifar10
from tests.experiment.script_helpers import CIFAR, SCALING, only_run, run_here, tiny_networks
from tests.processes import finish, start_python
from tests.rate.method_helpers import images, labels, net_with
from tests.train.test_engine import CPU, FULL
from tests.train.test_interrupts import at_step, command
from util.errors import UserError
from util.train.batches import data_loaders
from util.train.distributed import Processes, joined
from util.train.engine import Trainer
from util.train.evaluation import evaluate
from util.train.loss import ce
from util.train.method import Bptt, Method, OneForward, Rate
from util.train.optim import SCHEDULERS
from util.train.terms import Distillation
from util.util import detach, rate_model_setting, sync_batch_norm

T, BATCH = 3, 5  # a batch that two processes cannot share evenly
# Of a single image the first process has no part.
DATA = ("image", "frames", "single image")
STEPS = [(method, mode, data) for method in ("bptt", "rate") for mode in "ms" for data in DATA]


def start(directory: Path) -> list[Any]:
    """Both processes' results of `work`. Raises where one fails, or after five minutes."""
    write_cifar10(directory / "data", images_per_batch=5)
    common = {**os.environ, "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        start_python(
            *("-m", "tests.train.two_processes", str(rank), directory),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        ended = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [status for status, *_ in ended] == [0, 0], ended
    return [torch.load(directory / f"results{rank}.pt", weights_only=False) for rank in range(2)]


def work(directory: Path) -> dict[Any, Any]:
    """Everything, in the order in which both processes do it."""
    results = {step: train_step(*step) for step in STEPS}
    results["wrapped"] = {name: train_step("rate", "s", "frames", wrap) for name, wrap in WRAPPED.items()}
    with joined() as processes:
        results["epochs"] = {parts: epoch(processes, parts) for parts in (1, 2)}
        results["distilled"] = distilled(processes)
    with tiny_networks("vgg11"):
        results["scripts"] = scripts(directory)
    return results


def classifier() -> SpikingClassifier:
    """`tiny_net`, with a ReLU in front of its second BatchNorm, where the mean input's mean is not the steps' mean."""
    net = net_with(nn.ReLU(), before="bn2")
    return SpikingClassifier(net[:-1], net[-1])


def own_part(x: Tensor) -> Tensor:
    """This process's samples of a batch."""
    if not dist.is_initialized():
        return x
    first, last = (len(x) * rank // 2 for rank in (dist.get_rank(), dist.get_rank() + 1))
    return x[first:last]


def train_step(method: str, mode: str, data: str, wrap: Any = DistributedDataParallel) -> dict[str, Tensor]:
    """Gradients and buffers after a step on this process's part of the batch."""
    net = sync_batch_norm(classifier())
    how = Rate(T, mode, rate_loss_scale=False) if method == "rate" else Bptt(T, mode)
    how.attach(net)
    batch = 1 if data == "single image" else BATCH
    x = images(T, batch).transpose(0, 1) if data == "frames" else images(1, batch)[0]  # [B, T, C, H, W], [B, C, H, W]
    x, y = own_part(x), own_part(labels(batch))
    model = OneForward(net, how)
    model = wrap(model) if dist.is_initialized() else model
    loss = F.cross_entropy(model(x).mean(0), y, reduction="sum") / batch
    (loss * (2 if dist.is_initialized() else 1)).backward()  # the processes' gradients are averaged
    gradients = {name: p.grad for name, p in net.named_parameters()}
    return {**gradients, **dict(net.named_buffers())}


def attached_behind(model: nn.Module) -> nn.Module:
    """The hooks put on what DistributedDataParallel has wrapped already."""
    net = detach(model.net)
    wrapped = DistributedDataParallel(model)
    rate_model_setting(net, T, "s", static_input=True)
    return wrapped


WRAPPED = {
    "attached afterwards": attached_behind,
    "unused parameters looked for": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "static graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "gradients as views": lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
}


def epoch(processes: Processes, parts: int) -> dict[str, Tensor]:
    """What an epoch of 11 samples, a batch of 6 and one of 5, leaves behind, and what it measures."""
    trainer = make_trainer(processes, parts)
    train = trainer.train_epoch()
    test = evaluate(trainer.net, trainer.method, FULL, trainer.val_loader, CPU, processes=processes)
    measured = [train.loss, train.top1, train.top5, test.loss, test.top1, *trainer.rates.by_layer().values()]
    return {**trainer.net.state_dict(), "measured": torch.tensor(measured, dtype=torch.float64)}


def make_trainer(processes: Processes, parts: int, branches: bool = False) -> Trainer:
    net, samples = sync_batch_norm(classifier()), TensorDataset(images(1, 11)[0], labels(11))
    how, terms = Rate(T, "m"), nn.ModuleList()
    how.attach(net)
    if branches:
        torch.manual_seed(4)
        net.stages = {"features.fire1": 4}
        terms = nn.ModuleList([Distillation(net, 5, ce, 1.0, 0.3)])
        terms[0].branches[0] = branch(
            4, 5, widest=8
        )  # to a depth at which BatchNorm of five values is well-conditioned
        sync_batch_norm(terms.double())
        terms[0].attach(net)
    optimizer = torch.optim.SGD([*net.parameters(), *terms.parameters()], 0.1, momentum=0.9)
    scheduler = SCHEDULERS["constant"](optimizer, 1)
    loaders = data_loaders(samples, samples, 6, 4, 0, CPU, 3, processes, parts)
    return Trainer(net, how, FULL, optimizer, scheduler, *loaders, CPU, seed=3, processes=processes, terms=terms)


def distilled(processes: Processes) -> dict[str, Tensor]:
    """What an epoch of self-distillation leaves behind."""
    trainer = make_trainer(processes, 1, branches=True)
    trainer.train_epoch()
    return {**trainer.net.state_dict(), **trainer.terms.state_dict()}


# The script


def scripts(directory: Path) -> dict[str, tuple[int, str, str]]:
    """Name -> exit status, stdout and stderr of this process."""
    start = command(directory / "data")

    def run(name: str, *more: str | Path, argv: list[str | Path] = start, script: Path = CIFAR) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = run_here(*argv, *more, script=script)
        done[name] = status, out.getvalue(), err.getvalue()

    def run_with(act: Callable[[pytest.MonkeyPatch], Any], name: str, *more: str | Path) -> None:
        """At step 2 of epoch 2 the second process acts."""
        with pytest.MonkeyPatch.context() as patch:
            at_step(patch, 2, 1, lambda: act(patch) if dist.get_rank() else None)
            run(name, "--log_path", directory / name, *more)

    done: dict[str, tuple[int, str, str]] = {}
    run("whole", "--log_path", directory, "--run", "whole")
    run("again", "--log_path", directory, "--run", "whole")
    run("tested", argv=["--evaluate", directory / "whole", "--report", directory / "report.json"])
    for name, flag in (("synchronised", "--sync_bn"), ("apart", "--no-sync_bn")):
        run(name, "--log_path", directory, "--run", name, flag)
    run("odd", "--log_path", directory / "odd", "--train_batch_size", "9")
    run("compared", argv=["--arch", "vgg11", "--image_size", "8", "--T", "2", "--steps", "1"], script=SCALING)
    run_with(lambda _: os.kill(os.getpid(), signal.SIGTERM), "stopped")
    run("continued", argv=["--resume", only_run(directory / "stopped")])
    run_with(lambda _: os.kill(os.getpid(), signal.SIGTERM), "left")
    run_with(lambda patch: patch.setattr(util.train.batches, "default_collate", bad_sample), "sample")
    run_with(lambda patch: patch.setattr(Method, "outputs", infinite(Method.outputs)), "number")
    return done


def bad_sample(_: object) -> None:
    raise UserError("sample 7 is bad")


def infinite(forward: Callable) -> Callable:
    return lambda *args: forward(*args) * math.inf


def print_table() -> None:
    """Largest difference between two processes and one, of doc/guide/processes.md."""
    with tempfile.TemporaryDirectory() as scratch:
        found = start(Path(scratch))
    print("| | gradients | running statistics |\n| --- | --- | --- |")
    for step in STEPS:
        expected = train_step(*step)
        worst = dict.fromkeys(("running", "gradient"), 0.0)
        for name, value in expected.items():
            difference = max((result[step][name] - value).abs().max() for result in found)
            scale = value.abs().max() if value.abs().max() > 1e-12 else 1.0  # a bias before a BatchNorm has none
            kind = "running" if "running" in name or "num_batches" in name else "gradient"
            worst[kind] = max(worst[kind], (difference / scale).item())
        print(f"| {step[0]}, {step[1]}, {step[2]} | {worst['gradient']:.1e} | {worst['running']:.1e} |")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(print_table())
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", f"file://{directory}/store", datetime.timedelta(seconds=60), 2, rank)
    torch.save(work(directory), directory / f"results{rank}.pt")
    dist.destroy_process_group()
