"""Command-line options as typed dataclasses: a field's metadata is its help text, group and range.

A script's own dataclass derives from `TrainOptions`. Which flags were typed is kept apart from their defaults, because
a resumed run takes everything that was not typed from its checkpoint.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from model import MODELS
from model.layer import NEURONS, SURROGATES

from ..errors import UserError
from .distributed import is_first
from .loss import LOSSES
from .method import METHODS
from .optim import OPTIMIZERS, SCHEDULERS
from .values import HUGE, SCRIPTS, core_of, did_you_mean, file_name, number, number_or_none, one_of, path

logger = logging.getLogger(__name__)

GROUPS = {
    "data": "what to train on",
    "network": "which network, and how its neurons work",
    "method": "how gradients are computed",
    "optimization": "how weights are updated",
    "speed": "how fast it runs",
    "run": "where to run, and where results go",
}

OF_THIS_START = frozenset({"resume", "evaluate", "report", "run"})  # say what to do with which run


# What other code calls these flags -> the flag
OTHER_NAMES = {
    "batch": "train_batch_size",
    "batch_size": "train_batch_size",
    "data": "data_path",
    "data_dir": "data_path",
    "ema": "model_ema",
    "epoch": "num_epoch",
    "epochs": "num_epoch",
    "gpu": "device",
    "learning_rate": "lr",
    "model": "arch",
    "optimizer": "optim",
    "output_dir": "log_path",
    "rate": "rate_flag",
    "steps": "T",
    "tau": "decay",
    "time_step": "T",
    "time_steps": "T",
    "timesteps": "T",
    "warmup": "lr_warmup_epochs",
    "weight_decay": "wd",
    "workers": "num_workers",
}


def option(
    default: Any,
    help: str,
    group: str,
    type: Callable[[str], Any] = str,
    metavar: str | None = None,
    *,
    resume: str = "fixed",
    evaluate: str = "free",
    alias: str | None = None,
) -> Any:
    """A dataclass field that is a command-line flag; a bool ``type`` makes it a ``--x / --no-x`` pair.

    Args:
        resume: whether a continued run may be given another value: 'fixed', no; 'free', yes; 'new', yes, and it is
            never taken from the checkpoint, which says nothing of the machine that reads it.
        evaluate: the same of testing a checkpoint: 'fixed', it makes another network, or other test data, of it;
            'free'; 'idle', it acts on training only and may not be typed.
        alias: a second name of the flag.
    """
    roles = {"resume": resume, "evaluate": evaluate, "alias": alias}
    return field(default=default, metadata={"help": help, "group": group, "type": type, "metavar": metavar, **roles})


def switch(default: bool | None, help: str, group: str, **roles: str) -> Any:
    """A ``--x / --no-x`` pair; None leaves the choice to the script. ``roles`` as of `option`."""
    return option(default, help, group, bool, **roles)


def names_where(options_class: type, key: str, value: str) -> frozenset[str]:
    """The options with this ``value`` of 'resume' or 'evaluate'."""
    return frozenset(f.name for f in fields(options_class) if f.metadata[key] == value)


@dataclass(kw_only=True)
class TrainOptions:
    """The flags that all training scripts share, with the published defaults (method, Published settings)."""

    arch: str = option("resnet18", f"one of {', '.join(MODELS)}", "network", one_of(tuple(MODELS)), "NAME",
                       evaluate="fixed")  # fmt: skip
    T: int = option(4, "number of time steps", "network", number(int, 1, 10_000))
    step_mode: str = option("m", "m: each layer runs all steps at once; s: the network runs step by step", "network",
                            one_of(("m", "s")), "{m,s}")  # fmt: skip
    neuron: str = option("lif", "lif; plif, whose decay is learned; if, without decay", "network",
                         one_of(tuple(NEURONS)), "NAME", evaluate="fixed")  # fmt: skip
    surrogate: str = option("sigmoid", f"derivative of a spike: {', '.join(SURROGATES)}", "network",
                            one_of(tuple(SURROGATES)), "NAME", evaluate="fixed")  # fmt: skip
    alpha: float | None = option(None, "its steepness (default: SpikingJelly's of each, 4 for sigmoid)", "network",
                                 number(float, 0, HUGE, open_low=True), evaluate="fixed")  # fmt: skip
    decay: float = option(
        0.2, "membrane decay per time step", "network", number(float, 1e-6, 1, open_high=True), evaluate="fixed"
    )
    thresh: float = option(1.0, "firing threshold", "network", number(float, 0, HUGE, open_low=True), evaluate="fixed")
    v_reset: float | None = option(None, "potential after a spike; none subtracts the threshold instead", "network",
                                   number_or_none, evaluate="fixed")  # fmt: skip
    detach_reset: bool = switch(True, "let no gradient pass through the reset", "network")

    method: str = option("bptt", f"one of {', '.join(METHODS)}; --rate_flag means rate", "method",
                         one_of(tuple(METHODS)), "NAME")  # fmt: skip
    windows: int = option(1, "of rate: windows of T / K steps, each with a rate of its own: 1 as published, T is BPTT",
                          "method", number(int, 1, 10_000), "K", evaluate="idle")  # fmt: skip
    rate_loss_scale: bool | None = switch(
        None, "of rate: scale the loss's gradient by 1/T, as published (default: with --windows 1)", "method",
        evaluate="idle",
    )  # fmt: skip
    sltt_steps: int | None = option(None, "of sltt: how many steps, drawn for each batch, go backward (default: T)",
                                    "method", number(int, 1, 10_000), "K", evaluate="idle")  # fmt: skip

    num_epoch: int = option(300, "number of epochs", "optimization", number(int, 1, int(HUGE)), evaluate="idle")
    train_batch_size: int = option(
        128, "samples in a training batch, of all processes together", "optimization", number(int, 1, int(HUGE))
    )
    grad_accum: int = option(1, "parts in which a training batch is computed one after the other; each part has "
                             "BatchNorm statistics of its own", "optimization", number(int, 1, int(HUGE)),
                             evaluate="idle")  # fmt: skip
    val_batch_size: int = option(
        128, "samples in a test batch", "optimization", number(int, 1, int(HUGE)), resume="free"
    )
    optim: str = option(
        "SGD",
        f"optimizer: {', '.join(OPTIMIZERS)}",
        "optimization",
        one_of(tuple(OPTIMIZERS), SGDM="SGD"),
        "NAME",
        evaluate="idle",
    )
    lr: float = option(
        0.1, "learning rate at the start", "optimization", number(float, 0, HUGE, open_low=True), evaluate="idle"
    )
    momentum: float = option(0.9, "of SGD", "optimization", number(float, 0, 1, open_high=True),
                             evaluate="idle")  # fmt: skip
    wd: float = option(
        5e-4,
        "weight decay, not on biases and normalisation layers",
        "optimization",
        number(float, 0, HUGE),
        evaluate="idle",
    )
    scheduler: str = option("cosine", f"learning rate over the epochs: {', '.join(SCHEDULERS)}", "optimization",
                            one_of(tuple(SCHEDULERS)), "NAME", evaluate="idle")  # fmt: skip

    early_stop: int | None = option(None, "end after so many epochs without a better test accuracy, or validation "
                                    "accuracy with --val_split (default: not)",
                                    "optimization", number(int, 1, int(HUGE)), resume="free",
                                    evaluate="idle")  # fmt: skip
    lr_warmup_epochs: int = option(0, "epochs at the start over which the learning rate rises", "optimization",
                                   number(int, 0, int(HUGE)), evaluate="idle")  # fmt: skip
    loss: str = option("ce", "ce: cross-entropy of the mean output; tet: of each step's; mse: of the mean output",
                       "optimization", one_of(tuple(LOSSES)), "NAME")  # fmt: skip
    tet_weight: float = option(0.05, "of tet: the weight of the outputs' squared distance from 1", "optimization",
                               number(float, 0, 1), evaluate="idle")  # fmt: skip
    rate_penalty: float = option(0.0, "add the neurons' mean firing rate to the loss, times this", "optimization",
                                 number(float, 0, HUGE), evaluate="idle")  # fmt: skip
    distill: bool = switch(False, "self-distillation: branches learn from rates behind stages, while training",
                           "optimization", evaluate="idle")  # fmt: skip
    distill_ce: float = option(1.0, "with --distill, the weight of the branches' losses", "optimization",
                               number(float, 0, HUGE), evaluate="idle")  # fmt: skip
    distill_kl: float = option(0.3, "with --distill, the weight of what they teach one another", "optimization",
                               number(float, 0, HUGE), evaluate="idle")  # fmt: skip
    label_smoothing: float = option(0.0, "share of a label that is spread over all classes", "optimization",
                                    number(float, 0, 1, open_high=True), evaluate="idle")  # fmt: skip
    mixup_alpha: float = option(0.0, "mix images in pairs, of shares from Beta(alpha, alpha); 0: not", "optimization",
                                number(float, 0, HUGE), evaluate="idle")  # fmt: skip
    cutmix_alpha: float = option(0.0, "the same, a rectangle of the one pasted into the other; with both, one of them "
                                 "a batch", "optimization", number(float, 0, HUGE), evaluate="idle")  # fmt: skip
    clip_grad_norm: float | None = option(None, "scale gradients down to this norm of all of them together (default: "
                                          "not)", "optimization", number(float, 0, HUGE, open_low=True),
                                          evaluate="idle")  # fmt: skip
    model_ema: bool = switch(False, "test and save an exponential moving average of the weights, made anew at each "
                             "step", "optimization", evaluate="idle")  # fmt: skip
    model_ema_decay: float = option(0.999, "what a step keeps of the average", "optimization",
                                    number(float, 0, 1, open_high=True), evaluate="idle")  # fmt: skip
    weights: str | None = option(None, "start from the weights in this file: a checkpoint or a state_dict",
                                 "optimization", path, "FILE", evaluate="idle")  # fmt: skip

    data_path: str | None = option(None, "directory of the data set", "data", path, "DIR", resume="free")
    val_split: float = option(0.0, "hold out this share of the training samples to choose the best epoch on; the test "
                              "set, which chooses it as published, is then tested once, at the end", "data",
                              number(float, 0, 1, open_high=True), evaluate="idle")  # fmt: skip
    num_workers: int | None = option(None, "processes that load data (default: one a core; 0 for DIGITS and "
                                     "DIGITS_DVS)", "data", number(int, 0, 1024), resume="free")  # fmt: skip

    amp: str = option("off", "mixed precision: off, bf16 or fp16 (on a GPU)", "speed",
                      one_of(("off", "bf16", "fp16")), "{off,bf16,fp16}")  # fmt: skip
    compile: bool | None = switch(None, "of rate: neurons and BatchNorm in fewer passes, by torch.compile "
                                  "(default: on a GPU)", "speed")  # fmt: skip
    channels_last: bool | None = switch(
        None, "keep images in memory with their channels last (default: on a GPU)", "speed"
    )
    tf32: bool = switch(True, "on a GPU, float32 convolutions and products with 10 bits of mantissa (TF32)", "speed")
    cuda_graph: bool | None = switch(None, "replay each step as a CUDA graph (default: on a GPU, in one process and "
                                     "without --grad_accum)", "speed", resume="new")  # fmt: skip
    deterministic: bool = switch(False, "the same bits in every run, also on a GPU, where it is slower", "speed")

    sync_bn: bool | None = switch(
        None, "with several processes, BatchNorm over the samples of all (default: yes)", "method", evaluate="idle"
    )
    seed: int = option(0, "seed of all random numbers; -1 draws one and stores it", "run", number(int, -1, 2**32 - 1))
    device: str | None = option(None, "cpu, cuda, cuda:1, ... (default: cuda where there is one)", "run", resume="new")
    save_every: int = option(0, "steps between checkpoints within an epoch; 0 saves after epochs only", "run",
                             number(int, 0, 10**9), resume="free", evaluate="idle")  # fmt: skip
    # torchrun takes --run, whose name is the beginning of its own --run-path and --run_path, for an error.
    run: str | None = option(None, "name of the run's directory; where it is there already, the run is continued "
                             "(behind torchrun: --run_name)", "run", file_name, "NAME", evaluate="idle",
                             alias="run_name")  # fmt: skip
    log_path: str = option("log", "directory under which the run gets a directory of its own", "run", path, "DIR")
    resume: str | None = option(None, "continue this run: its directory, or a checkpoint of it", "run", path, "RUN")
    evaluate: str | None = option(None, "test this checkpoint and stop", "run", path, "CHECKPOINT")
    report: str | None = option(
        None, "with --evaluate, also write what it prints to this new file, as JSON", "run", path, "FILE"
    )


def with_default(name: str, default: Any, **changed: Any) -> Any:
    """The field ``name`` of `TrainOptions` for a script with another default; ``changed``: its help or type."""
    (shared,) = (f for f in fields(TrainOptions) if f.name == name)
    return field(default=default, metadata={**shared.metadata, **changed})


Options = TypeVar("Options", bound=TrainOptions)


class Parser(argparse.ArgumentParser):
    """argparse, its complaint cut to the one line that says what is wrong."""

    def error(self, message: str) -> NoReturn:
        sys.exit(complain(self.prog.split()[0], message))  # without the name of a subcommand


def complain(program: str, problem: object, everywhere: bool = False, hint: str = "") -> int:
    """Says in one line on stderr what is wrong; returns the exit status of bad input.

    Of several processes the first one says it, or any ``everywhere``. Of an OSError it names the file, not the number.
    That whoever reads what is printed has read enough, as ``head`` has, is no error: nothing is said, as by ``cat``.
    """
    if isinstance(problem, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 128 + signal.SIGPIPE
    if isinstance(problem, OSError):
        problem = f"{problem.filename or 'a file'}: {problem.strerror or problem}"
    if everywhere or is_first():
        print(f"{program}: error: {' '.join(f'{problem}{hint}'.split())}", file=sys.stderr)
    return 2


def parse(
    options_class: type[Options], description: str | None, argv: Sequence[str] | None = None
) -> tuple[Options, frozenset[str]]:
    """Reads the command line. Returns the options and the names of those that were typed.

    Leaves with exit status 2 and one line on stderr where a flag is unknown or its value out of range.
    """
    parser = Parser(
        description=description,
        usage="%(prog)s [flags]",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=44, width=240),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    for f in fields(options_class):
        _add(groups[f.metadata["group"]], f)
    groups["method"].add_argument("--rate_flag", action=_RateFlag, help="--method rate; --no-rate_flag: --method bptt")
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{_flag_meant(options_class, unknown)}")
    return options_class(**vars(typed)), frozenset(vars(typed))


class _RateFlag(argparse.BooleanOptionalAction):
    """The published name of --method rate; of several the last one holds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.method = "bptt" if option_string == "--no-rate_flag" else "rate"


