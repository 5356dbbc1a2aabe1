"""A run stopped by a signal, a bad number, a full disk or another process: what it says, keeps, and how it goes on."""

import errno
import logging
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import util.train.engine
import util.train.lock
import util.train.method
import util.train.run_log
from tests import processes
from tests.cifar_format import write_cifar10
from tests.event_files import random_layout_a
from tests.experiment.script_helpers import (
    CIFAR,
    DVS,
    PAIRS,
    check_continued,
    history,
    load,
    metrics,
    only_run,
    pair_flags,
    run_here,
    snapshot,
    tiny_networks,
)
from tests.processes import ROOT, finish, start_python
from util.dataset import cifar_mnist
from util.dataset.event_data import load_event_dataset
from util.errors import RunError, UserError
from util.train import checkpoint
from util.train.lock import holds, locked
from util.train.run_log import Logged, RunLog

pairs = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
SIGNALS = [signal.SIGTERM, signal.SIGINT]
REPEATED = [signal.SIGHUP, signal.SIGUSR1]
STEPS = 3  # of an epoch: 25 images in batches of 10


@pytest.fixture(scope="module", autouse=True)
def _small_networks():
    with tiny_networks("vgg11"):
        yield


@pytest.fixture(autouse=True)
def _signals_as_in_a_terminal(monkeypatch):
    """A shell's background job, as a test run may be, has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root, images_per_batch=5)
    return root


def command(data: Path, pair: tuple[str, str] = ("rate", "m"), *more: str | Path) -> list[str | Path]:
    flags = ["--dataset", "CIFAR10", "--data_path", data, "--arch", "vgg11", "--image_size", "8", "--num_workers", "0"]
    sizes = ["--train_batch_size", "10", "--val_batch_size", "2", "--num_epoch", "3", "--T", "2"]
    return [*flags, *sizes, *pair_flags(*pair), *more]


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Run directories of three epochs, for each pair."""
    directories = {}
    for pair in PAIRS:
        log_path = tmp_path_factory.mktemp("uninterrupted")
        assert run_here(*command(data, pair), "--log_path", log_path) == 0
        directories[pair] = only_run(log_path)
    return directories


def at_step(patch: pytest.MonkeyPatch, epoch: int, step: int, act: Callable[[], object]) -> None:
    """Calls ``act`` in ``epoch`` before the step that follows ``step`` others; after the last, before the test."""
    seed_step = util.train.engine.seed_step

    def reached(*key: int) -> None:
        seed_step(*key)
        if key[1:] == (epoch, step):
            act()

    patch.setattr(util.train.engine, "seed_step", reached)


def signal_at(epoch: int, step: int, number: int, *argv: str | Path) -> int:
    """The exit status of the script, which gets the signal while it works on that step."""
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, epoch, step, lambda: os.kill(os.getpid(), number))
        return run_here(*argv)


# Signals


@pytest.mark.cover(1)
@pairs
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_the_command_it_names_continues_exactly(
    data, tmp_path, uninterrupted, capfd, pair, number
):
    """In the middle of epoch 2, in the test after it, at the first step of epoch 3: one stop after the other."""
    argv = [*command(data, pair), "--log_path", tmp_path]
    for epoch, step, done in ((1, 0, 1), (2, 1, 2), (2, STEPS, STEPS), (3, 0, 1)):
        assert signal_at(epoch, step, number, *argv) == 128 + number
        directory = only_run(tmp_path)
        last = load(directory / "last.pth")
        assert (len(history(last)), last["step"]) == (epoch - 1, done)
        out, err = capfd.readouterr()
        assert err == ""
        said, named = out.splitlines()[-2:]
        assert said == f"{signal.Signals(number).name} after step {done} of epoch {epoch}, which is saved"
        assert re.fullmatch(rf"continue with: python \S+main\.py --resume {directory}", named)
        argv = named.split()[-2:]
    assert run_here(*argv) == 0
    check_continued(directory, uninterrupted[pair], 3)


def test_steps_drawn_by_a_method_and_terms_of_the_loss_continue_exactly(data, tmp_path):
    argv = ["--method", "sltt", "--step_mode", "s", "--sltt_steps", "1", "--loss", "tet", "--rate_penalty", "0.1"]
    assert run_here(*command(data), *argv, "--log_path", tmp_path / "whole") == 0
    assert signal_at(2, 1, signal.SIGTERM, *command(data), *argv, "--log_path", tmp_path / "cut") == 143
    assert run_here("--resume", only_run(tmp_path / "cut")) == 0
    check_continued(only_run(tmp_path / "cut"), only_run(tmp_path / "whole"), 3)


