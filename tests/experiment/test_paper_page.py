"""README.md and doc/method/paper.md: their commands are ones that the scripts take."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from util.train.options import TrainOptions, parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "doc" / "method" / "paper.md")
COMMAND = re.compile(r"(?:`|^    )python (experiment/\w+/(?:main|gpu)\.py[^`\n#]*)", re.MULTILINE)
COMMANDS = sorted({found.strip() for page in PAGES for found in COMMAND.findall(page.read_text())})


def read(command: str) -> None:
    """Leaves with status 2 where a flag is unknown or its value out of range."""
    script, *argv = shlex.split(command)
    names = runpy.run_path(str(ROOT / script), run_name="imported")
    if "make_parser" in names:
        names["make_parser"]().parse_args(argv)
        return
    own = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, TrainOptions)]
    parse(max(own, key=lambda kind: len(kind.__mro__)), None, argv)


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--help" not in command])
def test_a_command_of_a_page_is_understood(command):
    read(command)


@pytest.mark.parametrize("flag", ["--timesteps 3", "--T zero"])
def test_one_that_is_not_is_found(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(f"experiment/cifar/main.py {flag}")
