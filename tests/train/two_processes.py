"""What test_distributed.py does in one process and in two: `python -m tests.train.two_processes RANK STORE RESULTS`."""

import datetime
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.layer import SpikingClassifier
from tests.processes import finish, start_python
from tests.rate.method_helpers import images, labels, net_with
from util.train.engine import Method, OneForward
from util.util import detach, rate_model_setting, sync_batch_norm

T, BATCH = 3, 5  # a batch that two processes cannot share evenly
STEPS = [(method, mode, data) for method in ("bptt", "rate") for mode in "ms" for data in ("image", "frames")]


def start(store: Path) -> list[Any]:
    """Both processes' results of `work`. Raises where one fails, or after five minutes."""
    outputs = [store.with_name(f"results{rank}.pt") for rank in range(2)]
    processes = [start_python("-m", __name__, rank, store, output) for rank, output in enumerate(outputs)]
    ended = [finish(process) for process in processes]
    assert [status for status, *_ in ended] == [0, 0], ended
    return [torch.load(output, weights_only=False) for output in outputs]


def work() -> dict[Any, Any]:
    results = {step: train_step(*step) for step in STEPS}
    results["wrapped"] = {name: train_step("rate", "s", "frames", wrap) for name, wrap in WRAPPED.items()}
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
    how = Method(method == "rate", T, mode, scale_loss=False)
    how.attach(net)
    x = images(T, BATCH).transpose(0, 1) if data == "frames" else images(1, BATCH)[0]  # [B, T, C, H, W], [B, C, H, W]
    x, y = own_part(x), own_part(labels(BATCH))
    model = OneForward(net, how)
    model = wrap(model) if dist.is_initialized() else model
    loss = F.cross_entropy(model(x), y, reduction="sum") / BATCH
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


if __name__ == "__main__":
    rank, store, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=60), 2, rank)
    torch.save(work(), output)
    dist.destroy_process_group()
