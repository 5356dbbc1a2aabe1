"""The state of the generators from which functions draw."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _on_gpu(operands: Iterable[Any]) -> torch.device | None:
    """Where functions of such operands draw, if not from the CPU's generator."""
    on_gpu = next((x.device for x in operands if isinstance(x, Tensor) and x.is_cuda), None)
    return None if on_gpu is None or torch.cuda.is_current_stream_capturing() else on_gpu


def generator_state(operands: Iterable[Any]) -> Tensor:
    """Of the generator that functions of such operands draw from."""
    device = _on_gpu(operands)
    return torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)


def set_generator_state(state: Tensor, operands: Iterable[Any]) -> None:
    device = _on_gpu(operands)
    torch.set_rng_state(state) if device is None else torch.cuda.set_rng_state(state, device)


@contextmanager
def same_draws(state: Tensor | None, operands: list) -> Iterator[None]:
    """From the ``state`` of the generator on, if given; what is drawn changes it no further."""
    if state is None:
        yield
        return
    after = generator_state(operands)
    set_generator_state(state, operands)
    yield
    set_generator_state(after, operands)
