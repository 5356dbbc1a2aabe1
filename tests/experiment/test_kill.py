"""The kill test in a small form."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "flags",
    [
        ["--script", "cifar", "--num_epoch", "2"],
        ["--script", "dvs", "--num_epoch", "2", "--step_mode", "s", "--no-rate_flag", "--num_workers", "0"],
    ],
    ids=" ".join,
)
def test_a_run_killed_at_random_moments_ends_like_the_uninterrupted_one(flags):
    """Real processes, four SIGKILLs; `python tests/experiment/kill_test.py --kills 50` is the long form."""
    command = [sys.executable, "tests/experiment/kill_test.py", "--kills", "4", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights bit by bit equal: True" in done.stdout
