"""Bad command lines: exit status 2, one line on stderr that says what is wrong, nothing left or changed on the disk."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from tests.experiment.bad_inputs import GIVEN, IMAGES, LONG, Case, cases
from tests.experiment.script_helpers import SCRIPTS, options_of, run_here, stamps, start
from tests.processes import finish

pytestmark = pytest.mark.usefixtures("surroundings")


def test_the_table_names_no_case_twice():
    rows = cases()
    assert len({(case.script, case.line) for case in rows}) == len(rows)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_the_table_has_a_bad_value_of_every_flag(script):
    lines = " ".join(case.line for case in cases() if case.script == script)
    assert {f.name for f in fields(options_of(script))} <= set(re.findall(r"--(?:no-)?(\w+)", lines))


def test_the_rows_of_the_page_are_of_the_table():
    page = (Path(__file__).resolve().parents[2] / "doc" / "reference" / "errors.md").read_text()
    told = {(case.script.parent.name, case.line): case.words for case in cases()}
    rows = re.findall(r"^\| (\w+) \| `(.+?)` \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) == 20
    for script, line, answer in rows:
        assert all(word in answer for word in told[script, line]), line


def check(root: Path, before: dict, status: int, err: str, words: list[str]) -> None:
    assert status == 2, err
    assert err.startswith("main.py: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert [word for word in words if word not in err] == [], err
    assert stamps(root) == before
    assert not (root / "owned").exists()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{case.script.parent.name} {case.line.replace(LONG, 'LONG')}") for case in cases()]
)
def test_bad_input_is_one_line_on_stderr_and_status_2(prepared, monkeypatch, capfd, recwarn, case: Case):
    monkeypatch.chdir(prepared)
    before = stamps(prepared)
    status = run_here(*case.argv, script=case.script)
    check(prepared, before, status, capfd.readouterr().err, case.words)
    # pytest keeps warnings off stderr, which a user would see there
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_so(prepared, monkeypatch, capfd):
    monkeypatch.chdir(prepared)
    before = stamps(prepared)
    status = run_here(*GIVEN, *IMAGES, "--device", "cuda")
    check(prepared, before, status, capfd.readouterr().err, ["--device cuda", "no such device", "--device cpu"])


def test_the_same_in_a_process_of_its_own(prepared):
    """Nothing that Python or torch prints by itself, at the beginning or the end, stands beside the one line."""
    before = stamps(prepared)
    line = "--dataset CIFAR10 --data_path absent --num_workers 0"
    status, _, err = finish(start(*line.split(), cwd=prepared))
    check(prepared, before, status, err, ["absent/cifar-10-batches-py", "download failed"])


@pytest.mark.parametrize("text", ["two\nlines", "tab\tand\rreturn"])
@pytest.mark.parametrize("flag", ["--arch", "--data_path", "--resume", "--evaluate", "--device"])
def test_line_breaks_in_a_value_make_no_second_line(prepared, monkeypatch, capfd, flag, text):
    monkeypatch.chdir(prepared)
    before = stamps(prepared)
    status = run_here("--dataset", "CIFAR10", flag, text)
    check(prepared, before, status, capfd.readouterr().err, ["two" if "two" in text else "tab"])


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_another_launcher_s_processes_would_train_each_by_itself(prepared, monkeypatch, capfd, name):
    monkeypatch.chdir(prepared)
    monkeypatch.setenv(name, "2")
    before = stamps(prepared)
    status = run_here(*GIVEN, *IMAGES)
    check(prepared, before, status, capfd.readouterr().err, [f"{name}=2", "torchrun --nproc_per_node"])


# What may be changed is not refused


@pytest.mark.parametrize(
    "flags",
    ["", "--arch VGG11 --dataset cifar10 --decay 0.2", "--T 3 --step_mode s", "--val_batch_size 1", "--rate_flag"],
)
def test_evaluation_takes_what_does_not_contradict(prepared, monkeypatch, capfd, flags):
    monkeypatch.chdir(prepared)
    before = stamps(prepared)
    assert run_here("--evaluate", "run/last.pth", *flags.split()) == 0
    out, err = capfd.readouterr()
    assert "accuracy" in out
    assert err == ""
    assert stamps(prepared) == before
