"""Shows what a full disk does to a training run: the second epoch's checkpoint does not fit any more.

python tests/experiment/full_disk.py

As root it mounts a file system of 2 MB in memory; otherwise a limit on the size of files stands for it, which the first
epoch's checkpoint meets. Exit status 1 if anything but the promised happens.
"""

import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.experiment.script_helpers import check_continued, load, only_run  # noqa: E402

SCRIPT = "experiment/cifar/main.py"
FLAGS = ["--dataset", "DIGITS", "--arch", "vggsnn_small", "--T", "2", "--num_epoch", "2", "--log_path"]
LIMIT = 600_000  # bytes, between the first checkpoint, which has no momenta yet, and the second


def python(*argv: str | Path, limit: bool = False) -> int:
    """Runs a command, printing it, what it says and its exit status."""
    print("$ python " + shlex.join(map(str, argv)), flush=True)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, **output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print(f"{done.stdout}exit status {done.returncode}\n", flush=True)
    return done.returncode


def mount(*options: str) -> bool:
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        disk = Path(scratch) / "disk"
        disk.mkdir()
        mounted = mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk))
        try:
            show(disk, Path(scratch) / "roomy", mounted)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(disk)], check=True)


def show(disk: Path, roomy: Path, mounted: bool) -> None:
    print("a disk of 2 MB\n" if mounted else f"files of at most {LIMIT} bytes\n")
    assert python(SCRIPT, *FLAGS, str(disk), limit=not mounted) == 2
    run = only_run(disk)
    for path in sorted(run.iterdir()):
        print(f"{path.stat().st_size:>9} {path.name}")
    print(f"last.pth can be read: after epoch {len(load(run / 'last.pth')['logged'])}\n")

    if mounted:
        print("$ mount -o remount,size=8m\n")
        assert mount("-o", "remount,size=8m", str(disk))
    assert python(SCRIPT, "--resume", str(run)) == 0
    assert python(SCRIPT, *FLAGS, str(roomy)) == 0
    check_continued(run, only_run(roomy), 2)
    print("The continued run's weights, metrics and TensorBoard are those of the run that had room.")


if __name__ == "__main__":
    main()
