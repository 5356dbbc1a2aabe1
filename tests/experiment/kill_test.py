"""Kills a training run at random moments, continues it each time, and compares its end with the uninterrupted run's.

python tests/experiment/kill_test.py --kills 50                            images, rate-based, step mode m, two workers
python tests/experiment/kill_test.py --kills 50 --script dvs --step_mode s --no-rate_flag --num_workers 0

Each life of the run is a process of its own, which SIGKILL ends: forked, so that nothing need be imported again. Flags
other than --kills, --script, --random and --tiny go to the script. Exit status 1 if anything differs.
"""

import argparse
import contextlib
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a forked process has no other threads than the one that forked
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import util.data  # noqa: E402, F401  (and what it imports)
from tests.event_files import random_layout_a  # noqa: E402
from tests.experiment.script_helpers import check_continued, load, only_run, runs, same, tiny_networks  # noqa: E402
from util.dataset.digits import read_digits  # noqa: E402

COMMON = ["--arch", "vggsnn_small", "--rate_flag", "--num_workers", "2", "--save_every", "4", "--num_epoch", "3"]
FLAGS = {
    "cifar": ["--dataset", "DIGITS", "--T", "2", "--auto_aug", "--cutout", "--train_batch_size", "32"],
    "dvs": ["--dataset", "CIFAR10_DVS_Aug", "--T", "2", "--data_path", "frames", "--train_batch_size", "4"],
}


def start(script: str, flags: list[str], said: Path) -> int:
    """The process id of the script, whose output goes to the file ``said``."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.argv = [str(ROOT / "experiment" / script / "main.py"), *flags]
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float = float("inf")) -> int:
    """The exit status, -9 if the process had to be killed after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.002)


def training_time(start_up: float, mean: float) -> float:
    """Such that lives of random length, up to ``start_up`` and this, train for ``mean`` seconds on average."""
    # mean = time^2 / 2 (start_up + time)
    return mean + (mean**2 + 2 * mean * start_up) ** 0.5


def progress(log_path: Path) -> tuple[float, str]:
    """The share of its epochs that the run has done, and where it stands, from its checkpoint."""
    if not runs(log_path):
        return 0.0, "before its directory was there"
    last = load(only_run(log_path) / "last.pth")
    done = len(last["logged"])
    return done / last["config"]["num_epoch"], f"epoch {done + 1}, step {last['step']} saved"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--script", choices=FLAGS, default="cifar")
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    parser.add_argument("--tiny", action="store_true", help="train two layers, in a second, in place of vggsnn_small")
    options, more = parser.parse_known_args()
    flags = [*FLAGS[options.script], *COMMON, *more]
    print(f"python experiment/{options.script}/main.py {' '.join(flags)}")
    networks = tiny_networks("vggsnn_small") if options.tiny else contextlib.nullcontext()
    with networks, tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        if options.script == "dvs":
            random_layout_a(Path("frames"), time_steps=2, size=48, train=200, test=20)
        else:
            read_digits()  # imports what reads them
        return kill_and_compare(options.script, flags, options.kills, random.Random(options.random))


def kill_and_compare(script: str, flags: list[str], kills: int, moments: random.Random) -> int:
    whole, killed, said = Path("whole"), Path("killed"), Path("said")

    def begin(log_path: Path) -> int:
        resume = ["--resume", str(only_run(log_path))] if runs(log_path) else [*flags, "--log_path", str(log_path)]
        return start(script, resume, said)

    began = time.monotonic()
    child = begin(whole)
    while not runs(whole) and time.monotonic() < began + 100:
        time.sleep(0.002)
    start_up = time.monotonic() - began
    if wait(child):
        print(said.read_text())
        return 1
    length = time.monotonic() - began - start_up
    print(f"uninterrupted: {start_up:.1f} s until its directory is there, then {length:.1f} s")
    longest = start_up + training_time(start_up, 0.4 * length / kills)

    done = continued = 0
    while done < kills:
        continued += bool(runs(killed))
        status = wait(begin(killed), moments.uniform(0, longest))
        if status != -signal.SIGKILL:
            break
        done += 1
        share, stand = progress(killed)
        print(f"kill {done}: {stand}", flush=True)
        # A machine that others use is now faster, now slower: the run must not end before it has been killed so often.
        longest *= 0.8 if share > 0.8 * done / kills else 1.05
    else:
        continued += bool(runs(killed))
        status = wait(begin(killed))
    if status:
        print(said.read_text())
        return 1

    whole_run, killed_run = only_run(whole), only_run(killed)
    check_continued(killed_run, whole_run, len(load(whole_run / "last.pth")["logged"]))
    equal = same(*(load(run / "last.pth")["model"] for run in (whole_run, killed_run)))
    print(f"{done} kills, {continued} continuations with --resume")
    print(f"weights bit by bit equal: {equal}; optimizer, metrics and TensorBoard equal, each epoch once: True")
    return 0


if __name__ == "__main__":
    sys.exit(main())
