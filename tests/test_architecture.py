"""The house: what the pages about it say is so, and imports point one way."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Room -> what of the repository its modules may import, apart from themselves.
ROOMS = {
    "util": ("model",),
    "util/rate": (),
    "util/dataset": ("util/errors",),
    "util/train": ("util", "model"),
    "model": (),
    "experiment": ("util", "model"),
}


def imported(path: Path) -> set[str]:
    """What of the repository a module imports, as paths: 'util/rate/rule', 'model', ...; of packages the names too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = package[: len(package) + 1 - node.level] if node.level else ()
            prefix = ".".join([*base, *filter(None, [node.module])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return {name.replace(".", "/") for name in names if (ROOT / name.split(".")[0]).is_dir()}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}/")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_may(room):
    modules = list((ROOT / room).rglob("*.py"))
    assert modules
    for path in modules:
        forbidden = {name for name in imported(path) if not any(within(name, may) for may in (room, *ROOMS[room]))}
        assert not forbidden, path


def test_the_method_is_imported_by_relative_names_alone():
    """So that the same files are the package `rate_backprop`."""
    for path in (ROOT / "util" / "rate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "util":
                assert node.level, path


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "doc/method.md"])
def test_files_and_tests_that_a_page_names_exist(page):
    for path, inside in re.findall(
        r"`((?:util|model|tests|experiment|doc)/[\w/.]*)(?:::(\w+))?`", (ROOT / page).read_text()
    ):
        assert (ROOT / path).exists(), path
        if inside:
            assert re.search(rf"(def|class) {inside}\b", (ROOT / path).read_text()), (path, inside)
