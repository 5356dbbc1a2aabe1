"""From a command line to a trained network: what the training scripts of all data sets share besides the engine."""

import contextlib
import errno
import logging
import os
import secrets
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from model.layer import USUAL_ALPHA

from ..errors import RunError, UserError
from ..staging import only_reading
from . import checkpoint
from .batches import MORE_OPEN_FILES, end_workers, workers_of
from .distributed import AloneError, LostError, Processes, is_first, is_lost, joined
from .engine import Trainer
from .lock import holds, locked
from .loss import LOSSES
from .loss import options_of as options_of_loss
from .method import METHODS, make_method
from .method import options_of as options_of_method
from .optim import ENDLESS
from .options import (
    OF_THIS_START,
    Options,
    TrainOptions,
    as_typed,
    complain,
    names_where,
    parse,
    saved_options,
)
from .recipe import LEAST_ALPHA
from .report import as_json, check_new, lines, report, write
from .run_log import RunLog, log_to_console, new_run_directory, replace_text, write_config
from .setup import LoadedData, Setup, choose_device, make_trainer, set_up
from .signals import StoppedError, StopSignals, raise_on_interrupt
from .weights import load_weights

logger = logging.getLogger(__name__)

TEST = "test.json"  # in the directory of a run with --val_split that is done: what its best epoch came to

# What failures of the machine, not of the program, are called, and what to do about them.
_SMALLER = "with a smaller batch or fewer --num_workers"
_OUTSIDE = {
    **dict.fromkeys(("DataLoader worker", "can't allocate memory", "not enough memory", "open files"), _SMALLER),
    "CUDA out of memory": _SMALLER,
    "deterministic implementation": "without --deterministic",
}


def run(options_class: type[Options], load_data: Callable[[Options], LoadedData], description: str | None) -> int:
    """Does what the command line asks for; returns the exit status.

    That is 2 with one line on stderr for bad input, 128 + the signal's number after one (143 after SIGTERM).
    """
    log_to_console()
    with _one_line(), joined() as processes, processes.ending_together(), _one_line(alone=False):
        options, typed = parse(options_class, description)
        raise_on_interrupt()
        options = replace(options, log_path=os.path.abspath(options.log_path))
        options, typed = _named_run(options, typed, processes)
        with _checkpoint(options, processes) as (saved, path):
            if saved is not None:
                options = with_config(options, typed, saved["config"], path)
                if options.data_path and "data_path" not in typed:
                    say(f"data: {options.data_path}, as {path} says")
                    load_data = only_reading(load_data, path)
            options, device = _chosen(options, processes)
            check_flags(options, typed, device, processes)
            setup = set_up(options, load_data, device, saved, path, processes)
            options = setup.options
            with workers_of(*setup.loaders):
                if options.evaluate:
                    return test(setup, path, processes)
                trainer = make_trainer(setup, processes)
                if saved is not None and _is_done(trainer, options, saved, path):
                    return 0
                with StopSignals() as trainer.stop, _directory(trainer, options, saved, path) as directory:
                    with (
                        _run_log(trainer, options, directory) as log,
                        _told_how_to_continue(trainer, options, typed, directory),
                    ):
                        processes.from_first(lambda: (directory / TEST).unlink(missing_ok=True))
                        trainer.fit(options.num_epoch, log, config_of(options))
                        processes.from_first(lambda: checkpoint.forget_previous(directory))
                        logger.info(summary(trainer, directory))
                        test_once(setup, trainer, directory)
    return 0


@contextlib.contextmanager
def _one_line(alone: bool = True) -> Iterator[None]:
    """Ends the script with the line and the status of what is raised; ``alone``: also of one process by itself."""
    program = Path(sys.argv[0]).name
    try:
        yield
    except AloneError as error:  # the others may be anywhere
        if not alone:
            raise
        sys.exit(complain(program, error, everywhere=not isinstance(error, LostError)))
    except UserError as error:
        # A data loader's worker hands over its traceback, which ends with the message.
        sys.exit(complain(program, str(error).strip().rpartition("UserError: ")[-1]))
    except OSError as error:
        hint = f": {MORE_OPEN_FILES}" if error.errno == errno.EMFILE else ""
        sys.exit(complain(program, error, hint=hint))
    except RuntimeError as error:
        if not alone or not is_lost(error):
            raise
        sys.exit(complain(program, "another process has ended"))
    except KeyboardInterrupt:  # before or after training, which deals with it itself
        if not alone:
            raise
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def _checkpoint(options: Options, processes: Processes) -> Iterator[tuple[dict[str, Any] | None, Path]]:
    """What --resume, whose run is locked, or --evaluate name, if anything, and its file. Raises UserError."""
    if options.resume and options.evaluate:
        raise UserError("--resume and --evaluate exclude each other")
    flag = "--resume" if options.resume else "--evaluate"
    with contextlib.ExitStack() as lock:
        saved, path = None, Path()
        if options.resume or options.evaluate:
            path = checkpoint.last_of(options.resume) if options.resume else checkpoint.best_of(options.evaluate)

            def read() -> dict[str, Any]:
                if options.resume:
                    lock.enter_context(locked(path.parent))  # before: what another process then saves would be lost
                return checkpoint.load(path, flag)

            saved = processes.from_first(read)
        yield saved, path


