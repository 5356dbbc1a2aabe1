"""Damaged files and senseless flags, at random: a script succeeds or says in one line what is wrong, and never else.

The examples are the same in every run (hypothesis, derandomized).
"""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.experiment.bad_inputs import FRAMES, GIVEN, IMAGES  # noqa: E402
from tests.experiment.script_helpers import CIFAR, DVS, image_options, load, run_here, runs, same, snapshot, stamps  # noqa: E402
from util.errors import UserError  # noqa: E402
from util.train import checkpoint  # noqa: E402

pytestmark = pytest.mark.usefixtures("surroundings")

of_hundred = settings.default.max_examples / 100  # 1 in CI, less in plain pytest: tests/conftest.py
few = settings(
    max_examples=round(40 * of_hundred),
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
some = settings(few, max_examples=round(100 * of_hundred))
many = settings(few, max_examples=round(200 * of_hundred))


@st.composite
def damage(draw) -> Callable[[bytes], bytes]:
    """Cut off, bits flipped, bytes overwritten or put in, at places that are drawn as fractions of the length."""
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert"]))
    places = draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=3))
    noise = draw(st.binary(min_size=1, max_size=8))

    def damaged(content: bytes) -> bytes:
        result = bytearray(content)
        for place in places:
            at = int(place * len(result))
            if kind == "cut":
                del result[at:]
            elif kind == "flip":
                result[at] ^= 1 << noise[0] % 8
            elif kind == "overwrite":
                result[at : at + len(noise)] = noise
            else:
                result[at:at] = noise
            if not result:
                break
        return bytes(result)

    return damaged


# Checkpoints


@many
@given(damage())
def test_a_damaged_checkpoint_is_refused_or_holds_what_was_written(prepared, damaged):
    """No checksum covers all of the archive's own directory, of which torch reads a part."""
    path = prepared / "run" / "last.pth"
    whole = path.read_bytes()
    content = damaged(whole)
    copy = prepared / "fuzzed.pth"
    copy.write_bytes(content)
    try:
        found = checkpoint.load(copy)
    except UserError:
        assert content != whole
    else:
        assert same(found, checkpoint.load(path))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just({}),
    st.lists(st.integers(), max_size=3),
)


@st.composite
def altered(draw, content: dict) -> dict:
    """``content`` with one value, anywhere in its dictionaries and lists, of any kind."""
    key = draw(st.sampled_from(list(content)))
    value = content[key]
    if isinstance(value, list | tuple) and value and draw(st.booleans()):
        within = draw(altered(dict(enumerate(value))))
        return {**content, key: list(within.values())}
    if isinstance(value, dict) and value and draw(st.booleans()):
        return {**content, key: draw(altered(value))}
    return {**content, key: draw(VALUES)}


@pytest.mark.parametrize("name", ["previous.pth", "last.pth"])
@some
@given(data=st.data())
def test_a_sealed_checkpoint_with_a_value_of_another_kind_is_refused_or_serves(prepared, tmp_path, capfd, name, data):
    """Whoever writes checkpoints by other means: the checksum is right and the content is not."""
    whole = checkpoint.load(prepared / "run" / name)
    content = data.draw(altered({**whole, "config": {**whole["config"], "num_epoch": 2}}))
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    (run / "last.pth").write_bytes(checkpoint.encode(content))
    outcome(run_here("--resume", run, "--data_path", prepared / "data", "--num_workers", "0"), capfd)


def outcome(status: int, capfd) -> None:
    """Success, or exit status 2 and one line."""
    err = capfd.readouterr().err
    assert (status, err.count("\n")) in ((0, 0), (2, 1)), err
    assert "Traceback" not in err


# Data


def files(prepared: Path, folder: str, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(prepared)) for path in (prepared / folder).rglob(pattern))


DATA = {
    "cifar": ("data", "*_batch*", CIFAR, IMAGES),
    "mnist": ("mnist", "*ubyte", CIFAR, [*IMAGES, "--dataset", "MNIST", "--data_path", "mnist"]),
    "frames": ("frames", "*.pt", DVS, [*FRAMES, "--data_path", "frames"]),
    "prepared": ("p_good", "*.*", DVS, [*FRAMES, "--data_path", "p_good"]),
}


@pytest.mark.parametrize("kind", DATA)
@few
@given(data=st.data(), damaged=damage())
def test_damaged_data_are_trained_on_or_refused(prepared, tmp_path, monkeypatch, capfd, kind, data, damaged):
    folder, pattern, script, flags = DATA[kind]
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / folder, ignore_errors=True)
    shutil.copytree(prepared / folder, tmp_path / folder)
    path = tmp_path / data.draw(st.sampled_from(files(prepared, folder, pattern)))
    path.write_bytes(damaged(path.read_bytes()))
    before = snapshot(tmp_path / folder)
    log = tmp_path / "log"
    shutil.rmtree(log, ignore_errors=True)
    status = run_here(*flags, *GIVEN, "--T", "2", script=script)
    outcome(status, capfd)
    assert len(runs(log)) == (status == 0)
    assert snapshot(tmp_path / folder) == before