TWICE = """
import os, signal
from util.train.signals import StopSignals
signal.signal(signal.SIGINT, signal.default_int_handler)
with StopSignals():
    for moment in "first", "second":
        print(moment, flush=True)
        os.kill(os.getpid(), {number})
print("alive")
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(number):
    """Whatever it waits for: a batch that never comes, a disk that never answers."""
    code = TWICE.format(number=int(number))
    assert finish(start_python("-c", code)) == (-number, "first\nsecond\n", "")


@pytest.mark.parametrize("number", REPEATED)
def test_a_closed_terminal_and_slurms_warning_end_a_run_like_a_sigterm(data, tmp_path, capfd, number):
    assert signal_at(1, 1, number, *command(data), "--log_path", tmp_path) == 128 + number
    assert load(only_run(tmp_path) / "last.pth")["step"] == 2
    out, err = capfd.readouterr()
    assert f"{number.name} after step 2 of epoch 1, which is saved\ncontinue with: " in out
    assert err == ""


@pytest.mark.parametrize("number", REPEATED)
def test_signals_that_come_in_twos_by_themselves_do_not_end_the_process_before_it_has_saved(number):
    """Of a closed terminal both the shell and the kernel tell."""
    code = TWICE.format(number=int(number))
    assert finish(start_python("-c", code)) == (0, "first\nsecond\nalive\n", "")


def test_the_command_that_continues_names_the_device_again(data, tmp_path, capfd):
    """The checkpoint says nothing of the machine."""
    argv = [*command(data), "--device", "cpu", "--log_path", tmp_path]
    assert signal_at(1, 1, signal.SIGTERM, *argv) == 143
    assert capfd.readouterr().out.endswith(f"main.py --resume {only_run(tmp_path)} --device cpu\n")


SCRIPTS = sorted(
    (*(ROOT / "experiment").glob("*/main.py"), ROOT / "experiment/dvs/prepare.py", ROOT / "experiment/predict.py")
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_interrupt_while_python_imports_says_nothing(tmp_path, script):
    """A torch whose import takes until Ctrl-C."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    assert finish(start_python(script, env=env)) == (-signal.SIGINT, "", "")


SRUN = """#!/bin/bash
# Slurm's, as far as experiment/slurm.sh knows it: the warning comes while the first run trains.
"$@" > said & # in the background
process=$!
[ -e requeued ] || until grep -q "^epoch 1/" said; do sleep 0.1; done
[ -e requeued ] || kill -USR1 $process
wait $process
"""


MAIN = """# A training, as far as the job script knows it.
import signal, sys
with open("typed", "w") as file:
    file.write("\\n".join(sys.argv[1:]))
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(128 + number))
if "--resume" not in sys.argv:
    print("epoch 1/", flush=True)
    signal.pause()
"""


def test_the_job_script_for_slurm_requeues_itself_and_continues(data, tmp_path, monkeypatch):
    """With stand-ins for srun, scontrol and the training, which is then done here with what the job script types."""
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho $@ > requeued\n"), ("main.py", MAIN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7"}
    job = ["bash", *map(str, (ROOT / "experiment" / "slurm.sh", "main.py", *command(data)))]
    monkeypatch.chdir(tmp_path)
    assert subprocess.run(job, env=env).returncode == 128 + signal.SIGUSR1
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert signal_at(2, 1, signal.SIGUSR1, *(tmp_path / "typed").read_text().splitlines()) == 128 + signal.SIGUSR1
    assert subprocess.run(job, env=env).returncode == 0
    assert run_here(*(tmp_path / "typed").read_text().splitlines()) == 0
    assert len(metrics(only_run(tmp_path / "log" / "slurm-7"))) == 3


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(data, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert signal_at(1, 1, signal.SIGINT, *command(data), "--log_path", tmp_path) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(metrics(only_run(tmp_path))) == 3


def test_after_training_the_signals_do_what_they_did(data, tmp_path):
    before = [signal.getsignal(number) for number in (*SIGNALS, *REPEATED)]
    assert run_here(*command(data), "--log_path", tmp_path) == 0
    assert [signal.getsignal(number) for number in (*SIGNALS, *REPEATED)] == before


def test_an_interrupt_while_data_are_read_leaves_nothing(data, tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar_mnist, "read_bytes", interrupted)
    assert run_here(*command(data), "--log_path", tmp_path) == 130
    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


# Checkpoints within an epoch


class Killed(BaseException):
    """Ends the script where it is raised, as SIGKILL would: nothing is written afterwards."""


def kill_at(epoch: int, step: int, *argv: str | Path, script: Path = CIFAR) -> None:
    def die() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, epoch, step, die)
        with pytest.raises(Killed):
            run_here(*argv, script=script)