def _named_run(options: Options, typed: frozenset[str], processes: Processes) -> tuple[Options, frozenset[str]]:
    """With --run, the options that continue the run of this name where there is one. Raises UserError."""
    if not options.run:
        return options, typed
    if options.evaluate:
        raise UserError("--run acts on training only: leave it out with --evaluate")
    if options.resume:
        raise UserError("--run and --resume exclude each other: --run continues the run of its name by itself")
    directory = Path(options.log_path, options.run)
    if not processes.from_first(lambda: os.path.lexists(directory)):
        return options, typed
    if not processes.from_first(lambda: (directory / checkpoint.LAST).exists()):
        raise UserError(f"{directory} is there and holds no run to continue: choose another --run")
    # The command is the one that began the run.
    typed -= {"log_path"} | ({"seed"} if options.seed == -1 else set())
    return replace(options, resume=str(directory)), typed


def _chosen(options: Options, processes: Processes) -> tuple[Options, torch.device]:
    """With what was left open, and the device. Raises UserError."""
    if options.seed == -1:
        options = replace(options, seed=processes.from_first(lambda: secrets.randbelow(2**32)))
    if options.alpha is None:
        options = replace(options, alpha=USUAL_ALPHA[options.surrogate])
    with processes.raising_together():
        return options, choose_device(options.device, processes)


def test(setup: Setup, path: Path, processes: Processes) -> int:
    """Tests the checkpoint read from ``path`` and says it."""
    found = report_of(setup, path, processes)
    if setup.options.report:
        processes.from_first(lambda: write(Path(setup.options.report), found))
    say("\n".join(lines(found)))
    say(said(found))
    return 0


def test_once(setup: Setup, trainer: Trainer, directory: Path) -> None:
    """Of a run with --val_split: its best weights on the test set, which has chosen nothing. Raises StoppedError."""
    if setup.val_loader is None:
        return
    end_workers(setup.train_loader, setup.val_loader)
    processes, best = trainer.processes, directory / checkpoint.BEST
    load_weights(setup.net, processes.from_first(lambda: checkpoint.load(best, "--evaluate"))["model"], best)
    found = report_of(setup, best, processes, trainer.stop)
    processes.from_first(lambda: replace_text(directory / TEST, as_json(found)))
    logger.info(said(found))


def report_of(setup: Setup, path: Path, processes: Processes, stop: StopSignals | None = None) -> dict[str, Any]:
    tested = (setup.net, setup.method, setup.precision, setup.test_loader, setup.device, setup.classes)
    about = {"checkpoint": str(path), "dataset": setup.options.dataset}
    return {**about, **report(*tested, processes, stop)}


def said(found: dict[str, Any]) -> str:
    return (
        f"{found['checkpoint']}: test loss {found['loss']:.4f}, accuracy {found['accuracy']:.2f} % "
        f"(top-5 {found['top5']:.2f} %)"
    )


def check_flags(options: TrainOptions, typed: frozenset[str], device: torch.device, processes: Processes) -> None:
    """Raises UserError where flags exclude each other, or where one would silently have no effect."""
    if options.evaluate and (idle := sorted(typed & names_where(type(options), "evaluate", "idle"))):
        raise UserError(f"--{idle[0]} acts on training only: leave it out with --evaluate")
    if options.report:
        if not options.evaluate:
            raise UserError("--report is of --evaluate: add it, or leave the report out")
        check_new(Path(options.report))
    for choice, kinds, options_of in (("method", METHODS, options_of_method), ("loss", LOSSES, options_of_loss)):
        used = options_of(kinds[getattr(options, choice)])
        for name, kind in kinds.items():
            for idle in sorted(typed & options_of(kind) - used):
                raise UserError(f"{as_typed(idle, getattr(options, idle))} is of --{choice} {name}: add that, or leave "
                                "it out")  # fmt: skip
    if not options.evaluate:
        make_method(options).check()
    if make_method(options).alone and processes.size > 1 and not options.evaluate:
        raise UserError(f"--method {options.method} is of one process: start it without torchrun")
    if "decay" in typed and options.neuron == "if":
        raise UserError("--decay has no effect on --neuron if, which has no leak: leave one of the two out")
    if "momentum" in typed and options.optim != "SGD":
        raise UserError(f"--momentum is of --optim SGD: leave it out with {options.optim}")
    if options.lr_warmup_epochs >= options.num_epoch:
        raise UserError(
            f"--lr_warmup_epochs {options.lr_warmup_epochs} leaves nothing of --num_epoch {options.num_epoch}: "
            "use fewer of the one or more of the other"
        )
    for name in ("mixup_alpha", "cutmix_alpha"):
        if 0 < getattr(options, name) < LEAST_ALPHA:
            raise UserError(f"{as_typed(name, getattr(options, name))} is too small: use 0, or at least {LEAST_ALPHA}")
    for name in sorted({"distill_ce", "distill_kl"} & typed):
        if not options.distill:
            raise UserError(f"{as_typed(name, getattr(options, name))} is of --distill: add that, or leave it out")
    if "model_ema_decay" in typed and not options.model_ema:
        raise UserError("--model_ema_decay is of the average of the weights: add --model_ema, or leave it out")
    if options.cuda_graph and (processes.size > 1 or options.grad_accum > 1):
        raise UserError("--cuda_graph is for one process without --grad_accum: leave it out")
    if options.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda_graph needs a GPU, not {device}: leave it out")
    if options.amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a GPU, not {device}: use --amp bf16 or off")


