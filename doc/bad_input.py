"""Prints what the training scripts say to bad input, as a table: every case of tests/experiment/bad_inputs.py, run.

python doc/bad_input.py > doc/bad_input.md
"""

import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.experiment.bad_inputs import LONG, Case, cases, prepare, surroundings  # noqa: E402
from tests.experiment.script_helpers import run_here  # noqa: E402


def answer(case: Case, root: Path) -> str:
    """The message. RuntimeError where the script did anything but say one line and end with exit status 2."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(StringIO()):
        status = run_here(*case.argv, script=case.script)
    lines = said.getvalue().splitlines()
    if status != 2 or len(lines) != 1:
        raise RuntimeError(f"{case.line}: exit status {status}, {lines}")
    return lines[0].removeprefix("main.py: error: ").replace(f"{root}/", "").replace(LONG, "aaa...")


def row(case: Case, root: Path) -> str:
    line = case.line.replace(LONG, "aaa...")
    cells = (case.script.parent.name, f"`{line}`", answer(case, root))
    return " | ".join(["", *(text.replace("|", "\\|") for text in cells), ""]).strip()


def main() -> None:
    rows = cases()
    print("# What the training scripts say to bad input\n")
    print("Made by `python doc/bad_input.py > doc/bad_input.md`. Each line is typed beside flags that are good; what")
    print("the files and directories hold stands in `tests/experiment/bad_inputs.py`. Every one of these commands ends")
    print("with exit status 2 and the one line on stderr, leaves no run directory and touches no file;")
    print(f"`tests/experiment/test_bad_input.py` holds the scripts to it. {len(rows)} cases.\n")
    print("| script | command line | answer |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory, surroundings():
        root = Path(directory).resolve()
        with redirect_stdout(StringIO()):
            prepare(root)
        os.chdir(root)
        for case in rows:
            print(row(case, root))
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