@pytest.mark.cover(1)
@pairs
@pytest.mark.parametrize("every", [1, 2])
def test_a_run_killed_within_an_epoch_loses_the_steps_since_its_last_checkpoint_and_ends_the_same(
    data, tmp_path, uninterrupted, pair, every
):
    argv = [*command(data, pair), "--save_every", str(every), "--log_path", tmp_path]
    for epoch, step in ((1, 2), (2, 1), (2, STEPS), (3, 2)):
        kill_at(epoch, step, *argv)
        directory = only_run(tmp_path)
        last = load(directory / "last.pth")
        assert (len(history(last)), last["step"]) == (epoch - 1, step // every * every)
        argv = ["--resume", directory]
    assert run_here(*argv) == 0
    check_continued(directory, uninterrupted[pair], 3)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_number_of_workers_and_of_steps_between_checkpoints_changes_no_bit(data, tmp_path, uninterrupted, workers):
    kill_at(2, 2, *command(data), "--save_every", "1", "--log_path", tmp_path)
    directory = only_run(tmp_path)
    assert run_here("--resume", directory, "--save_every", "3", "--num_workers", workers) == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


@pytest.mark.parametrize(("pair", "workers"), [*((pair, "0") for pair in PAIRS), (("rate", "m"), "2")])
def test_event_recordings_continue_exactly(tmp_path, pair, workers):
    """Flipped and rolled at random; an epoch of five batches, killed after three."""
    random_layout_a(tmp_path / "frames", time_steps=2, size=8, train=10, test=4)
    flags = ["--dataset", "CIFAR10_DVS_Aug", "--data_path", tmp_path / "frames", "--arch", "vgg11", "--T", "2"]
    flags += ["--train_batch_size", "2", "--num_epoch", "3", "--num_workers", workers, *pair_flags(*pair)]
    assert run_here(*flags, "--log_path", tmp_path / "whole", script=DVS) == 0
    kill_at(2, 3, *flags, "--save_every", "2", "--log_path", tmp_path / "killed", script=DVS)
    directory = only_run(tmp_path / "killed")
    assert load(directory / "last.pth")["step"] == 2
    assert run_here("--resume", directory, script=DVS) == 0
    check_continued(directory, only_run(tmp_path / "whole"), 3)


RECIPE = ["--neuron", "plif", "--lr_warmup_epochs", "1", "--label_smoothing", "0.1", "--mixup_alpha", "0.2",
          "--cutmix_alpha", "1", "--clip_grad_norm", "0.5", "--model_ema", "--model_ema_decay", "0.9"]  # fmt: skip


@pytest.mark.parametrize("pair", [("rate", "m"), ("bptt", "s")], ids="-".join)
def test_a_recipe_of_today_continues_exactly(data, tmp_path, uninterrupted, pair):
    """Killed twice; the weights that it started from are gone by then, and two processes go on with the loading."""
    weights = tmp_path / "weights.pth"
    plif = [*command(data, pair), "--neuron", "plif", "--num_epoch", "1", "--log_path", tmp_path / "first"]
    assert run_here(*plif) == 0
    weights.write_bytes((only_run(tmp_path / "first") / "model_weights.pth").read_bytes())
    flags = [*command(data, pair), *RECIPE, "--weights", weights]
    assert run_here(*flags, "--log_path", tmp_path / "whole") == 0
    kill_at(1, 2, *flags, "--save_every", "1", "--log_path", tmp_path / "killed")
    weights.unlink()
    directory = only_run(tmp_path / "killed")
    kill_at(3, 1, "--resume", directory, "--num_workers", "2")
    assert run_here("--resume", directory) == 0
    check_continued(directory, only_run(tmp_path / "whole"), 3)


def test_mixed_event_recordings_continue_exactly(tmp_path):
    random_layout_a(tmp_path / "frames", time_steps=2, size=8, train=10, test=4)
    flags = ["--dataset", "CIFAR10_DVS_Aug", "--data_path", tmp_path / "frames", "--arch", "vgg11", "--T", "2"]
    flags += ["--train_batch_size", "2", "--num_epoch", "2", "--num_workers", "0", *RECIPE]
    assert run_here(*flags, "--log_path", tmp_path / "whole", script=DVS) == 0
    kill_at(2, 3, *flags, "--save_every", "2", "--log_path", tmp_path / "killed", script=DVS)
    directory = only_run(tmp_path / "killed")
    assert run_here("--resume", directory, script=DVS) == 0
    check_continued(directory, only_run(tmp_path / "whole"), 2)


def test_a_network_that_draws_random_numbers_continues_exactly(data, tmp_path, monkeypatch):
    forward = util.train.method.Method.outputs

    def with_dropout(method, net, x):
        return torch.nn.functional.dropout(forward(method, net, x), 0.5, net.training)

    monkeypatch.setattr(util.train.method.Method, "outputs", with_dropout)
    assert run_here(*command(data), "--log_path", tmp_path / "whole") == 0
    kill_at(2, 2, *command(data), "--save_every", "1", "--log_path", tmp_path / "killed")
    directory = only_run(tmp_path / "killed")
    assert run_here("--resume", directory) == 0
    check_continued(directory, only_run(tmp_path / "whole"), 3)


def test_a_run_can_be_continued_from_the_moment_its_directory_is_there(data, tmp_path, uninterrupted, monkeypatch):
    kill_at(1, 0, *command(data), "--log_path", tmp_path)
    directory = only_run(tmp_path)
    assert (history(load(directory / "last.pth")), (directory / "config.json").is_file()) == ([], True)
    assert run_here("--resume", directory) == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


def test_a_run_at_a_constant_learning_rate_is_lengthened_exactly(data, tmp_path):
    flags = [*command(data), "--scheduler", "constant", "--lr_warmup_epochs", "1"]
    assert run_here(*flags, "--log_path", tmp_path / "whole") == 0
    assert run_here(*flags, "--num_epoch", "2", "--run", "short", "--log_path", tmp_path) == 0
    assert run_here(*flags, "--num_epoch", "3", "--run", "short", "--log_path", tmp_path) == 0
    check_continued(tmp_path / "short", only_run(tmp_path / "whole"), 3)


def test_a_run_stops_early_and_a_larger_number_goes_on(data, tmp_path, monkeypatch, capfd):
    """Equal is not better."""
    evaluate = util.train.engine.evaluate

    def worse(*args, **kwargs):
        meter = evaluate(*args, **kwargs)
        accuracy = next(accuracies)
        monkeypatch.setattr(type(meter), "top1", accuracy)
        return meter

    accuracies = iter([50.0, 10.0, 50.0, 20.0])
    monkeypatch.setattr(util.train.engine, "evaluate", worse)
    flags = [*command(data), "--num_epoch", "4", "--early_stop", "2", "--run", "a", "--log_path", tmp_path]
    assert run_here(*flags) == 0
    assert len(metrics(tmp_path / "a")) == 3
    assert run_here(*flags) == 0
    assert "all 3 epochs that --early_stop 2 gives are done" in capfd.readouterr().out
    assert run_here("--resume", tmp_path / "a", "--early_stop", "3") == 0
    assert len(metrics(tmp_path / "a")) == 4


# The checkpoint before the last


def killed_run(data: Path, log_path: Path) -> Path:
    kill_at(2, 2, *command(data), "--save_every", "1", "--log_path", log_path)
    return only_run(log_path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def make_directory(path: Path) -> None:
    """One bit of the archive's own directory, by which torch reads nothing of a member."""
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x01\x02") + 38] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a weight made a directory": make_directory,
    "its end lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_named_and_continues(
    data, tmp_path, uninterrupted, capfd, damage
):
    directory = killed_run(data, tmp_path)
    assert load(directory / "previous.pth")["step"] == 1
    DAMAGE[damage](directory / "last.pth")
    before = snapshot(tmp_path)
    assert run_here("--resume", directory) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(f"{directory}/previous.pth is intact: use --resume {directory}/previous.pth\n")
    assert snapshot(tmp_path) == before
    assert run_here("--resume", directory / "previous.pth") == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


def test_a_damaged_checkpoint_never_replaces_the_intact_one(data, tmp_path, uninterrupted, monkeypatch):
    """Continued from previous.pth, one of the two can be read before and after every renaming."""
    directory = killed_run(data, tmp_path)
    flip(directory / "last.pth")
    replace, renamed = os.replace, []

    def watched(source, target) -> None:
        for function in (lambda: None, lambda: replace(source, target)):
            function()
            assert any(readable(directory / name) for name in ("last.pth", "previous.pth"))
        renamed.append(Path(target).name)

    monkeypatch.setattr(os, "replace", watched)
    assert run_here("--resume", directory / "previous.pth") == 0
    assert renamed[0] == "last.pth"
    check_continued(directory, uninterrupted["rate", "m"], 3)


def readable(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except UserError:
        return False
    return True


def test_an_older_checkpoint_takes_the_run_back(data, tmp_path, uninterrupted, monkeypatch):
    """The logs are cut to what it knows, and everything after it is made again."""
    monkeypatch.setattr(checkpoint, "forget_previous", lambda directory: None)
    assert run_here(*command(data), "--log_path", tmp_path) == 0
    directory = only_run(tmp_path)
    assert len(history(load(directory / "previous.pth"))) == 2
    assert run_here("--resume", directory / "previous.pth") == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


def test_damaged_best_weights_name_the_last_checkpoint(data, tmp_path, capfd):
    assert run_here(*command(data), "--log_path", tmp_path) == 0
    directory = only_run(tmp_path)
    flip(directory / "model_weights.pth")
    assert run_here("--evaluate", directory) == 2
    assert capfd.readouterr().err.endswith(f"use --evaluate {directory}/last.pth\n")


def test_where_files_cannot_be_linked_the_checkpoint_before_is_copied(data, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(checkpoint, "forget_previous", lambda directory: None)
    assert run_here(*command(data), "--log_path", tmp_path) == 0
    directory = only_run(tmp_path)
    assert [len(history(load(directory / name))) for name in ("previous.pth", "last.pth")] == [2, 3]
    assert not list(directory.glob("*.tmp"))


# A full disk


@contextmanager
def disk_for(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes. tests/experiment/full_disk.py fills a real disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_and_leaves_the_earlier_checkpoints(data, tmp_path, uninterrupted, capfd):
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        at_step(patch, 2, 2, lambda: stack.enter_context(disk_for(20_000)))
        assert run_here(*command(data), "--save_every", "1", "--log_path", tmp_path) == 2
    directory = only_run(tmp_path)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    hint = f"make room, then continue with --resume {directory}"
    assert f"cannot write {directory}/last.pth: File too large; {hint}" in err
    assert [checkpoint.load(directory / name)["step"] for name in ("previous.pth", "last.pth")] == [1, 2]
    assert not list(directory.glob("*.tmp"))
    assert run_here("--resume", directory) == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


@pytest.mark.parametrize(
    ("file", "metrics_size", "scalars"), [("metrics.jsonl", 9000, 1), ("events", 1, 500), ("train.log", 1, 1)]
)
def test_a_full_disk_is_the_runs_end_whichever_file_meets_it(tmp_path, capfd, file, metrics_size, scalars):
    """Nothing but the error is said: no traceback of a logger or of a writing thread."""
    epoch = Logged({"epoch": 1, "text": "x" * metrics_size}, {f"train/tag{i}": 0.5 for i in range(scalars)}, 0.0)

    def write() -> None:
        with RunLog(tmp_path) as log:
            if file == "train.log":
                logging.getLogger("train").error("x" * 9000)
            log.epoch(epoch)

    with disk_for(5000), pytest.raises(RunError, match="File too large"):
        write()
    assert capfd.readouterr().err == ""


def test_a_disk_too_full_to_begin_leaves_no_run(data, tmp_path, capfd):
    with disk_for(20_000):
        assert run_here(*command(data), "--log_path", tmp_path) == 2
    assert "File too large" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Open files, names


def test_too_few_open_files_for_the_loading_processes_are_said_before_anything_is_made(data, tmp_path, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        assert run_here(*command(data), "--num_workers", "4", "--log_path", tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    err = capfd.readouterr().err
    assert (err.count("\n"), "too many open files" in err, "ulimit -n" in err) == (1, True, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_file_too_many_while_training_is_one_line_with_the_remedy(data, tmp_path, capfd):
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, 1, refuse)
        assert run_here(*command(data), "--log_path", tmp_path) == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), "Too many open files" in err, "ulimit -n" in err) == (1, True, True), err


def test_what_the_console_cannot_print_is_escaped():
    code = "import util.train.before_torch; print('l\\xe4ufe')"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert finish(start_python("-c", code, env=env)) == (0, "l\\xe4ufe\n", "")


def test_a_name_that_no_text_file_can_hold_is_escaped_in_the_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own could not hand it on to its first process
    with RunLog(tmp_path, config={"log_path": "l\xe4ufe/\udcc3"}):
        logging.getLogger("train").error("l\xe4ufe/\udcc3")
    (events,) = (tmp_path / "train").iterdir()
    assert b"l\xc3\xa4ufe/\\udcc3" in events.read_bytes()
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith("l\xe4ufe/\\udcc3\n")


# Two processes


def test_a_run_that_another_process_continues_is_left_alone(data, tmp_path, uninterrupted, capfd):
    directory = killed_run(data, tmp_path)
    before = snapshot(tmp_path)
    with locked(directory):
        assert run_here("--resume", directory) == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), f"{directory} is being continued by another process" in err) == (1, True)
    assert snapshot(tmp_path) == before
    assert run_here("--resume", directory) == 0
    check_continued(directory, uninterrupted["rate", "m"], 3)


def test_a_new_run_holds_its_lock(data, tmp_path):
    def other() -> None:
        with pytest.raises(UserError, match="another process"), locked(only_run(tmp_path)):
            pass
        tried.append(True)

    tried: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, 0, other)
        assert run_here(*command(data), "--log_path", tmp_path) == 0
    assert tried


def test_a_new_run_is_locked_from_the_moment_it_appears(data, tmp_path, monkeypatch, capfd):
    """One that could be continued in that moment would be deleted by its maker, met by bad data."""
    moved = util.train.run_log._moved

    def continued_at_once(*args: Any, **kwargs: Any) -> Path:
        directory = moved(*args, **kwargs)
        statuses.append(run_here("--resume", directory))
        return directory

    statuses: list[int] = []
    monkeypatch.setattr(util.train.run_log, "_moved", continued_at_once)
    assert run_here(*command(data), "--log_path", tmp_path) == 0
    assert statuses == [2]
    assert f"{only_run(tmp_path)} is being continued by another process" in capfd.readouterr().err


def refuse_locks(monkeypatch, of: Callable[[int], bool] = lambda mode: True) -> None:
    """Files whose mode is ``of`` this kind cannot be locked."""
    flock = util.train.lock.fcntl.flock

    def refuse(handle: int, operation: int) -> None:
        if of(os.fstat(handle).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, operation)

    monkeypatch.setattr(util.train.lock.fcntl, "flock", refuse)


def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, caplog):
    refuse_locks(monkeypatch)
    with locked(tmp_path):
        assert f"{tmp_path} cannot be locked" in caplog.text
        assert not holds(tmp_path)


