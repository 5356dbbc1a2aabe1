"""Several processes beside one: time of a training step, and what they hand to one another in it.

torchrun --nproc_per_node 2 experiment/benchmark/scaling.py                           ResNet-18, 32x32, batch 16, T = 4
torchrun --nproc_per_node 8 experiment/benchmark/scaling.py --arch sew_resnet34 --image_size 224 --batch_size 512

A step is forward, loss and backward of a batch that all processes share, with synchronised BatchNorm. Beside it, in
turns, the first process computes the whole batch while the others wait. Bytes are what each process contributes:
gradients to their sum; in the forward means and variances, which are gathered; going back three sums a channel.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import util.train.before_torch  # noqa: F401  (before torch)
from model import MODELS
from util.rate.sync_norm import Synchronised, sync_batch_norm
from util.train.distributed import ONE_PROCESS, Processes, joined, share
from util.train.method import Bptt, Method, OneForward, Rate
from util.train.options import Parser, complain
from util.train.setup import choose_device
from util.train.values import number, one_of

GRADIENTS, FORWARD, BACKWARD = KINDS = ("gradients", "statistics, forward", "statistics, backward")
BYTES = 4  # of a float32


def computed(net: nn.Module, method: Method, stem: int) -> Counter[str]:
    """Bytes by kind that a step takes by the number of parameters and channels; the first ``stem`` BatchNorms see the
    image alone, which rate-based training shows them once.
    """
    norms = [module.num_features for module in net.modules() if isinstance(module, Synchronised)]
    steps = method.T if method.step_mode == "s" else 1
    calls = [1 if isinstance(method, Rate) and i < stem else steps for i in range(len(norms))]
    backward = [1 if isinstance(method, Rate) else steps] * len(norms)
    return Counter({
        GRADIENTS: sum(p.numel() for p in net.parameters()) * BYTES,
        FORWARD: sum(n * (2 * c + 1) for n, c in zip(calls, norms, strict=True)) * BYTES,
        BACKWARD: sum(n * (3 * c + 1) for n, c in zip(backward, norms, strict=True)) * BYTES,
    })  # fmt: skip


@contextmanager
def counting(found: Counter[str]) -> Iterator[None]:
    """Within, ``found`` gathers the bytes that this process hands to the collectives of BatchNorm."""

    def counted(kind: str, collective: Callable, place: int) -> Callable:
        def call(*args: Tensor, **options) -> object:
            if not options:  # with which the sum of gradients comes by, counted by its hook
                found[kind] += args[place].nbytes
            return collective(*args, **options)

        return call

    plain = dist.all_gather, dist.all_reduce
    dist.all_gather, dist.all_reduce = counted(FORWARD, plain[0], 1), counted(BACKWARD, plain[1], 0)
    yield
    dist.all_gather, dist.all_reduce = plain


class Contender:
    """One network trained by one method, with all processes or in the first alone."""

    def __init__(self, options: argparse.Namespace, rate: bool, mode: str, processes: Processes, found: Counter[str]):
        torch.manual_seed(0)
        device, size = choose_device(options.device, processes), options.image_size
        self.net = MODELS[options.arch](num_classes=10, in_channel=3).to(device)
        self.method = (Rate if rate else Bptt)(options.T, mode)
        self.method.attach(self.net)
        self.model = processes.parallel(OneForward(self.net, self.method), device, False)
        if processes.size > 1:
            sync_batch_norm(self.net)

            def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
                found[GRADIENTS] += bucket.buffer().nbytes
                return allreduce_hook(None, bucket)

            self.model.register_comm_hook(None, hook)
        own = len(share(range(options.batch_size), processes.rank, processes.size))
        self.x = torch.randn(own, 3, size, size, device=device)
        self.y = torch.zeros(own, device=device, dtype=torch.long)

    def step(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        self.net.zero_grad()
        self.method.backward(F.cross_entropy(self.model(self.x).mean(0), self.y))
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=one_of(tuple(MODELS)), default="resnet18")
    parser.add_argument("--image_size", type=number(int, 1), default=32)
    parser.add_argument("--batch_size", type=number(int, 1), default=16, help="of all processes together")
    parser.add_argument("--T", type=number(int, 1), default=4)
    parser.add_argument("--steps", type=number(int, 1), default=5, help="of each, timed; one before is not")
    parser.add_argument("--device")
    options = parser.parse_args()
    with joined() as processes:
        if processes.size == 1:
            sys.exit(complain(parser.prog, "there is one process: start it with torchrun --nproc_per_node 2 ..."))
        compare(options, processes)


def compare(options: argparse.Namespace, processes: Processes) -> None:
    rows = []
    for rate in (False, True):
        for mode in "ms":
            found: Counter[str] = Counter()
            together, times = Contender(options, rate, mode, processes, found), []
            alone, alone_times = Contender(options, rate, mode, ONE_PROCESS, found) if processes.first else None, []
            with counting(found):
                together.step()
            in_a_step = dict(found)
            for _ in range(1 + options.steps):
                processes.wait()
                if alone:
                    alone_times.append(alone.step())
                processes.wait()
                times.append(together.step())
            name = f"{'rate-based' if rate else 'BPTT'}, {mode}"
            pair = (statistics.median(alone_times[1:]), statistics.median(times[1:])) if alone else ()
            rows.append((name, pair, in_a_step, computed(together.net, together.method, stem=1)))
    if processes.first:
        show(rows, processes)


def show(rows: list[tuple], processes: Processes) -> None:
    titles = ["", "one, steps/s", f"{processes.size}, steps/s", "ratio", *(f"{kind}: KiB (computed)" for kind in KINDS)]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for name, (alone, together), found, expected in rows:
        cells = [name, f"{1 / alone:.2f}", f"{1 / together:.2f}", f"{alone / together:.2f}"]
        cells += [f"{found.get(kind, 0) / 1024:.1f} ({expected[kind] / 1024:.1f})" for kind in KINDS]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
