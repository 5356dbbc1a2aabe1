"""Look into a trained network: five measurements, each of a run directory or a checkpoint.

python experiment/analysis/main.py gradients log/RUN    rate-based gradients beside BPTT's, layer by layer
python experiment/analysis/main.py shuffle log/RUN      accuracy with the spikes between layers permuted over time
python experiment/analysis/main.py rates log/RUN        firing rate by layer and time step
python experiment/analysis/main.py energy log/RUN       MAC and AC counts of one inference, estimated energy
python experiment/analysis/main.py confusion log/RUN    confusion matrix, accuracy by class

Each prints a table and writes it as NAME.csv, with a picture NAME.png, into RUN/analysis or --out DIR.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import util.train.before_torch  # noqa: F401  (before torch)

# isort: split
from torch.utils.data import Subset

from util.analysis import confusion, energy, gradients, rates, shuffle
from util.analysis.report import Row, text_table, write_csv
from util.errors import UserError
from util.staging import only_reading
from util.train import checkpoint
from util.train.options import Parser, TrainOptions, complain
from util.train.own_script import script_of
from util.train.run_log import log_to_console
from util.train.script import run_name, with_config
from util.train.setup import LoadedData, Setup, choose_device, make_trainer, set_up
from util.train.signals import raise_on_interrupt
from util.train.values import number, path

# The same network for looking at: SpikingJelly's own forward, all steps of a layer at once.
PLAIN = {"method": "bptt", "step_mode": "m", "compile": False, "val_split": 0.0}


@dataclass(frozen=True)
class Run:
    """A checkpoint that was read, and what its script does with the options in it."""

    file: Path
    saved: dict[str, Any]
    options: TrainOptions
    load_data: Callable[[Any], LoadedData]

    def set_up(self, weights: bool = True, samples: int | None = None, **changes: Any) -> Setup:
        """The network, with the weights that were saved or those of the start, and its data.

        Args:
            samples: of the test set, the first so many; None for all.
            changes: of the options.

        Raises:
            UserError: the data cannot be read, or the weights are others.
        """
        options = replace(self.options, **changes)
        load = partial(_first_samples, self.load_data, samples)
        return set_up(options, load, choose_device(options.device), self.saved if weights else None, self.file)

    def __str__(self) -> str:
        return f"{run_name(self.options)}, {self.file.name}"


def read_run(arguments: argparse.Namespace) -> Run:
    """Raises UserError where there is no checkpoint of this project."""
    file = checkpoint.best_of(arguments.run)
    saved = checkpoint.load(file, "RUN")
    script = script_of(saved["config"], file, arguments.script)
    options = with_config(script.options_class(), frozenset(), saved["config"], file)
    options, load_data = replace(options, num_workers=0, device=arguments.device), script.load_data
    if options.data_path and not arguments.data_path:
        load_data = only_reading(load_data, file)
    return Run(file, saved, replace(options, data_path=arguments.data_path or options.data_path), load_data)


def _first_samples(load_data: Callable[[Any], LoadedData], samples: int | None, options: TrainOptions) -> LoadedData:
    data = load_data(options)
    if samples is None:
        return data
    return replace(data, test_set=Subset(data.test_set, range(len(data.test_set))[:samples]))


def tested(measure: Callable[[Setup], list[Row]], run: Run, arguments: argparse.Namespace) -> list[Row]:
    return measure(run.set_up(samples=arguments.samples, **PLAIN))


def shuffled(run: Run, arguments: argparse.Namespace) -> list[Row]:
    return tested(partial(shuffle.measure, repeats=arguments.repeats, seed=arguments.seed), run, arguments)


def compared(run: Run, arguments: argparse.Namespace) -> list[Row]:
    """Gradients of the checkpoint; or of its run, repeated from the start, which gives the same weights again."""
    looked_at = run.set_up(**PLAIN, amp="off", grad_accum=1, train_batch_size=arguments.samples)
    x, y = (tensor.to(looked_at.device) for tensor in next(iter(looked_at.train_loader)))

    def measure(epoch: int) -> list[Row]:
        return [{"epoch": epoch, **row} for row in gradients.measure(looked_at.net, looked_at.method, x, y)]

    if not arguments.over_training:
        return measure(len(run.saved["logged"]) if "logged" in run.saved else None)
    trainer = make_trainer(run.set_up(weights=False))
    epochs, rows = run.options.num_epoch, []
    for epoch in range(epochs + 1):
        if epoch:
            trainer.run_epoch(f"epoch {epoch}/{epochs}")
            accuracy = trainer.logged[-1].metrics["val_acc"]
            print(f"epoch {epoch}/{epochs}: {trainer.val_name} accuracy {accuracy:.2f} %", flush=True)
        if epoch % arguments.every == 0 or epoch == epochs:
            looked_at.net.load_state_dict(trainer.net.state_dict())
            rows += measure(epoch)
    return rows


@dataclass(frozen=True)
class Command:
    measure: Callable[[Run, argparse.Namespace], list[Row]]
    plot: Callable[[list[Row], Path, str], None]
    title: str
    help: str
    example: str


COMMANDS = {
    "gradients": Command(
        compared, gradients.plot, "Rate-based gradients beside BPTT's",
        "Cosine and norm of rate-based gradients beside BPTT's, and the term that the method drops, layer by layer, on "
        "one batch in float64 (the paper's Figures 3 and 6).",
        "gradients log/RUN --over_training --every 5",
    ),
    "shuffle": Command(
        shuffled, shuffle.plot, "Accuracy with the steps of spikes permuted",
        "Test accuracy with the spikes of each neuron layer, and of all, permuted over time (the paper's Table 2).",
        "shuffle log/RUN --repeats 5",
    ),
    "rates": Command(
        partial(tested, rates.measure), rates.plot, "Firing rates",
        "Spikes per neuron, by layer and time step, over the test set (the paper's Figure 5).",
        "rates log/RUN/last.pth",
    ),
    "energy": Command(
        partial(tested, energy.measure), energy.plot, "Operations and energy of one inference",
        f"MAC and AC counts by SpikingJelly's op counters, and an estimate: {energy.CONSTANTS}.",
        "energy log/RUN --samples 100",
    ),
    "confusion": Command(
        partial(tested, confusion.measure), confusion.plot, "Confusion matrix",
        "Which classes are taken for which, and the accuracy of each class.",
        "confusion log/RUN --out pictures",
    ),
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    raw = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    whole = Parser(description=__doc__, **raw)
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        example = f"example: python experiment/analysis/main.py {command.example}"
        own = commands.add_parser(name, help=command.help, description=command.help, epilog=example, **raw)
        own.add_argument("run", metavar="RUN", type=path, help="a run directory (its best weights), or a checkpoint")
        own.add_argument(
            "--data_path", metavar="DIR", type=path, help="where the data are now (default: as in the run)"
        )
        own.add_argument("--script", metavar="FILE", help="the script of your own that made the run")
        own.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
        own.add_argument("--out", metavar="DIR", type=path, help="where the files go (default: RUN/analysis)")
        if name == "gradients":
            own.add_argument("--samples", metavar="N", type=number(int, 2), default=32,
                             help="training samples in the batch (default: 32)")  # fmt: skip
            own.add_argument("--over_training", action="store_true",
                             help="train the run again from its start, and compare after its epochs")  # fmt: skip
            own.add_argument("--every", metavar="N", type=number(int, 1), default=1,
                             help="with --over_training, epochs between two comparisons (default: 1)")  # fmt: skip
        else:
            own.add_argument("--samples", metavar="N", type=number(int, 1),
                             help="the first so many test samples (default: all)")  # fmt: skip
        if name == "shuffle":
            own.add_argument("--repeats", metavar="N", type=number(int, 1), default=3,
                             help="permutations drawn for each row (default: 3)")  # fmt: skip
            own.add_argument("--seed", metavar="N", type=number(int, 0), default=0,
                             help="of the permutations (default: 0)")  # fmt: skip
    return whole


@contextmanager
def directory(path: Path) -> Iterator[None]:
    """Makes it; takes it away again after an error. Raises OSError."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            path.rmdir()
        raise


def main() -> int:
    log_to_console()
    whole = make_parser()
    arguments = whole.parse_args()
    if not arguments.command:
        whole.error(f"name what to measure: {', '.join(COMMANDS)}, as in {Path(whole.prog).name} rates log/RUN")
    name, command = arguments.command, COMMANDS[arguments.command]
    try:
        raise_on_interrupt()
        run = read_run(arguments)
        out = Path(arguments.out or run.file.parent / "analysis")
        with directory(out):  # before the work
            rows = command.measure(run, arguments)
        write_csv(rows, out / f"{name}.csv")
        command.plot(rows, out / f"{name}.png", f"{command.title}\n{run}")
        print(text_table(rows))
    except (UserError, OSError) as error:
        return complain(whole.prog, error)
    except KeyboardInterrupt:
        return 130
    print(f"{out / name}.csv, {out / name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