def test_where_directories_cannot_be_locked_a_file_is(tmp_path, monkeypatch, caplog):
    """As on NFS: flock wants a handle that can be written through, and a directory's is none."""
    refuse_locks(monkeypatch, stat.S_ISDIR)
    with locked(tmp_path):
        assert holds(tmp_path)
        with pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
        assert holds(tmp_path)
    with locked(tmp_path):
        pass
    assert caplog.text == ""


@pytest.mark.parametrize("locks", [True, False])
def test_bad_data_in_the_first_epoch_remove_the_run_only_if_nobody_else_can_be_continuing_it(
    data, tmp_path, monkeypatch, locks
):
    def spoil() -> None:
        raise UserError("a recording is damaged: replace it")

    if not locks:
        refuse_locks(monkeypatch)
    at_step(monkeypatch, 1, 1, spoil)
    assert run_here(*command(data), "--log_path", tmp_path) == 2
    assert len(list(tmp_path.iterdir())) == (0 if locks else 1)


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_a_process_that_loads_data_ends_with_its_parents_sigterm_and_with_no_others(start):
    context = multiprocessing.get_context(start)
    running = context.Event()
    process = context.Process(target=processes.load_slowly, args=(os.getpid(), running), daemon=True)
    process.start()
    try:
        assert running.wait(120)
        for name in ("TERM", "INT", "HUP", "USR1"):
            subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
        process.join(0.3)
        assert process.is_alive()
        process.terminate()
        process.join(10)
        assert process.exitcode == 0
    finally:
        process.kill()