def saved_options(options_class: type[TrainOptions], config: Any, path: Path, dataset: str) -> dict[str, Any]:
    """What a checkpoint, perhaps of an earlier version, says of this class's options; what it lacks is as by default.

    Args:
        config: as the file ``path`` has it.
        dataset: one of the script's.

    Raises:
        UserError: it is of another script or of a later version, or no configuration.
    """
    config = upgraded(config)
    defaults = {f.name: f.default for f in fields(options_class) if f.name not in OF_THIS_START}
    if {"arch", "dataset"} <= config.keys() and isinstance(config["dataset"], str):
        script = SCRIPTS.get(config["dataset"])
        if script and script != SCRIPTS.get(dataset):
            raise UserError(f"{path} was made by another script, for {config['dataset']}: use {script}")
        if unknown := sorted(config.keys() - defaults.keys()):
            raise UserError(
                f"{path} was made by another script or version, with options unknown here: {', '.join(unknown)}"
            )
        if valid_config(options_class, config):
            if lacking := sorted(defaults.keys() - config.keys()):
                logger.info(f"{path} is of an earlier version, without {', '.join(lacking)}: as by default")
            return defaults | config
    raise UserError(f"{path} holds no valid configuration: it is damaged, or not a checkpoint of this project")


def upgraded(config: Any) -> dict[str, Any]:
    """The options in a checkpoint as they are called today; none where it holds something else."""
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        return {}
    config = dict(config)
    if isinstance(rate := config.pop("rate_flag", None), bool):
        config["method"] = "rate" if rate else "bptt"
    return config


