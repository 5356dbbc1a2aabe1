"""Random numbers that are a function of (seed, epoch, step) alone: to continue a run none of their states is stored."""

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import UserError
from .distributed import ONE_PROCESS, Processes, share, under_torchrun
from .signals import leave_to_parent

_ORDER, _SAMPLES, _STEP = range(3)  # streams, so that a batch's augmentation and the network's own draws differ


def _seeds(stream: int, key: tuple[int, ...], count: int = 1) -> list[list[int]]:
    """``count`` times three numbers, the first ones the same for any ``count``."""
    return np.random.SeedSequence([stream, *key]).generate_state(3 * count).reshape(count, 3).tolist()


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Makes the global generators of Python, NumPy and torch, on every device, a function of the arguments."""
    ((torch_seed, numpy_seed, python_seed),) = _seeds(_STEP, (seed, epoch, step))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


@contextmanager
def _drawing() -> Iterator[Callable[[list[int]], None]]:
    """Gives what seeds the CPU's global generators with three numbers; afterwards they are as they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def seed(seeds: list[int]) -> None:
        torch.default_generator.manual_seed(seeds[0])  # torch.manual_seed would seed the GPUs as well
        np.random.seed(seeds[1])
        random.seed(seeds[2])

    try:
        yield seed
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


class Batches(Dataset):
    """Item (key, shares, indices): of a step's batch, which is these samples, those at the positions of the shares.

    Whatever is random in a sample is drawn from the key and its position, whichever process it is that draws.
    """

    def __init__(self, samples: Dataset, mix: Callable[[Tensor, Tensor], Any] | None = None):
        """``mix``: what becomes of a batch, as `util.train.recipe.Mixing`: of each sample and the one before it."""
        self.samples, self.mix = samples, mix

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def __getitem__(self, item: tuple[tuple[int, int, int], list[range], list[int]]) -> Any:
        key, shares, indices = item
        *seeds, mix_seeds = _seeds(_SAMPLES, key, len(indices) + 1)
        with _drawing() as seed:

            def batch(positions: Iterable[int]) -> list[Tensor]:
                samples = []
                for position in positions:
                    seed(seeds[position])
                    samples.append(self.samples[indices[position]])
                return default_collate(samples)

            def mixed(positions: Sequence[int]) -> list[Tensor]:
                # Each sample is mixed with the one before it, the first with the last of the step's batch.
                x, y = batch([(positions[0] - 1) % len(indices), *positions])
                seed(mix_seeds)
                x, y = self.mix(x, y)
                return [x[1:], y[1:]]

            made = batch if self.mix is None else mixed
            parts = [made(share) for share in shares if share] or [[x[:0] for x in made([0])]]
            return parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts, strict=True)]


class BatchOrder(Sampler):
    """What this process's batches of an epoch are made of: (key, shares, indices), from a given step on.

    The key is (seed, epoch, step); the indices are of the step's whole batch, which all processes share.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        processes: Processes = ONE_PROCESS,
        parts: int = 1,
        least: int = 2,
    ):
        """Args:
        batch_size: of a step, of all processes together.
        parts: in how many parts a batch is computed.
        least: samples of a part, at least, that all processes together can compute.
        """
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.processes, self.parts, self.least = processes, parts, least
        self.epoch, self.step = 1, 0

    def __len__(self) -> int:
        """The steps of a whole epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        # BatchNorm cannot normalise a single value; any other remainder is worth training on.
        return whole + (rest >= self.least or (rest > 0 and not whole))

    def samples(self, step: int) -> int:
        """In the batch of a step, of all processes together."""
        return min(self.batch_size, self.size - step * self.batch_size)

    def shares(self, step: int) -> list[range]:
        """This process's positions in the batch of a step, for each of the parts in which it is computed."""
        batch = range(self.samples(step))
        parts = self.parts if len(batch) == self.batch_size else min(self.parts, max(1, len(batch) // self.least))
        return [share(share(batch, i, parts), self.processes.rank, self.processes.size) for i in range(parts)]

    def start_at(self, epoch: int, step: int = 0) -> None:
        """The next iteration gives the batches of ``epoch`` after its first ``step`` ones."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[tuple[tuple[int, int, int], list[range], list[int]]]:
        epoch, first = self.epoch, self.step
        (order_seed, *_), *_ = _seeds(_ORDER, (self.seed, epoch, 0))
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(order_seed)).tolist()
        for step in range(first, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield (self.seed, epoch, step), self.shares(step), batch


def usable_cores() -> int:
    """The CPU cores that this process may use, of those that the machine has and torchrun's processes there share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (int(os.environ["LOCAL_WORLD_SIZE"]) if under_torchrun() else 1))


MORE_OPEN_FILES = "allow more with `ulimit -n 4096`, or use fewer --num_workers"
_FILES_A_WORKER = 12  # pipes and queues of the processes of both loaders, and batches on their way, as counted


def check_open_files(num_workers: int) -> None:
    """Raises UserError where the limit of open files is too low: torch would end in tracebacks, with half of them."""
    opened = []
    try:
        for _ in range(_FILES_A_WORKER * num_workers):
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        raise UserError(f"too many open files for --num_workers {num_workers}: {MORE_OPEN_FILES}") from error
    finally:
        for handle in opened:
            os.close(handle)


def data_loaders(
    train_set: Dataset,
    test_set: Dataset,
    train_batch_size: int,
    val_batch_size: int,
    num_workers: int,
    device: torch.device | str,
    seed: int,
    processes: Processes = ONE_PROCESS,
    parts: int = 1,
    least: int = 2,
    mix: Callable[[Tensor, Tensor], Any] | None = None,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training set (shuffled, its ``sampler`` a `BatchOrder`) and of the test set (in order).

    Batch sizes are of all processes together; each gets its own part. ``parts`` and ``least`` as of `BatchOrder`;
    ``mix``: of training batches, see `Batches`.

    Raises:
        UserError: too few files may be open at a time.
    """
    check_open_files(num_workers)
    order = BatchOrder(len(train_set), train_batch_size, seed, processes, parts, least)
    train_loader = DataLoader(
        Batches(train_set, mix), batch_size=None, sampler=order, **_how_loaders_work(num_workers, device, seed)
    )
    return train_loader, loader_in_order(test_set, val_batch_size, num_workers, device, seed, processes)


def loader_in_order(
    samples: Dataset,
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
    seed: int,
    processes: Processes = ONE_PROCESS,
) -> DataLoader:
    """Of a set to test on; each sample once in all processes together, without padding."""
    own = range(processes.rank, len(samples), processes.size)
    common = _how_loaders_work(num_workers, device, seed)
    return DataLoader(samples, -(-batch_size // processes.size), sampler=own, **common)


def _how_loaders_work(num_workers: int, device: torch.device | str, seed: int) -> dict[str, Any]:
    return {
        "num_workers": num_workers,
        "pin_memory": torch.device(device).type == "cuda",
        "persistent_workers": num_workers > 0,
        "worker_init_fn": partial(leave_to_parent, os.getpid()),
        "generator": torch.Generator().manual_seed(seed),  # lest starting a loader advance the global one
    }


@contextmanager
def workers_of(*loaders: DataLoader) -> Iterator[None]:
    """Ends the loaders' worker processes afterwards; after an error Python would wait 5 s for each of them."""
    try:
        yield
    finally:
        end_workers(*loaders)


def end_workers(*loaders: DataLoader) -> None:
    for loader in loaders:
        iterator, loader._iterator = loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()