def test_a_process_that_loads_data_and_outlives_its_parent_holds_no_lock(tmp_path):
    reading, writing = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if not child:
            os.write(writing, b"running")
            signal.pause()
    try:
        os.read(reading, 7)
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# Other data


def test_a_run_is_not_continued_with_other_data_of_the_same_kind(data, tmp_path, capfd):
    directory = killed_run(data, tmp_path / "log")
    shutil.copytree(data, tmp_path / "moved")
    shutil.copytree(data, tmp_path / "other")
    batch = tmp_path / "other" / "cifar-10-batches-py" / "data_batch_3"
    entry = pickle.loads(batch.read_bytes())
    entry["data"][0, 0] ^= 1
    batch.write_bytes(pickle.dumps(entry, protocol=2))
    before = snapshot(directory)
    assert run_here("--resume", directory, "--data_path", tmp_path / "other") == 2
    err = capfd.readouterr().err
    assert (err.count("\n"), f"other data than {tmp_path}/other holds now" in err) == (1, True), err
    assert snapshot(directory) == before
    assert run_here("--resume", directory, "--data_path", tmp_path / "moved") == 0


def test_recordings_of_other_files_have_another_fingerprint(tmp_path):
    random_layout_a(tmp_path / "frames", time_steps=2, size=8, train=40, test=4)
    shutil.copytree(tmp_path / "frames", tmp_path / "copy")
    shutil.copytree(tmp_path / "frames", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "train" / "1.pt", tmp_path / "other" / "train" / "0.pt")
    one, copy, other = (
        load_event_dataset("CIFAR10_DVS_Aug", tmp_path / name, 2, frames="counts")[0].fingerprint()
        for name in ("frames", "copy", "other")
    )
    assert one == copy != other


