"""Processes that tests start as a user does. Imports nothing that takes long: they import it too."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from util.train.signals import leave_to_parent

ROOT = Path(__file__).resolve().parents[1]


def start_python(
    *args: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None, **more: Any
) -> subprocess.Popen:
    """Python with these arguments, on one thread and without a network; ``env`` in place of this process's own."""
    proxies = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**(os.environ if env is None else env), **proxies, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, stdout, stderr, once it has ended and no child of it holds these."""
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, out, err


def load_slowly(parent: int, running: Any) -> None:
    """What a process that loads data for ``parent`` does, once ``running`` is set: nothing."""
    leave_to_parent(parent)
    running.set()
    signal.pause()