def _flag_meant(options_class: type[TrainOptions], unknown: list[str]) -> str:
    mistyped = next((word.partition("=")[0] for word in unknown if word.startswith("-")), "")
    off = mistyped.startswith("--no-")
    flags = {
        f.name: f"--no-{f.name}" if off and f.metadata["type"] is bool else f"--{f.name}" for f in fields(options_class)
    } | {"rate_flag": "--no-rate_flag" if off else "--rate_flag"}
    meant = flags.get(OTHER_NAMES.get(core_of(mistyped).replace("-", "_"), ""))
    hint = f", did you mean {meant}?" if meant else did_you_mean(mistyped, flags.values())
    return hint or " (--help lists all)"


def _add(group: argparse._ArgumentGroup, f: Field) -> None:
    help = f.metadata["help"]
    if f.metadata["type"] is bool:
        if f.default is not None:
            help += f" (default: {'yes' if f.default else 'no'})"
        group.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=help)
        return
    if "(default" not in help and f.default is not None:
        help += f" (default: {f.default})"
    elif f.name == "v_reset":
        help += " (default: none)"
    metavar = f.metadata["metavar"] or getattr(f.metadata["type"], "placeholder", "X")
    names = [f"--{name}" for name in (f.name, f.metadata["alias"]) if name]
    group.add_argument(*names, dest=f.name, type=f.metadata["type"], metavar=metavar, help=help)


def valid_config(options_class: type[TrainOptions], config: Any) -> bool:
    """Whether ``config``, read from a file, holds what the command line could have given for the options it names."""
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        return False
    return all(_valid(f, config[f.name]) for f in fields(options_class) if f.name in config)


def _valid(f: Field, value: Any) -> bool:
    if value is None:
        return f.default is None
    if f.metadata["type"] is bool:
        return isinstance(value, bool)
    try:
        parsed = f.metadata["type"](str(value))
    except (argparse.ArgumentTypeError, ValueError, RecursionError):  # of str: too many digits, or too deep
        return False
    return type(parsed) is type(value) and parsed == value


def as_typed(name: str, value: Any) -> str:
    """An option and its value as one types them."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {'none' if value is None else value}"
