"""What a checkpoint costs: memory while it is written and read is near its size once."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from util.train import checkpoint

PARAMETERS = 16_000_000  # as many zeros would be fewer pages; `python tests/train/test_checkpoint.py`: 100 million


def peak_of(act: Callable[[], object]) -> int:
    """By how many bytes the memory of this process rises at most while ``act`` runs."""

    def memory(name: str) -> int:
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = memory("VmRSS")
    kept = act()
    peak = memory("VmHWM") - before
    del kept
    return peak


def peaks(path: Path, parameters: int) -> tuple[float, float]:
    """Of writing and of reading a checkpoint, as multiples of its size."""
    content = {"config": {}, "model": {"weight": torch.ones(parameters)}}
    writing = peak_of(lambda: checkpoint.save(path, **content))
    content.clear()
    reading = peak_of(lambda: checkpoint.load(path))
    return writing / path.stat().st_size, reading / path.stat().st_size


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
def test_a_checkpoint_is_written_without_a_copy_and_read_with_one(tmp_path):
    writing, reading = peaks(tmp_path / "last.pth", PARAMETERS)
    assert writing < 0.3
    assert reading < 1.3


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        print("peak while writing and reading, in sizes of the file: {:.2f}, {:.2f}".format(
            *peaks(Path(directory) / "last.pth", 100_000_000)))  # fmt: skip
