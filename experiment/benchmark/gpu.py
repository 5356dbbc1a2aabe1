"""Everything that is to be known of a GPU, in stages: is it right, how fast, does it learn, where does the time go.

python experiment/benchmark/gpu.py --out DIR --data FILE_OR_DIR       all stages
python experiment/benchmark/gpu.py --out DIR --stage right fast       some
python experiment/benchmark/gpu.py --out DIR --stage fast --part "T = 4" graph      parts whose names hold one of these
python experiment/benchmark/gpu.py --out DIR --stage right --jobs 12  as many parts at a time, each in its own process
python experiment/benchmark/gpu.py --out DIR --dry_run                all of them in small on a CPU, in a minute

A stage consists of parts. What a part has found is written to DIR as soon as it is known, and report.md, a CSV file a
stage and their plots are made anew. After --seconds no other part begins; the same command goes on with the parts that
are missing or failed. Needs no network. --data is a directory with cifar-10-batches-py, or an archive
(images.tar.xz) of train/CLASS/NAME.jpg and test/CLASS/NAME.jpg.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product: see two_runs

import util.train.before_torch  # noqa: F401  (before torch)

# isort: split
from experiment.benchmark import gpu_fast, gpu_learns, gpu_right
from experiment.benchmark.gpu_report import ORDER, Bench, Report
from util.errors import UserError
from util.train.options import Parser, complain, number, path
from util.train.script import choose_device
from util.train.signals import raise_on_interrupt

# name: parts(bench) -> {name: function of the bench that returns the rows found}. In the order in which they run.
STAGES = dict(
    zip(
        ORDER,
        (gpu_right.parts, gpu_fast.parts, gpu_fast.profile_parts, gpu_learns.parts, gpu_fast.default_parts),
        strict=True,
    )
)

AT_A_TIME = ("right",)  # stages whose parts may run beside one another: they measure no speed that counts
SUMMARIES = ("verdicts", "what the numbers ask for")  # take no time, and are made anew of what is there


def run(bench: Bench, stages: list[str], wanted: tuple[str, ...] = ("",), jobs: int = 1) -> list[str]:
    """Runs the parts that are missing until the time is up. Returns the names of those that are missing still.

    ``wanted``: names of parts, or what these hold. ``jobs``: of `AT_A_TIME`'s stages, so many parts at a time.
    """
    report, missing = Report(bench), []
    for stage in stages:
        parts = STAGES[stage](bench)
        held = [text for text in wanted if text not in parts]
        parts = {name: find for name, find in parts.items() if name in wanted or any(text in name for text in held)}
        if jobs > 1 and stage in AT_A_TIME:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda name, stage=stage: _in_its_own_process(stage, name), parts))
        for name, find in parts.items():
            if name in SUMMARIES:
                report.add(stage, name, find)
                continue
            if report.has(stage, name) or (jobs > 1 and stage in AT_A_TIME):
                continue
            if time.monotonic() >= bench.deadline:
                missing.append(f"{stage}: {name}")
                continue
            print(f"{stage}: {name} ...", flush=True)
            report.add(stage, name, find)
    report.write()
    return missing


def _in_its_own_process(stage: str, name: str) -> None:
    """This command, for one part."""
    print(f"{stage}: {name} ...", flush=True)
    command = [sys.executable, *sys.argv, "--stage", stage, "--part", name, "--jobs", "1"]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, required=True, help="directory of the report")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--part", nargs="+", default=[""], metavar="TEXT", help="the parts of these names, or whose names hold this"
    )
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="parts of the stage right at a time")
    parser.add_argument("--data", type=path, help="CIFAR-10, for the stage learns")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seconds", type=number(int, 0), default=480, help="after which no other part begins")
    parser.add_argument("--epochs", type=number(int, 1), help="of each training (default: as many as --learn_seconds)")
    parser.add_argument("--learn_seconds", type=number(int, 1), default=300, help="for each training, over all calls")
    parser.add_argument("--dry_run", action="store_true", help="all in small on a CPU: no figure is a GPU's")
    return parser


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    try:
        raise_on_interrupt()
        device = choose_device("cpu" if options.dry_run else options.device)
        if device.type != "cuda" and not options.dry_run:
            raise UserError(f"there is no GPU here ({device}): use --dry_run to try the stages in small on a CPU")
        if options.dry_run:  # code is compiled as it is, in time that a dry run has not
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        bench = Bench(options, device, time.monotonic() + options.seconds)
        stages = [stage for stage in STAGES if stage in options.stage]
        missing = run(bench, stages, tuple(options.part), options.jobs)
    except (UserError, OSError) as error:
        return complain(parser.prog, error)
    except KeyboardInterrupt:
        return 130
    print(f"report: {bench.out / 'report.md'}")
    if missing:
        print(f"the time is up; missing: {', '.join(missing)}; the same command goes on with them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
