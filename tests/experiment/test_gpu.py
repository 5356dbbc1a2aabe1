"""experiment/benchmark/gpu.py: all stages in small on a CPU; an early end loses nothing; CIFAR-10 from an archive."""

import io
import json
import os
import pickle
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiment.benchmark import gpu, gpu_learns
from experiment.benchmark.gpu_report import Bench
from tests.experiment.script_helpers import run_here

SCRIPT = Path(gpu.__file__)


def bench(out: Path, seconds: float = 1e6) -> Bench:
    return Bench(Namespace(out=str(out), dry_run=True), torch.device("cpu"), time.monotonic() + seconds)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.4", reason="this PyTorch has no fused SGD for the CPU")
def test_the_dry_run_goes_through_all_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", os.environ.get("TORCHDYNAMO_DISABLE", "0"))  # put back afterwards
    assert run_here("--dry_run", "--out", tmp_path, "--seconds", "3000", script=SCRIPT) == 0
    parts = [json.loads(file.read_text()) for file in (tmp_path / "parts").glob("*.json")]
    assert {part["stage"] for part in parts} == set(gpu.STAGES)
    assert [part for part in parts if not part["done"] or not part["rows"]] == []
    assert [row for part in parts for row in part["rows"] if row.get("right") is False] == []
    assert "no figure here is a GPU's" in (tmp_path / "report.md").read_text()
    assert {file.name for file in tmp_path.iterdir()} >= {*(f"{stage}.csv" for stage in gpu.STAGES), "fast.png"}


def test_without_a_gpu_one_line_says_what_can_be_done(tmp_path, capsys):
    assert run_here("--out", tmp_path, "--device", "cpu", script=SCRIPT) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--dry_run" in line


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The parts of a stage as they are run, of which 'second' fails at first."""
    made: list[str] = []

    def part(name):
        def find(bench):
            made.append(name)
            if made.count("second") == 1 and name == "second":
                raise RuntimeError("it broke\nand more")
            return [{"found": name}]

        return find

    monkeypatch.setitem(gpu.STAGES, "right", lambda bench: {name: part(name) for name in ("first", "second", "third")})
    return made


def test_a_later_call_goes_on_with_what_failed_or_is_missing(tmp_path, calls):
    assert gpu.run(bench(tmp_path, seconds=0), ["right"]) == ["right: first", "right: second", "right: third"]
    assert gpu.run(bench(tmp_path), ["right"]) == []
    assert "**failed**: RuntimeError: it broke" in (tmp_path / "report.md").read_text()
    assert gpu.run(bench(tmp_path), ["right"]) == []
    assert calls == ["first", "second", "third", "second"]
    assert "failed" not in (tmp_path / "report.md").read_text()


def test_parts_are_chosen_by_name_or_by_what_names_hold(tmp_path, calls):
    find = gpu.STAGES["right"](None)["first"]
    gpu.STAGES["right"] = lambda bench: dict.fromkeys(
        ("compiled", "compiled, at once", "other"), find
    )  # put back by calls
    for wanted, done in ((("compiled",), 1), (("at once", "oth"), 3)):
        gpu.run(bench(tmp_path), ["right"], wanted)
        assert len(calls) == done


def test_what_was_found_is_on_disk_before_the_next_part_begins(tmp_path, calls, monkeypatch):
    def ends(bench):
        raise KeyboardInterrupt

    first = gpu.STAGES["right"](None)["first"]
    monkeypatch.setitem(gpu.STAGES, "right", lambda bench: {"first": first, "second": ends})
    with pytest.raises(KeyboardInterrupt):
        gpu.run(bench(tmp_path), ["right"])
    assert "| first |" in (tmp_path / "report.md").read_text()


def test_cifar_10_is_unpacked_from_its_archive(tmp_path):
    with tarfile.open(tmp_path / "images.tar.xz", "w:xz") as archive:
        for split in ("train", "test"):
            for name in ("bird", "truck"):
                pixels, content = io.BytesIO(), np.full((32, 32, 3), gpu_learns.CLASSES.index(name) * 20, np.uint8)
                Image.fromarray(content).save(pixels, "jpeg")
                member = tarfile.TarInfo(f"{split}/{name}/0001.jpg")
                member.size = pixels.tell()
                pixels.seek(0)
                archive.addfile(member, pixels)
    gpu_learns.unpack(tmp_path / "images.tar.xz", tmp_path / "out")
    entry = pickle.loads((tmp_path / "out" / "test_batch").read_bytes())
    assert {label: row[0] for label, row in zip(entry["labels"], entry["data"].tolist(), strict=True)} == {
        2: 40,
        9: 180,
    }
    assert len(list((tmp_path / "out").iterdir())) == 7
