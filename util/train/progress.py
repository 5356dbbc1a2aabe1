"""How far a loop over batches has come: a bar on a terminal, elsewhere a line now and then, in a batch queue say."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .meter import Meter

logger = logging.getLogger(__name__)

FIRST_SAID_S, SAID_S = 60, 300  # seconds after which, and then between which, a line is said


@contextmanager
def progress(loader: Iterable, title: str, meter: Meter, done: int = 0, first: bool = True) -> Iterator[Iterable]:
    """Gives the batches of ``loader``, which begins after ``done`` of its steps; ``meter`` has the loss so far.

    ``first``: of several processes the one that says it.
    """
    with tqdm(loader, desc=title, initial=done, leave=False, disable=None if first else True) as bar:
        yield _told(bar, title, meter, done, len(loader))


def _told(bar: tqdm, title: str, meter: Meter, done: int, total: int) -> Iterator[Any]:
    began = time.monotonic()
    at = began + FIRST_SAID_S
    for step, batch in enumerate(bar, done):
        now = time.monotonic()
        if bar.disable and now >= at and step > done:
            left = tqdm.format_interval((now - began) / (step - done) * (total - step))
            logger.info(f"{title}: {step} of {total} steps, loss {meter.loss:.4f}, {left} left")
            at = now + SAID_S
        yield batch
        meter.show(bar)