def test_what_a_killed_run_left_before_it_had_a_directory_is_swept(data, tmp_path):
    left = {tmp_path / ".DIGITS_x_20260101-000000-0123abcd": False, tmp_path / ".mine": True}
    for path in left:
        path.mkdir()
        os.utime(path, (0, 0))
    assert run_here(*command(data), "--num_epoch", "1", "--log_path", tmp_path) == 0
    assert {path: path.exists() for path in left} == left


# Bad numbers


def test_a_bad_number_ends_the_run_before_the_weights_know(data, tmp_path, monkeypatch, capfd):
    """One line with epoch, step and learning rate; what is saved is from before."""
    forward, now = util.train.method.Method.outputs, []
    at_step(monkeypatch, 2, 1, lambda: now.append(math.inf))
    monkeypatch.setattr(util.train.method.Method, "outputs", lambda *args: forward(*args) * (now.pop() if now else 1))
    assert run_here(*command(data), "--save_every", "1", "--log_path", tmp_path) == 2
    directory = only_run(tmp_path)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "the training loss is nan at step 2 of epoch 2 (lr 0.075): use a smaller --lr" in err
    assert err.endswith(f"the last good checkpoint is {directory}/last.pth\n")
    last = checkpoint.load(directory / "last.pth")
    assert (len(history(last)), last["step"]) == (1, 1)
    assert all(value.isfinite().all() for value in last["model"].values())


