"""Writes doc/reference/options.md: what the training scripts' --help says. python experiment/report/options.py"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "doc" / "reference" / "options.md"
SCRIPTS = ("cifar", "imagenet", "dvs")


def page(said: dict[str, str]) -> str:
    """Of each script's help: of the first all flags, of the others those that differ."""
    parts, first = ["# Options", "As `--help` says; made by `python experiment/report/options.py`."], set()
    for name, text in said.items():
        lines = [line for line in text[text.index("\ndata:\n") :].splitlines() if line and line not in first]
        flags = "\n".join(line if line.startswith(" ") else f"\n{line}" for line in lines).strip("\n")
        parts.append(f"## `experiment/{name}/main.py`{': what differs' if first else ''}\n\n```text\n{flags}\n```")
        first = first or set(lines)
    return re.sub(r" +\n", "\n", "\n\n".join(parts)) + "\n"


def help_of(name: str) -> str:
    command = [sys.executable, f"experiment/{name}/main.py", "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    PAGE.write_text(page({name: help_of(name) for name in SCRIPTS}))
