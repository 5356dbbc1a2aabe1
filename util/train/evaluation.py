"""A network's loss and accuracy on data that it does not learn from."""

from collections.abc import Callable, Iterable

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from .distributed import ONE_PROCESS, Processes
from .loss import Criterion, ce
from .meter import TestMeter
from .method import Method, Precision
from .progress import progress
from .signals import StopSignals


def outputs_of(net: nn.Module, method: Method, precision: Precision) -> Callable[[Tensor], Tensor]:
    """What gives a batch's outputs [T, B, classes]."""

    def outputs(x: Tensor) -> Tensor:
        with precision.autocast():
            return method.outputs(net, x)

    return outputs


@torch.no_grad()
def evaluate(
    net: nn.Module,
    method: Method,
    precision: Precision,
    loader: Iterable,
    device: torch.device,
    stop: StopSignals | None = None,
    processes: Processes = ONE_PROCESS,
    meter: TestMeter | None = None,
    outputs: Callable[[Tensor], Tensor] | None = None,
    title: str = "test",
    criterion: Criterion = ce,
) -> TestMeter:
    """Loss and accuracy over ``loader``, without gradients and with running statistics.

    Args:
        meter: counts, if given.
        outputs: does what `outputs_of` gives, if given.
        title: of the progress that is shown.

    Raises:
        StoppedError: ``stop`` was asked to.
    """
    net.eval()
    processes.share_buffers(net)
    meter, outputs = meter or TestMeter(device, processes), outputs or outputs_of(net, method, precision)
    with progress(loader, title, meter, first=processes.first) as batches:
        for x, y in processes.together(batches, stop or StopSignals()):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            out = outputs(x)
            meter.add(criterion(out, y), out.mean(0), y)
    functional.reset_net(net)
    return meter.stop()