def test_layers_that_never_fire_are_warned_of_by_name(data, tmp_path, capfd):
    assert run_here(*command(data), "--thresh", "1000", "--log_path", tmp_path / "dead") == 0
    out = capfd.readouterr().out
    for epoch in (1, 2, 3):
        assert f"epoch {epoch}: no neuron of these layers fired: features.2, features.5\n" in out
    assert "no neuron" in (only_run(tmp_path / "dead") / "train.log").read_text()
    assert run_here(*command(data), "--log_path", tmp_path / "alive") == 0
    assert "layers fired:" not in capfd.readouterr().out


def test_bad_data_met_after_a_checkpoint_within_the_first_epoch_leaves_the_run(data, tmp_path, capfd):
    def spoil() -> None:
        raise UserError("a recording is damaged: replace it")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, 2, spoil)
        assert run_here(*command(data), "--save_every", "1", "--log_path", tmp_path) == 2
    directory = only_run(tmp_path)
    assert load(directory / "last.pth")["step"] >= 1
    assert f"continue with --resume {directory}" in capfd.readouterr().err


def test_a_killed_loading_process_is_one_line_and_leaves_the_run(data, tmp_path, capfd):
    def killed() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 1, 2, killed)
        assert run_here(*command(data), "--log_path", tmp_path) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"continue with --resume {only_run(tmp_path)}" in lines[0]
