"""The training engine of all scripts: epochs, evaluation, checkpoints. A script adds data and defaults only."""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn
from tqdm import tqdm

from util import checkpoint
from util.data import seed_epoch
from util.errors import UserError
from util.meter import FiringRates, Meter, peak_memory_bytes
from util.run_log import RunLog
from util.util import bptt_model_setting, rate_model_setting

logger = logging.getLogger(__name__)

# Of each epoch, in metrics.jsonl and in checkpoints; accuracies in percent.
METRICS = ("epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr",
           "seconds", "images_per_second", "peak_memory_bytes")  # fmt: skip


class Precision:
    """Mixed precision (``amp``: 'off', 'bf16' or 'fp16'). Neurons take float32, so potentials and eligibilities are."""

    def __init__(self, amp: str, device: torch.device):
        self.enabled, self.device_type = amp != "off", device.type
        self.dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def attach(self, net: nn.Module) -> None:
        for module in net.modules():
            if self.enabled and isinstance(module, neuron.BaseNode):
                module.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)


@dataclass(frozen=True)
class Method:
    """How gradients are computed: what a training step does differently for BPTT and rate-based backpropagation."""

    rate_based: bool
    time_step: int
    step_mode: str
    scale_loss: bool
    compiled: bool = False  # rate-based: the steps of each neuron layer in one compiled pass

    def attach(self, net: nn.Module) -> None:
        if self.rate_based:
            rate_model_setting(net, self.time_step, self.step_mode, compiled=self.compiled, static_input=True)
        else:
            bptt_model_setting(net, self.time_step, self.step_mode)

    def forward(self, net: nn.Module, x: Tensor) -> Tensor:
        """Images [B, C, H, W], shown at every step, or frames [B, T, C, H, W] -> time-averaged outputs [B, classes]."""
        functional.reset_net(net)
        steps = [x] * self.time_step if x.dim() == 4 else x.unbind(1)  # T times [B, C, H, W]
        if self.step_mode == "s":
            return sum(net(step) for step in steps) / self.time_step
        return net(x.expand(self.time_step, *x.shape) if x.dim() == 4 else x.transpose(0, 1))  # [T, B, C, H, W]

    def backward(self, loss: Tensor) -> None:
        """Rate-based, published results were obtained with 1/T of the loss's gradient (method, Loss scale)."""
        (loss / self.time_step if self.rate_based and self.scale_loss else loss).backward()


@dataclass
class Trainer:
    """A network, what updates it, and what it learns from.

    ``state_dict`` and ``load_state_dict`` hold all that changes from epoch to epoch; the random numbers of an epoch
    depend on ``seed`` and its number alone (`util.data.seed_epoch`), so a continued run needs no other state.
    """

    net: nn.Module
    method: Method
    precision: Precision
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    train_loader: Iterable
    test_loader: Iterable
    device: torch.device
    seed: int

    def __post_init__(self):
        self.history: list[dict[str, Any]] = []

    @property
    def best(self) -> dict[str, Any]:
        """The metrics of the epoch with the best test accuracy, the first of equals."""
        return max(self.history, key=lambda row: row["val_acc"])

    def state_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).state_dict() for name in ("optimizer", "scheduler")}
        parts["scaler"] = self.precision.scaler.state_dict()
        return {"model": self.net.state_dict(), "epoch": len(self.history), "history": self.history, **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.history = [{name: row[name] for name in METRICS} for row in state["history"]]

    def fit(self, epochs: int, log: RunLog, config: dict[str, Any]) -> None:
        """Trains up to ``epochs`` epochs, counted from the run's start; saves the last and the best after each."""
        for epoch in range(len(self.history) + 1, epochs + 1):
            started = time.perf_counter()
            seed_epoch(self.train_loader, self.seed, epoch)
            lr = self.optimizer.param_groups[0]["lr"]
            with FiringRates(self.net) as rates:
                train = self.train_epoch(f"epoch {epoch}/{epochs}")
            val = evaluate(self.net, self.method, self.precision, self.test_loader, self.device)
            self.scheduler.step()
            seconds = time.perf_counter() - started
            loss_and_accuracy = (train.loss, train.top1, val.loss, val.top1)
            speed = (seconds, train.images_per_second, peak_memory_bytes(self.device))
            if not math.isfinite(train.loss):
                raise UserError(
                    f"the training loss is {train.loss} in epoch {epoch} (lr {lr:.4g}): use a smaller --lr; what was "
                    f"saved in {log.directory} is from the epoch before"
                )
            row = dict(zip(METRICS, (epoch, *loss_and_accuracy, lr, *speed), strict=True))
            self.history.append(row)
            state = {"config": config, **self.state_dict()}
            if self.best is row:
                weights = {"config": config, "model": state["model"], "epoch": epoch, "history": self.history}
                checkpoint.save(log.directory / checkpoint.BEST, **weights)
            scalars = {name: row[name] for name in ("lr", "images_per_second")}
            log.epoch(row, {**scalars, **train.scalars("train"), **val.scalars("val"), **rates.scalars()})
            # Last of all: an epoch that the logs have and this file has not is run and logged again on resume.
            checkpoint.save(log.directory / checkpoint.LAST, **state)
            logger.info(
                f"epoch {epoch}/{epochs}  train loss {train.loss:.4f} acc {train.top1:.2f} %  "
                f"test loss {val.loss:.4f} acc {val.top1:.2f} %  lr {lr:.4g}  "
                f"{train.images_per_second:.0f} images/s  {seconds:.1f} s"
            )

    def train_epoch(self, title: str) -> Meter:
        self.net.train()
        meter, scaler = Meter(self.device), self.precision.scaler
        with tqdm(self.train_loader, desc=title, leave=False, disable=None) as bar:
            for x, y in bar:
                x, y = (t.to(self.device, non_blocking=True) for t in (x, y))
                with self.precision.autocast():
                    out = self.method.forward(self.net, x)
                    loss = F.cross_entropy(out, y)
                self.optimizer.zero_grad()
                self.method.backward(scaler.scale(loss))
                scaler.step(self.optimizer)
                scaler.update()
                meter.add(loss.detach(), out.detach(), y)
                meter.show(bar)
        functional.reset_net(self.net)
        return meter.stop()


@torch.no_grad()
def evaluate(net: nn.Module, method: Method, precision: Precision, loader: Iterable, device: torch.device) -> Meter:
    """Loss and accuracy over ``loader``, without gradients and with running statistics."""
    net.eval()
    meter = Meter(device)
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with precision.autocast():
            out = method.forward(net, x)
        meter.add(F.cross_entropy(out, y), out, y)
    functional.reset_net(net)
    return meter.stop()