def say(text: str) -> None:
    """On stdout, of several processes the first."""
    if is_first():
        print(text)


@contextlib.contextmanager
def new_directory(trainer: Trainer, options: TrainOptions) -> Iterator[Path]:
    """A run directory, which appears with all that a killed run needs to be continued."""
    config = config_of(options)
    content = trainer.content(config)

    def fill(directory: Path) -> None:
        write_config(directory, config_of(as_run(options, trainer)))
        checkpoint.save(directory / checkpoint.LAST, **content)

    made = new_run_directory(options.log_path, options.run or run_name(options), fill, stamped=not options.run)
    with contextlib.ExitStack() as stack:
        directory = trainer.processes.from_first(lambda: stack.enter_context(made))
        trainer.saves += 1
        yield directory


@contextlib.contextmanager
def _directory(trainer: Trainer, options: TrainOptions, saved: dict[str, Any] | None, path: Path) -> Iterator[Path]:
    """The run's: a new one, or that of the checkpoint ``path`` if there is one."""
    if saved is not None:
        if path.name != checkpoint.LAST:  # which would become the previous one, and may be damaged
            trainer.processes.from_first(lambda: checkpoint.copy(path, path.with_name(checkpoint.LAST)))
        yield path.parent
        return
    with new_directory(trainer, options) as directory:
        try:
            yield directory
        except RunError:
            raise
        except UserError as error:  # bad data may come to light only when it is read
            if trainer.saves > 1:
                raise UserError(f"{error}; then continue with --resume {directory}") from error
            if trainer.processes.first and holds(directory):  # else another process may be continuing it
                shutil.rmtree(directory)  # nothing has been learned
            raise


def _is_done(trainer: Trainer, options: TrainOptions, saved: dict[str, Any], path: Path) -> bool:
    """Gives the trainer the checkpoint ``saved``; whether nothing is left to do, which is said. Raises UserError."""
    if saved.get("data", trainer.data) != trainer.data:
        place = options.data_path or options.dataset
        raise UserError(f"{path} was trained on other data than {place} holds now: name its own with --data_path")
    checkpoint.load_state(trainer, saved, path)
    if not trainer.done(options.num_epoch) or (options.val_split and not _is_tested(trainer, path.parent)):
        return False
    early = f" that --early_stop {options.early_stop} gives" if len(trainer.logged) < options.num_epoch else ""
    say(f"{path.parent}: all {len(trainer.logged)} epochs{early} are done, there is nothing to continue")
    more = "a larger --num_epoch goes on" if options.scheduler in ENDLESS else train_on_from(path)
    say(f"for more epochs, {more}")
    say(summary(trainer, path.parent))
    return True


def _is_tested(trainer: Trainer, directory: Path) -> bool:
    return trainer.processes.from_first((directory / TEST).exists)


def config_of(options: TrainOptions) -> dict[str, Any]:
    """What a checkpoint keeps of the options."""
    return {name: value for name, value in asdict(options).items() if name not in OF_THIS_START}


def as_run(options: TrainOptions, trainer: Trainer) -> TrainOptions:
    """With what the device and the number of processes decide where it was left to them; a checkpoint keeps it open."""
    gpu, alone = trainer.device.type == "cuda", trainer.processes.size == 1
    chosen = {
        "compile": gpu and "compile" in options_of_method(type(trainer.method)),
        "channels_last": gpu,
        "cuda_graph": gpu and alone and options.grad_accum == 1,
        "sync_bn": not alone,
    }
    chosen = {name: value for name, value in chosen.items() if getattr(options, name) is None}
    return replace(options, **chosen, tf32=options.tf32 and gpu)


