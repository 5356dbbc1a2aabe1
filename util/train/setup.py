"""What a script trains: data, a network on its device with the method attached, and the engine that trains it."""

import copy
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Subset

from model import MODELS

from ..errors import UserError
from ..rate.sync_norm import sync_batch_norm
from . import checkpoint, weights
from .batches import data_loaders, loader_in_order
from .distributed import ONE_PROCESS, Processes
from .engine import Trainer
from .loss import make_criterion
from .method import Method, Precision, make_method
from .optim import OPTIMIZERS, make_scheduler, parameter_groups
from .options import Options, TrainOptions
from .recipe import averaged, mixing
from .terms import make_terms

logger = logging.getLogger(__name__)

NEURON = ("neuron", "decay", "thresh", "v_reset", "detach_reset", "surrogate", "alpha")  # options that networks take


@dataclass(frozen=True)
class LoadedData:
    """What a script's ``load_data`` returns; samples are (image [C, H, W] or frames [T, C, H, W], label).

    For --val_split both have a ``transform``, which alone they differ by, and the training set has its ``labels``.
    """

    train_set: Dataset
    test_set: Dataset
    num_classes: int
    options: dict[str, Any]  # the values of options whose default depends on the data set

    @property
    def classes(self) -> list[str]:
        """The name of each label: the training set's ``classes``, as torchvision's data sets have it, or its number."""
        return list(getattr(self.train_set, "classes", map(str, range(self.num_classes))))


@dataclass(frozen=True)
class Setup:
    """A network on its device, the method attached to it, and its data."""

    options: TrainOptions  # with those that the data settle
    net: nn.Module
    method: Method
    precision: Precision
    train_loader: DataLoader
    test_loader: DataLoader
    device: torch.device
    classes: list[str]  # the name of each label
    ema: AveragedModel | None  # of the network, with the method attached too
    val_loader: DataLoader | None = None  # of the samples held out of the training set, if any

    @property
    def loaders(self) -> list[DataLoader]:
        return list(filter(None, (self.train_loader, self.val_loader, self.test_loader)))


def set_up(
    options: Options,
    load_data: Callable[[Options], LoadedData],
    device: torch.device,
    saved: dict[str, Any] | None = None,
    path: Path = Path(),
    processes: Processes = ONE_PROCESS,
) -> Setup:
    """Everything but the optimizer, with the weights of the checkpoint ``saved``, read from ``path``, if there is one.

    Raises:
        UserError: the data cannot be read, or the network does not fit them or the checkpoint.
    """
    data = processes.in_turn(lambda: load_data(options))
    options = replace(options, **data.options, device=str(device))
    check_batch(options, processes)
    synchronised = options.sync_bn is not False

    set_backends(options)
    torch.manual_seed(options.seed)
    net = build_network(options, data, 1 if synchronised else processes.size)
    if saved is not None:
        weights.load_weights(net, saved["model"], path)
    elif options.weights:
        with processes.raising_together():
            weights.start_from(net, checkpoint.best_of(options.weights))
    channels_last = device.type == "cuda" if options.channels_last is None else options.channels_last
    net.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    method = make_method(options)
    precision = Precision(options.amp, device)
    ema = averaged(net, options.model_ema_decay) if options.model_ema and not options.evaluate else None
    for network in (net, *([ema.module] if ema else [])):
        method.attach(network)
        precision.attach(network)
    if synchronised and processes.size > 1:
        sync_batch_norm(net)
    train_set, val_set = data.train_set, None
    if options.val_split and not options.evaluate:
        train_set, val_set = held_out(data, options.val_split, options.seed)
    train_loader, test_loader = data_loaders(
        train_set,
        data.test_set,
        train_batch_size=options.train_batch_size,
        val_batch_size=options.val_batch_size,
        num_workers=options.num_workers,
        device=device,
        seed=options.seed,
        processes=processes,
        parts=options.grad_accum,
        least=2 if synchronised else 2 * processes.size,
        mix=mixing(options.mixup_alpha, options.cutmix_alpha, data.num_classes),
    )
    val_loader = val_set and loader_in_order(
        val_set, options.val_batch_size, options.num_workers, device, options.seed, processes
    )
    return Setup(options, net, method, precision, train_loader, test_loader, device, data.classes, ema, val_loader)


