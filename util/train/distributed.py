"""The processes that torchrun started to train together. Without it there is one, and nothing here does anything."""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import RunError, UserError
from .signals import StoppedError, StopSignals

Value = TypeVar("Value")


class AloneError(RunError):
    """Met by one process in the midst of a step, where the others cannot know: torchrun ends them."""


class LostError(AloneError):
    """Another process has ended."""


def under_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


# What other launchers tell a process of how many there are -> its flag that starts so many.
LAUNCHERS = {
    "WORLD_SIZE": "",
    "OMPI_COMM_WORLD_SIZE": "mpirun -n",
    "PMI_SIZE": "mpirun -n",
    "SLURM_STEP_NUM_TASKS": "srun -n",
}


def check_launcher() -> None:
    """Raises UserError in one of several processes that another launcher has started: each would train by itself."""
    for name, flag in LAUNCHERS.items():
        count = os.environ.get(name, "1")
        if not under_torchrun() and count.isdigit() and int(count) > 1:
            by = f" (of {flag} {count})" if flag else ""
            raise UserError(
                f"{name}={count}{by}, but not by torchrun: each process would train by itself; start one torchrun a "
                "machine: torchrun --nproc_per_node GPUS SCRIPT ..., or unset it to train in one process"
            )


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return not under_torchrun() or os.environ.get("RANK", "0") == "0"


def share(positions: range, index: int, count: int) -> range:
    """The part with this index of ``count`` parts as equal as can be; some are empty where there are too few."""
    return positions[len(positions) * index // count : len(positions) * (index + 1) // count]


@dataclass(frozen=True)
class Processes:
    """Who this process is among those that train together; its methods but `own_seed` are to be called by all alike."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def own_seed(self, seed: int) -> int:
        """A seed, below 2^32, made this process's own: for other samples a network should draw other numbers."""
        return seed + self.rank * 2**32

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """What one process fails with within is raised in all."""
        error = None
        try:
            yield
        except (UserError, OSError) as raised:
            error = raised
        if self.largest(int(error is not None)):
            self._raise_first(error)

    def from_first(self, function: Callable[[], Value]) -> Value:
        """What ``function``, called by the first process alone, returned there, or raised."""
        result = None
        with self.raising_together():
            if self.first:
                result = function()
        if self.size > 1:
            held = [result]
            dist.broadcast_object_list(held)
            (result,) = held
        return result

    def in_turn(self, function: Callable[[], Value]) -> Value:
        """``function()``; first of one process on each machine: the others find what it has downloaded or made."""
        for turn in (True, False) if self.size > 1 else (True,):
            with self.raising_together():
                if (self.local_rank == 0) is turn:
                    result = function()
        return result

    def together(self, batches: Iterable[Value], stop: StopSignals) -> Iterator[Value]:
        """The batches of this process, while any has one. Between two of them all hear of what one has met.

        Raises:
            StoppedError: one of them was asked to stop.
            UserError, OSError, RuntimeError: one of them could not get its next batch.
        """
        batches = iter(batches)
        while True:
            batch = error = None
            try:
                batch = next(batches, None)
                stop.check()
            except (UserError, OSError, RuntimeError, StoppedError) as raised:
                error = raised
            found = self.largest(2 if error else int(batch is not None))
            if found == 2:
                self._raise_first(error)
            if not found:
                return
            if batch is not None:
                yield batch

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def parallel(self, model: nn.Module, device: torch.device, buffers_differ: bool) -> nn.Module:
        """``model`` with gradients averaged over all processes in each backward pass.

        Args:
            buffers_differ: each forward begins with the first process's buffers.
        """
        if self.size == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=devices, broadcast_buffers=buffers_differ, gradient_as_bucket_view=True
        )

    def share_buffers(self, net: nn.Module) -> None:
        """Gives all processes the first one's buffers."""
        if self.size > 1:
            for buffer in net.buffers():
                dist.broadcast(buffer, 0)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """At its end waits until all have come there: torchrun ends the others when the first of them has failed."""
        try:
            yield
        except SystemExit:
            self.wait()
            raise
        self.wait()

    def wait(self) -> None:
        with suppress(RuntimeError):
            self.largest(0)

    def largest(self, number: int) -> int:
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
        return int(numbers.item())

    def _raise_first(self, error: Exception | None) -> None:
        if self.size == 1:
            raise error
        errors = [None] * self.size
        dist.all_gather_object(errors, error and _sendable(error))
        first = next(rank for rank, other in enumerate(errors) if other is not None)
        raise error if first == self.rank else errors[first]


ONE_PROCESS = Processes()


def _sendable(error: Exception) -> Exception:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of exceptions that was not made for it raises
        return RuntimeError(str(error))


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


@contextmanager
def joined() -> Iterator[Processes]:
    """This process, joined with the others that torchrun started: by NCCL on GPUs, by Gloo on CPUs.

    Raises:
        LostError: they do not find one another.
    """
    check_launcher()
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield Processes()
        return
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    processes = Processes(*(int(os.environ[name]) for name in names))
    if dist.is_initialized():
        yield processes
        return
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if processes.size == processes.local_size:
            # After a restart torchrun's store may still tell the addresses of those that have ended.
            store, *_ = next(rendezvous("env://"))
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.size)
        else:
            dist.init_process_group(backend)
    except RuntimeError as error:
        raise LostError(f"the processes do not find one another: {str(error).splitlines()[0]}") from error
    try:
        yield processes
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()