@contextlib.contextmanager
def _run_log(trainer: Trainer, options: TrainOptions, directory: Path) -> Iterator[RunLog]:
    """The log, opened with what is trained."""
    config = config_of(as_run(options, trainer))
    with trainer.processes.raising_together():
        silent = contextlib.nullcontext(SimpleNamespace(directory=directory))  # of a process that writes nothing
        log = RunLog(directory, trainer.logged, config) if trainer.processes.first else silent
    with log as log:
        parameters = sum(p.numel() for p in trainer.net.parameters())
        logger.info(
            f"{options.arch} ({parameters / 1e6:.2f} M parameters), {trainer.method.title}, T = {options.T}, step mode "
            f"{options.step_mode}, {len(trainer.train_loader.dataset)} training and "
            f"{len(trainer.val_loader.dataset)} {trainer.val_name} samples of {options.dataset}, {trainer.device}, "
            f"seed {options.seed}"
        )
        logger.info(f"run directory: {directory}")
        if trainer.logged or trainer.step:
            within = f", step {trainer.step} of the next" if trainer.step else ""
            logger.info(f"continuing after epoch {len(trainer.logged)}{within}")
        yield log


@contextlib.contextmanager
def _told_how_to_continue(
    trainer: Trainer, options: TrainOptions, typed: frozenset[str], directory: Path
) -> Iterator[None]:
    """After a signal, with its exit status, or a failure of the machine."""
    processes = trainer.processes
    try:
        yield
    except StoppedError as stopped:
        logger.info(f"{stopped} after step {trainer.step} of epoch {len(trainer.logged) + 1}, which is saved")
        logger.info(f"continue with: {continue_command(processes, options, typed, directory)}")
        sys.exit(stopped.status)
    except RuntimeError as error:
        if processes.size > 1 and is_lost(error):
            raise LostError(f"another process has ended; continue with --resume {directory}") from error
        reason = str(error).splitlines()[0]
        hint = next((hint for words, hint in _OUTSIDE.items() if words in reason), None)
        if hint is None:
            raise
        kind = RunError if processes.size == 1 else AloneError
        raise kind(f"{reason}; continue with --resume {directory}, or start again {hint}") from error


def continue_command(processes: Processes, options: TrainOptions, typed: frozenset[str], directory: Path) -> str:
    """With what was typed and is not in the checkpoint; of torchrun's flags the number of processes alone."""
    start = ["torchrun", "--nproc_per_node", str(processes.local_size)] if processes.size > 1 else ["python"]
    again = [
        as_typed(name, getattr(options, name)) for name in sorted(typed & names_where(type(options), "resume", "new"))
    ]
    return shlex.join([*start, sys.argv[0], "--resume", str(directory), *" ".join(again).split()])


def summary(trainer: Trainer, directory: Path) -> str:
    best = trainer.best
    return (
        f"best {trainer.val_name} accuracy {best['val_acc']:.2f} % in epoch {best['epoch']} of {len(trainer.history)}\n"
        f"best weights: {directory / checkpoint.BEST}\n"
        f"look at it:   tensorboard --logdir {directory}"
    )


def with_config(options: Options, typed: frozenset[str], config: dict[str, Any], path: Path) -> Options:
    """The options with everything that was not typed taken from a checkpoint's ``config``.

    Raises:
        UserError: the configuration is not one of this script's, or a typed option contradicts it.
    """
    config = saved_options(type(options), config, path, options.dataset)
    names = config.keys()
    fixed = names_where(type(options), "resume" if options.resume else "evaluate", "fixed") & names
    if config["scheduler"] in ENDLESS:
        fixed -= {"num_epoch"}
    for name in sorted(typed & fixed):
        if getattr(options, name) != config[name]:
            given, made_with = as_typed(name, getattr(options, name)), as_typed(name, config[name])
            other = name in names_where(type(options), "evaluate", "fixed")  # network
            hint = "" if other else f": {train_on_from(path)}"
            raise UserError(f"{given} contradicts {path}, which was made with {made_with}{hint}")
    return replace(
        options, **{name: config[name] for name in names - typed - names_where(type(options), "resume", "new")}
    )


def train_on_from(path: Path) -> str:
    """What to do with a run, of which ``path`` is a checkpoint, that is to go on in another way."""
    run = path.parent if path.name == checkpoint.LAST else path
    return f"a new run with its own --num_epoch and --lr starts from those weights by --weights {run}"


def run_name(options: TrainOptions) -> str:
    method = make_method(options).name
    return f"{options.dataset}_{options.arch}_{method}-{options.step_mode}_T{options.T}_seed{options.seed}"