class _Part(Subset):
    """Of a data set that is drawn from its seed, so that the whole tells it."""

    def fingerprint(self) -> str:
        return fingerprint_of(self.dataset)


def held_out(data: LoadedData, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """The training set in two, each class shared alike: what is learned from, and the ``share`` that is only tested on.

    Raises:
        UserError: a class has too few samples, or the data sets are not as `LoadedData` says.
    """
    from sklearn.model_selection import train_test_split

    if not (hasattr(data.train_set, "labels") and hasattr(data.train_set, "transform")):
        raise UserError("--val_split needs training samples with labels and a transform, which this script's have not")
    try:
        labels = np.asarray(data.train_set.labels)
        learned, held = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise UserError(f"--val_split {share} of {len(labels)} samples leaves some of {data.num_classes} classes "
                        f"without any on one side: use another share, or more data ({error})") from error  # fmt: skip
    tested = copy.copy(data.train_set)
    tested.transform = data.test_set.transform
    return _Part(data.train_set, learned), _Part(tested, held)


def set_backends(options: TrainOptions) -> None:
    """What PyTorch is to compute with, for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first product
    torch.use_deterministic_algorithms(options.deterministic)


def make_trainer(setup: Setup, processes: Processes = ONE_PROCESS) -> Trainer:
    """The engine at the start of a run."""
    options, net = setup.options, setup.net
    terms = make_terms(options, net, len(setup.classes)).to(setup.device)
    for term in terms:
        term.attach(net)
    if options.sync_bn is not False and processes.size > 1:
        sync_batch_norm(terms)
    # A fused optimizer lets the guard keep bad numbers off the weights without waiting for the GPU at each step.
    fused = setup.device.type == "cuda" or None
    groups = parameter_groups(nn.ModuleList([net, *terms]), options.wd)
    own = {"momentum": options.momentum} if options.optim == "SGD" else {}
    optimizer = OPTIMIZERS[options.optim](groups, options.lr, fused=fused, **own)
    return Trainer(
        net=net,
        method=setup.method,
        precision=setup.precision,
        optimizer=optimizer,
        scheduler=make_scheduler(options.scheduler, optimizer, options.num_epoch, options.lr_warmup_epochs),
        train_loader=setup.train_loader,
        val_loader=setup.val_loader or setup.test_loader,
        val_name="validation" if setup.val_loader else "test",
        device=setup.device,
        seed=options.seed,
        classes=setup.classes,
        data=[fingerprint_of(samples) for samples in (setup.train_loader.dataset.samples, setup.test_loader.dataset)],
        save_every=options.save_every,
        early_stop=options.early_stop,
        processes=processes,
        synchronised=options.sync_bn is not False,
        criterion=make_criterion(options),
        val_criterion=make_criterion(options, training=False),
        terms=terms,
        clip_grad_norm=options.clip_grad_norm,
        ema=setup.ema,
        cuda_graph=options.cuda_graph is not False,
    )


def fingerprint_of(samples: Dataset) -> str:
    """What the ``fingerprint`` of a data set gives, or the number of its samples."""
    return str(samples.fingerprint() if hasattr(samples, "fingerprint") else len(samples))


def check_batch(options: TrainOptions, processes: Processes) -> None:
    """Raises UserError where a training batch cannot be divided into equal parts."""
    size, shares = options.train_batch_size, processes.size * options.grad_accum
    if options.evaluate:
        return
    least = 2 * options.grad_accum * (processes.size if options.sync_bn is False else 1)
    if options.distill and size < least:
        raise UserError(f"--distill: BatchNorm of a branch has a single value of one sample to normalise: use a "
                        f"--train_batch_size of {least} or more")  # fmt: skip
    if size % shares == 0:
        return
    wanted = [f"{processes.size} processes"] if processes.size > 1 else []
    wanted += [f"--grad_accum {options.grad_accum}"] if options.grad_accum > 1 else []
    near = " or ".join(str(n) for n in (size // shares * shares, (size // shares + 1) * shares) if n)
    raise UserError(f"--train_batch_size {size} cannot be divided by {' times '.join(wanted)}: use {near}")


def choose_device(name: str | None, processes: Processes = ONE_PROCESS) -> torch.device:
    """The device called ``name``, tried out; without a name a GPU where there is one. Raises UserError.

    Of several processes on a machine each gets the GPU of its number there.
    """
    if processes.local_size > 1 and (name or "cuda") == "cuda" and torch.cuda.is_available():
        if (gpus := torch.cuda.device_count()) < processes.local_size:
            raise UserError(
                f"{processes.local_size} processes for {gpus} GPUs: start torchrun with --nproc_per_node {gpus}"
            )
        name = f"cuda:{processes.local_rank}"
    elif processes.local_size > 1 and name and name[-1].isdigit():
        raise UserError(f"--device {name}: each process takes the GPU of its own number; leave the number out")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # kernels that name no device would run on the first one
    except Exception as error:  # each backend complains in its own way
        raise UserError(f"--device {name}: no such device here; leave it out or use --device cpu") from error
    return device


def build_network(options: TrainOptions, data: LoadedData, batches: int = 1) -> nn.Module:
    """The network for the data's shape. Raises UserError where it does not fit.

    ``batches``: in how many parts BatchNorm sees a training batch, apart from --grad_accum.
    """
    channels, height = data.test_set[0][0].shape[-3:-1]  # of the test set: augmentation would draw random numbers
    net = new_network(options, data.num_classes, channels)
    values = options.train_batch_size // (options.grad_accum * batches) * (options.T if options.step_mode == "m" else 1)
    error = _refusal(net, channels, height, 2 if options.evaluate else values)
    if isinstance(error, ValueError):
        raise UserError(
            f"BatchNorm has a single value to normalise: use a larger --train_batch_size ({error})"
        ) from error
    if error is not None:
        others = sorted((8, 16, 32, 48, 64, 128), key=lambda size: abs(size - height))
        size = next((size for size in others if _refusal(net, channels, size) is None), None)
        hint = f"it can take {size}x{size}" if size else "choose another --arch"
        raise UserError(
            f"{options.arch} is too deep for {height}x{height} inputs, or made for others: {hint}"
        ) from error
    if not options.evaluate and not options.resume and _strides_over_nothing(net, channels, height):
        sizes = (size for size in (16, 32, 48, 64, 128, 224) if not _strides_over_nothing(net, channels, size))
        change = "--image_size" if hasattr(options, "image_size") else "inputs"
        logger.info(
            f"{options.arch} shrinks {height}x{height} inputs to one pixel before its last strides: consider "
            f"{change} of {next(sizes)} or more, or another --arch"
        )
    return net


def new_network(options: TrainOptions, num_classes: int, channels: int) -> nn.Module:
    """The network that the options name, its weights drawn at random."""
    neuron = {name: getattr(options, name) for name in NEURON}
    return MODELS[options.arch](num_classes=num_classes, in_channel=channels, **neuron)


def _refusal(net: nn.Module, channels: int, size: int, values: int = 2) -> Exception | None:
    """What a training forward of a copy on zeros raises, if anything.

    ``values``: how many images BatchNorm sees at once; 2 stand for more.
    """
    net = copy.deepcopy(net)
    try:
        with torch.no_grad():
            net(torch.zeros(min(values, 2), channels, size, size))
    except (ValueError, RuntimeError) as error:
        return error
    return None


def _strides_over_nothing(net: nn.Module, channels: int, size: int) -> bool:
    """Whether a layer of ``net`` that is to shrink its input gets a single pixel of such images."""

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        strides = (module.stride,) if isinstance(module.stride, int) else module.stride
        found.append(max(strides) > 1 and args[0].shape[-2:] == (1, 1))

    net, found = copy.deepcopy(net).eval(), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        net(torch.zeros(1, channels, size, size))
    return any(found)
