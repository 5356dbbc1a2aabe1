"""The training engine of all scripts: steps, epochs, checkpoints. A script adds data and defaults only."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from ..errors import RunError
from . import checkpoint
from .batches import seed_step
from .distributed import ONE_PROCESS, Processes
from .evaluation import evaluate, outputs_of
from .graphed import Graphed, Recorder
from .guard import Guard, NotFiniteError
from .loss import Criterion, ce
from .meter import Fired, FiringRates, Meter, TestMeter, peak_memory_bytes
from .method import Method, OneForward, Precision
from .optim import load_optimizer, load_scheduler
from .progress import progress
from .recipe import hard_labels
from .run_log import FIRING_RATE, Logged, RunLog
from .signals import StoppedError, StopSignals

logger = logging.getLogger(__name__)

# Of each epoch, in metrics.jsonl and in checkpoints; accuracies in percent. What val_ is of: see `Trainer.val_name`.
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr",
           "seconds", "images_per_second", "peak_memory_bytes")  # fmt: skip

RUNNING_STEPS = 50  # after which BatchNorm's running statistics keep 0.5 % of what they began with


def only_numbers(names: Iterable[str], row: dict[str, Any]) -> dict[str, int | float]:
    """The values of these names. Raises KeyError, or TypeError where one is no number."""
    values = {name: row[name] for name in names}
    if not all(type(value) in (int, float) for value in values.values()):
        raise TypeError(f"{row} does not hold numbers alone")
    return values


@dataclass
class Trainer:
    """A network, what updates it, and what it learns from.

    ``state_dict`` and ``load_state_dict`` hold all that changes from step to step. Random numbers are a function of
    ``seed``, epoch and step (util/train/batches.py), so a continued run needs none of their states.
    """

    net: nn.Module
    method: Method
    precision: Precision
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    train_loader: DataLoader  # its sampler a `util.train.batches.BatchOrder`
    val_loader: Iterable  # on which the best epoch is chosen
    device: torch.device
    seed: int
    classes: Sequence[str] = ()  # the name of each label, for those who use the weights
    data: Sequence[str] = ()  # fingerprints of what it learns from
    save_every: int = 0  # steps; 0: between epochs only
    val_name: str = "test"  # as published, the test set's; "validation": held-out samples'
    early_stop: int | None = None  # epochs without a better accuracy there, after which it is enough
    criterion: Criterion = ce
    val_criterion: Criterion = ce
    terms: nn.ModuleList = field(default_factory=nn.ModuleList)  # each a `util.train.terms.Term`
    clip_grad_norm: float | None = None  # the largest norm of all gradients together that the optimizer gets
    ema: AveragedModel | None = None  # of ``net``: updated at each step, and tested and saved in its place
    stop: StopSignals = field(default_factory=StopSignals)
    processes: Processes = ONE_PROCESS
    synchronised: bool = True  # BatchNorm, where there are several processes
    cuda_graph: bool = False  # on a GPU, in one process

    def __post_init__(self):
        model = OneForward(self.net, self.method, self.terms)
        self.model = self.processes.parallel(model, self.device, buffers_differ=not self.synchronised)
        self.guard = Guard(
            model if self.terms.state_dict() else self.net, self.optimizer, self.device, self.precision.scaler
        )
        recorder = Recorder.of(self.device) if self.cuda_graph and self.processes.size == 1 else None
        of_steps = recorder if self.method.replayable else None
        self._learned = Graphed(self._learn, self.device, of_steps, model.parameters()) if of_steps else self._learn
        self._outputs = Graphed(self._val_outputs, self.device, recorder)
        self.logged: list[Logged] = []
        self.saves = 0  # checkpoints written by this process
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.step = 0  # of the epoch: how many are done
        self.meter = Meter(self.device, self.processes)
        self.rates = FiringRates(self.net, self.processes, graph=any(term.needs_rates for term in self.terms))
        self.val_rates = FiringRates(self.tested, self.processes, training=False)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of the epochs that are done."""
        return [epoch.metrics for epoch in self.logged]

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the best accuracy on ``val_loader``, the first of equals."""
        return max(self.history, key=lambda row: row["val_acc"])

    @property
    def tested(self) -> nn.Module:
        """The network whose accuracy counts: ``net``, or the average of its weights."""
        return self.net if self.ema is None else self.ema.module

    def state_dict(self) -> dict[str, Any]:
        """``model`` is always what is tested; where that is an average, ``trained`` goes on being trained."""
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler", "meter", "rates")}
        parts["scaler"] = self.precision.scaler.state_dict()
        if self.terms.state_dict():
            parts["terms"] = self.terms.state_dict()
        if self.ema is not None:
            parts |= {"trained": self.net.state_dict(), "averaged": int(self.ema.n_averaged)}
        return {"model": self.tested.state_dict(), "step": self.step, "logged": self._logged_tuples(), **parts}

    def _logged_tuples(self) -> list[tuple]:
        """As checkpoints keep the epochs that are done; torch.load makes no named tuples."""
        return [tuple(epoch) for epoch in self.logged]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises what torch does, ValueError or TypeError, where ``state`` is of another kind of trainer or of none."""
        self.tested.load_state_dict(state["model"])
        if self.ema is not None:
            self.net.load_state_dict(state["trained"])
            self.ema.n_averaged.fill_(state["averaged"])
        if self.terms.state_dict():
            self.terms.load_state_dict(state["terms"])
        load_optimizer(self.optimizer, state["optimizer"])
        load_scheduler(self.scheduler, state["scheduler"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.logged = [
            Logged(only_numbers(METRICS, row), only_numbers(scalars, scalars), float(at))
            for row, scalars, at in state["logged"]
        ]
        if [row["epoch"] for row in self.history] != list(range(1, len(self.logged) + 1)):
            raise ValueError("its epochs are not counted from 1")
        self._begin_epoch()
        if type(state["step"]) is not int or state["step"] not in range(len(self.train_loader) + 1):
            raise ValueError(f"step {state['step']} of {len(self.train_loader)}")
        self.step = state["step"]
        self.meter.load_state_dict(state["meter"])
        self.rates.load_state_dict(state["rates"])

    def content(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint to continue from holds. Raises NotFiniteError where the state is not finite."""
        with self.processes.raising_together():
            self.guard.check()
            self.guard.check_state(self.optimizer)
        about = {"config": config, "classes": list(self.classes), "data": list(self.data)}
        return {**about, **self.state_dict()}

    def save(self, directory: Path, config: dict[str, Any]) -> None:
        """Writes the checkpoint to continue from. Raises RunError, as where the state is not finite."""
        content = self.content(config)
        self.processes.from_first(lambda: checkpoint.save(directory / checkpoint.LAST, **content))
        self.saves += 1

    def done(self, epochs: int) -> bool:
        """Whether all ``epochs`` are, or as many as `early_stop` lets be without a better one."""
        stale = len(self.logged) - self.best["epoch"] if self.logged else 0
        return len(self.logged) >= epochs or (self.early_stop is not None and stale >= self.early_stop)

    def fit(self, epochs: int, log: RunLog, config: dict[str, Any]) -> None:
        """Trains up to ``epochs`` epochs, counted from the run's start; saves the last and the best after each.

        ``config``: the options, as checkpoints keep them.

        Raises:
            StoppedError: a signal came; what was done is saved.
            RunError: a number was not finite, or a file could not be written.
            UserError: the data turned out to be bad.
        """
        save = partial(self.save, log.directory, config)
        while not self.done(epochs):
            epoch = len(self.logged) + 1
            lr = self.optimizer.param_groups[0]["lr"]
            try:
                self.run_epoch(f"epoch {epoch}/{epochs}", save)
            except NotFiniteError as error:
                hint = f"use a smaller --lr; the last good checkpoint is {log.directory / checkpoint.LAST}"
                raise RunError(f"{error} of epoch {epoch} (lr {lr:.4g}): {hint}") from error
            self._keep(epochs, log, config, save)

    def run_epoch(self, title: str = "", save: Callable[[], None] = lambda: None) -> None:
        """What is left of the next epoch, tested and taken into ``logged``; writes no file but by ``save``.

        Raises StoppedError or NotFiniteError.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        try:
            train = self.train_epoch(title, save)
            seed_step(self.seed, len(self.logged) + 1, self.step)
            with self.val_rates:
                val = evaluate(
                    self.tested, self.method, self.precision, self.val_loader, self.device, self.stop, self.processes,
                    outputs=self._counted_outputs, title=f"{title}, {self.val_name}", criterion=self.val_criterion,
                )  # fmt: skip
        except StoppedError:
            save()
            raise
        with self.processes.raising_together():
            self.guard.check_state(self.optimizer)
        if not math.isfinite(val.loss):
            raise NotFiniteError(f"the {self.val_name} loss is {val.loss} after the last step")
        self.logged.append(self._result(lr, train, val))
        self.scheduler.step()
        self._begin_epoch()

    def _result(self, lr: float, train: Meter, val: TestMeter) -> Logged:
        """The epoch that is done."""
        values = (len(self.logged) + 1, train.loss, train.top1, val.loss, val.top1, lr, train.seconds + val.seconds,
                  train.images_per_second, peak_memory_bytes(self.device))  # fmt: skip
        row = dict(zip(METRICS, values, strict=True))
        training = {"lr": lr, "speed/images_per_second": row["images_per_second"], **train.scalars()}
        training |= {FIRING_RATE + layer: rate for layer, rate in self.rates.by_layer().items()}
        scalars = {f"train/{tag}": value for tag, value in training.items()}
        scalars |= {f"{self.val_name}/{tag}": value for tag, value in val.scalars().items()}
        self._warn(row["epoch"], val)
        return Logged(row, scalars, time.time())

    def _warn(self, epoch: int, val: TestMeter) -> None:
        """Of layers that are silent, and of a test that tells nothing."""
        silent = self.rates.silent()
        if silent:
            logger.warning(f"epoch {epoch}: no neuron of these layers fired: {', '.join(silent)}")
        found = []
        if quiet := [layer for layer in self.val_rates.silent() if layer not in silent]:
            layers = ", ".join(quiet)
            found.append(f"no neuron of these layers fired in the {self.val_name}, though in training: {layers}")
        label = val.only_prediction()
        if label is not None and val.top1 < 100:
            found.append(f"all {self.val_name} predictions are {str(self.classes[label] if self.classes else label)!r}")
        steps = epoch * len(self.train_loader)
        hint = "training has not got far, or diverges: look at the training loss, and try another --lr"
        if steps < RUNNING_STEPS:
            hint = (
                f"{steps} steps are few for the running statistics of BatchNorm, which tests use: "
                "more of them, by --num_epoch or a smaller --train_batch_size"
            )
        if found:
            logger.warning(f"epoch {epoch}: {'; '.join(found)} ({hint})")

    def _keep(self, epochs: int, log: RunLog, config: dict[str, Any], save: Callable[[], None]) -> None:
        """Writes what the last epoch has come to, and says it."""
        row = self.logged[-1].metrics

        def write() -> None:
            if self.best is row:
                weights = {"model": self.tested.state_dict(), "logged": self._logged_tuples()}
                checkpoint.save(log.directory / checkpoint.BEST, config=config, classes=list(self.classes), **weights)
            log.epoch(self.logged[-1])

        self.processes.from_first(write)
        # Last of all: an epoch that the logs have and this file has not is run and logged again on resume.
        save()
        logger.info(
            f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f} "
            f"acc {row['train_acc']:.2f} %  {self.val_name} loss {row['val_loss']:.4f} acc {row['val_acc']:.2f} %  "
            f"lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s  {row['seconds']:.1f} s"
        )

    def train_epoch(self, title: str = "", save: Callable[[], None] = lambda: None) -> Meter:
        """The steps that the unfinished epoch has left. Raises StoppedError or NotFiniteError between two of them."""
        epoch, scaler = len(self.logged) + 1, self.precision.scaler
        self.net.train()
        self.meter.start()
        self.train_loader.sampler.start_at(epoch, self.step)
        shown = progress(self.train_loader, title, self.meter, self.step, self.processes.first)
        with self.rates, shown as batches:
            for x, y in self.processes.together(batches, self.stop):
                seed_step(self.processes.own_seed(self.seed), epoch, self.step)
                self.optimizer.zero_grad()
                total = torch.zeros((), device=self.device)
                for learn, part_x, part_y, share in self._parts(x, y):
                    loss, out, fired = learn(part_x, part_y)
                    self._count(loss, out, part_y, fired)
                    total = total + loss * share
                self.guard.watch(self.processes.sum(total), self.step + 1)
                if self.clip_grad_norm is not None:
                    scaler.unscale_(self.optimizer)
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
                scaler.step(self.optimizer)
                scaler.update()
                if self.ema is not None:
                    self.ema.update_parameters(self.net)
                self.step += 1
                if self.save_every and self.step % self.save_every == 0:
                    save()
        functional.reset_net(self.net)
        self.guard.check()
        return self.meter.stop()

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Callable, Tensor, Tensor, float]]:
        """In which a batch is computed one after the other: what learns from each, and its share of the step's samples.

        Of several processes the gradients are averaged in the backward pass of the last part.
        """
        order = self.train_loader.sampler
        sizes, samples = [len(part) for part in order.shares(self.step)], order.samples(self.step)
        if len(sizes) == 1 and len(y) == samples:
            yield self._learned, x, y, 1.0
            return
        for i, (x, y) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True), 1):  # noqa: B020
            x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
            share, last = len(y) / samples, i == len(sizes) or self.processes.size == 1
            with contextlib.nullcontext() if last else self.model.no_sync():
                yield partial(self._learn, part=share), x, y, share

    def _learn(self, x: Tensor, y: Tensor, part: float = 1.0) -> tuple[Tensor, Tensor, Fired | None]:
        """Gradients of ``part`` times the mean loss -> that loss, the mean outputs [B, classes] and the spikes."""

        def loss_of(outputs: Tensor) -> Tensor:
            own = self.criterion(outputs, y) if len(y) else outputs.sum()
            return sum((term(outputs, y, self.rates) for term in self.terms), own)

        loss, outputs = self.method.learn(self.model, x, loss_of, self.precision, part * self.processes.size)
        return loss, outputs.mean(0), self.rates.take()

    def _val_outputs(self, x: Tensor) -> tuple[Tensor, Fired | None]:
        return outputs_of(self.tested, self.method, self.precision)(x), self.val_rates.take()

    def _counted_outputs(self, x: Tensor) -> Tensor:
        out, fired = self._outputs(x)
        self.val_rates.add(fired)
        return out

    def _count(self, loss: Tensor, out: Tensor, y: Tensor, fired: Fired | None) -> None:
        self.meter.add(loss, out, hard_labels(y.to(self.device, non_blocking=True)))
        self.rates.add(fired)