# Flags

NAMES = [f.name for f in fields(image_options()) if f.name not in ("num_workers", "device", "log_path", "data_path")]
WORDS = st.one_of(
    st.integers(-3, 20).map(str),
    st.floats(-2, 2).map(str),
    st.sampled_from(["", "nan", "inf", "none", "-1", "1e9", "s", "m", "DIGITS", "CIFAR10", "vgg11", "Adam", "run"]),
    st.text(max_size=6),
)  # fmt: skip


@st.composite
def typed(draw) -> list[str]:
    name = draw(st.sampled_from(NAMES))
    form = draw(st.sampled_from(["value", "value", "equals", "on", "off"]))
    value = draw(WORDS)
    return {
        "value": [f"--{name}", value],
        "equals": [f"--{name}={value}"],
        "on": [f"--{name}"],
        "off": [f"--no-{name}"],
    }[form]


@many
@given(st.lists(typed(), min_size=1, max_size=3))
def test_any_flags_train_or_are_refused(prepared, tmp_path, monkeypatch, capfd, words):
    monkeypatch.chdir(prepared)
    argv = [word for flag in words for word in flag]
    if any("\0" in word for word in argv):
        return  # no command line can hold it
    log = tmp_path / "log"
    shutil.rmtree(log, ignore_errors=True)
    before = stamps(prepared)
    status = run_here(*IMAGES, *GIVEN, *argv, "--num_epoch", "1", "--log_path", log)
    outcome(status, capfd)
    assert len(runs(log)) <= (status == 0)
    assert stamps(prepared) == before


# Structures: sealed as a checkpoint is, and nothing that a run would write


def deep(levels: int) -> list:
    nested: list = []
    for _ in range(levels):
        nested = [nested]
    return nested


def endless() -> dict:
    own: dict = {}
    own["own"] = own
    return own


ODD = [float("inf"), float("nan"), 10**5000, -1, True, None, "text", "9" * 5000, (), torch.zeros(0), torch.ones(3),
       deep(500), deep(90), endless(), {"": {}}, {1: 2}, {(1, 2): [3]}]  # fmt: skip


def paths(content: object, depth: int = 3) -> list[tuple]:
    """The places in nested dictionaries and lists, down to ``depth``."""
    if not depth or not isinstance(content, dict | list):
        return []
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    return [place for key, value in inner for place in [(key,), *((key, *p) for p in paths(value, depth - 1))]]


def put(content: dict, place: tuple, value: object) -> dict:
    copied = content.copy()
    copied[place[0]] = value if len(place) == 1 else put(content[place[0]], place[1:], value)
    return copied


@few
@given(data=st.data(), odd=st.sampled_from(range(len(ODD))), flag=st.sampled_from(["--resume", "--evaluate"]))
def test_a_checkpoint_of_another_structure_is_one_line(prepared, monkeypatch, capfd, data, odd, flag):
    content = load(prepared / "run" / "last.pth")
    place = data.draw(st.sampled_from(paths(content)))
    directory = prepared / "structures"
    directory.mkdir(exist_ok=True)
    try:
        written = checkpoint.encode(put(content, place, ODD[odd]))
    except RecursionError:
        return
    (directory / "odd.pth").write_bytes(written)
    monkeypatch.chdir(prepared)
    status = run_here(flag, directory / "odd.pth")
    err = capfd.readouterr().err
    shutil.rmtree(directory)
    assert (status, err.count("\n"), "Traceback" in err) in ((2, 1, False), (0, 0, False)), (place, odd, err)


@pytest.mark.cover(1)
@pytest.mark.parametrize("place", [("meter", "count"), ("config", "T"), ("format",), ("model",), ("config", "dataset")])
@pytest.mark.parametrize("odd", range(len(ODD)))
def test_counts_without_end_and_structures_without_bottom_are_one_line(prepared, monkeypatch, capfd, place, odd):
    """The places that a number, a name or a dictionary is read from."""
    content = put(load(prepared / "run" / "last.pth"), place, ODD[odd])
    directory = prepared / "structures"
    directory.mkdir(exist_ok=True)
    try:
        (directory / "odd.pth").write_bytes(checkpoint.encode(content))
    except RecursionError:
        pytest.skip("torch cannot write it either")
    monkeypatch.chdir(prepared)
    status = run_here("--resume", directory / "odd.pth")
    err = capfd.readouterr().err
    shutil.rmtree(directory)
    assert (status, err.count("\n"), "Traceback" in err) in ((2, 1, False), (0, 0, False)), err
