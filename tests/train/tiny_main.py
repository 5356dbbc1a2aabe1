"""experiment/cifar/main.py with a small network, for torchrun.

DIES, "1" or "0 1", names who is killed at step 2 of epoch 2, with torchrun if that is all; not again after a restart.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest

from tests.experiment.script_helpers import CIFAR, tiny_networks
from tests.train.test_interrupts import at_step


def die() -> None:
    if os.environ["DIES"] == "0 1":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


with tiny_networks("vgg11"), pytest.MonkeyPatch.context() as patch:
    if os.environ.get("RANK") in os.environ.get("DIES", "").split() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at_step(patch, 2, 1, die)
    runpy.run_path(str(CIFAR), run_name="__main__")
