"""Random numbers that are a function of (seed, epoch, step) alone: to continue a run none of their states is stored."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import UserError
from .signals import leave_to_parent

_ORDER, _SAMPLES, _STEP = range(3)  # streams, so that a batch's augmentation and the network's own draws differ


def _seeds(stream: int, key: tuple[int, ...]) -> list[int]:
    return np.random.SeedSequence([stream, *key]).generate_state(3).tolist()


def seed_step(seed: int, epoch: int, step: int) -> None:
    """Makes the global generators of Python, NumPy and torch, on every device, a function of the arguments."""
    torch_seed, numpy_seed, python_seed = _seeds(_STEP, (seed, epoch, step))
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)
    random.seed(python_seed)


@contextmanager
def _drawing(key: tuple[int, int, int]) -> Iterator[None]:
    """Within, the CPU's global generators are a function of ``key``; afterwards they are as they were."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch_seed, numpy_seed, python_seed = _seeds(_SAMPLES, key)
    torch.default_generator.manual_seed(torch_seed)  # torch.manual_seed would seed the GPUs as well
    np.random.seed(numpy_seed)
    random.seed(python_seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


class Batches(Dataset):
    """Item (key, indices) is the batch of these samples, whatever is random in them drawn from ``key``."""

    def __init__(self, samples: Dataset, mix: Callable[[Tensor, Tensor], Any] | None = None):
        """``mix``: what becomes of a batch, as `util.train.recipe.Mixing`."""
        self.samples, self.mix = samples, mix

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def __getitem__(self, item: tuple[tuple[int, int, int], list[int]]) -> Any:
        key, indices = item
        with _drawing(key):
            batch = default_collate([self.samples[i] for i in indices])
            return batch if self.mix is None else self.mix(*batch)


class BatchOrder(Sampler):
    """What the batches of an epoch are made of: ((seed, epoch, step), indices), from a given step on."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.epoch, self.step = 1, 0

    def __len__(self) -> int:
        """The steps of a whole epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        # BatchNorm cannot normalise a single value; any other remainder is worth training on.
        return whole + (rest > 1 or (rest == 1 and not whole))

    def start_at(self, epoch: int, step: int = 0) -> None:
        """The next iteration gives the batches of ``epoch`` after its first ``step`` ones."""
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
        epoch, first = self.epoch, self.step
        order_seed, *_ = _seeds(_ORDER, (self.seed, epoch, 0))
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(order_seed)).tolist()
        for step in range(first, len(self)):
            yield (self.seed, epoch, step), order[step * self.batch_size : (step + 1) * self.batch_size]


def usable_cores() -> int:
    """The CPU cores that this process may use, of those that the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    mix: Callable[[Tensor, Tensor], Any] | None = None,
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training set (shuffled, its ``sampler`` a `BatchOrder`) and of the test set (in order).

    ``mix``: of training batches, see `Batches`.

    Raises:
        UserError: too few files may be open at a time.
    """
    check_open_files(num_workers)
    common = {
        "num_workers": num_workers,
        "pin_memory": torch.device(device).type == "cuda",
        "persistent_workers": num_workers > 0,
        "worker_init_fn": partial(leave_to_parent, os.getpid()),
    }
    order = BatchOrder(len(train_set), train_batch_size, seed)
    # Generators of their own, lest starting a loader advance the global one.
    train_loader = DataLoader(
        Batches(train_set, mix), batch_size=None, sampler=order, generator=torch.Generator().manual_seed(seed), **common
    )
    test_loader = DataLoader(test_set, val_batch_size, generator=torch.Generator().manual_seed(seed), **common)
    return train_loader, test_loader


@contextmanager
def workers_of(*loaders: DataLoader) -> Iterator[None]:
    """Ends the loaders' worker processes afterwards; after an error Python would wait 5 s for each of them."""
    try:
        yield
    finally:
        for loader in loaders:
            iterator, loader._iterator = loader._iterator, None
            if iterator is not None:
                iterator._shutdown_workers()
