"""The data sets of torchvision: their files found in a directory, or downloaded into it, and read."""

from __future__ import annotations

import contextlib
import http.client
import inspect
import io
import logging
import os
import socket
import tarfile
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageOps
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from ..errors import UserError
from ..staging import check_may_make, sweep
from .cifar_mnist import read_cifar, read_mnist, stored
from .files import Split, check_directory

logger = logging.getLogger(__name__)


def of_torchvision(tv_class: Any) -> Callable[[str | os.PathLike | None], tuple[Split, Split]]:
    """The reader of a data set's row: of the files that torchvision's class ``tv_class`` names.

    CIFAR's and MNIST's like are read without trusting them (`cifar_mnist`), any other by the class itself, which does.
    """
    format = _format_of(tv_class)
    return partial(_read_by_torchvision, tv_class) if format is None else partial(_read_files, tv_class, format)


def _read_files(tv_class: Any, format: _Format, data_path: str | os.PathLike | None) -> tuple[Split, Split]:
    folder, files, archives = format.layout(tv_class)
    if not data_path:
        hint = f"name the directory that holds {folder}, or is to hold it"
        raise UserError(f"{tv_class.__name__} needs --data_path: {hint}")
    root = Path(data_path).expanduser()
    for directory in (root, root / folder):
        check_directory(directory)
    # Whoever names the folder of the files itself means those files, not a download into it.
    inner = not (root / folder).exists() and any(os.path.isfile(stored(root / file)) for file in files)
    place = root if inner else root / folder
    missing = [file for file in files if not os.path.isfile(stored(place / file))]
    if len(missing) == len(files):
        _refuse_other_forms(tv_class, root, archives)
        _download(tv_class, format, root)
    elif missing:
        raise UserError(f"{place} lacks {', '.join(missing)}: add what is missing, or remove the directory")
    return format.read(tv_class, place)


def _refuse_other_forms(tv_class: Any, root: Path, archives: dict[str, str]) -> None:
    """Raises UserError for what lies at ``root`` in place of the files, before any network is tried."""
    name = tv_class.__name__
    for archive, md5 in archives.items():
        if (root / archive).is_file() and not check_integrity(root / archive, md5):
            fault = "is damaged or another archive: its checksum is not the published one"
            raise UserError(f"{root / archive} {fault}: remove it, it is downloaded again, or replace it")
    for path in sorted(root.glob("cifar-10*")):
        form = next((form for form in ("binary", "matlab") if form[:3] in path.name.split(".")[0][8:]), None)
        if form:
            raise UserError(f"{path} is CIFAR's {form} version, which is not read: get the python version of {name}")
    if (root / "train").is_dir():
        hint = "train on them by experiment/imagenet/main.py --dataset FOLDER"
        raise UserError(f"{root} holds no {name} but folders, {root / 'train'}: if they hold images, {hint}")


def _read_by_torchvision(tv_class: Any, data_path: str | os.PathLike | None) -> tuple[Split, Split]:
    name = tv_class.__name__
    if not data_path:
        raise UserError(f"{name} needs --data_path: name the directory that holds it, or is to hold it")
    root = Path(data_path).expanduser()
    check_directory(root)
    flags = inspect.signature(tv_class).parameters
    which = [{"train": True}, {"train": False}] if "train" in flags else [{"split": "train"}, {"split": "test"}]
    fetch = {"download": True} if "download" in flags else {}
    try:
        try:
            return tuple(_in_memory(tv_class(root, **chosen)) for chosen in which)
        except RuntimeError:  # what torchvision raises for files that are not there
            if not fetch:
                raise
        check_may_make(root)
        logger.info("%s is not there: downloading %s", root, name)
        with _quiet_network():
            return tuple(_in_memory(tv_class(root, **chosen, **fetch)) for chosen in which)
    except _DOWNLOAD_ERRORS as error:
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        hint = "put the data set there, or name the --data_path that has it"
        raise UserError(f"{root} does not hold {name}, or it is damaged ({reason}): {hint}") from error


def _in_memory(samples: Any) -> Split:
    """All images of one of torchvision's data sets, cropped in their centres to the size of the first."""
    first, _ = samples[0]
    mode = "L" if first.mode in ("1", "L", "I") else "RGB"
    images = [np.asarray(ImageOps.fit(image.convert(mode), first.size)) for image, _ in samples]
    labels = np.array([label for _, label in samples], np.int64)
    classes = list(getattr(samples, "classes", map(str, range(labels.max() + 1))))
    return Split(np.stack(images), labels, classes)


class Layout(NamedTuple):
    folder: str  # below the data path
    files: list[str]  # in the folder
    archives: dict[str, str]  # what the files are unpacked from, below the data path, and its MD5


def _cifar_layout(tv_class: Any) -> Layout:
    files = [file for file, _ in tv_class.train_list + tv_class.test_list]
    return Layout(tv_class.base_folder, [*files, tv_class.meta["filename"]], {tv_class.filename: tv_class.tgz_md5})


def _mnist_layout(tv_class: Any) -> Layout:
    folder = f"{tv_class.__name__}/raw"
    files = [archive.removesuffix(".gz") for archive, _ in tv_class.resources]
    return Layout(folder, files, {f"{folder}/{archive}": md5 for archive, md5 in tv_class.resources})


_DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException, tarfile.TarError)


def _download(tv_class: Any, format: _Format, root: Path) -> None:
    """Fetch and unpack the published files, or leave everything as it was and raise UserError."""
    folder, files, archives = format.layout(tv_class)
    name = tv_class.__name__
    target = root / folder
    check_may_make(target)
    created = [path for path in (target, *target.parents) if not path.exists()]
    logger.info("%s is not there: downloading %s", target, name)
    try:
        target.mkdir(parents=True, exist_ok=True)
        sweep(root, ".download-*")
        # Unpacked aside and moved when complete: an interrupted download must not pass for a damaged data set.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as staging, _quiet_network():
            for archive, md5 in archives.items():
                if check_integrity(root / archive, md5):  # fetched before: no need of the network
                    (Path(staging) / archive).parent.mkdir(parents=True, exist_ok=True)
                    (Path(staging) / archive).symlink_to((root / archive).resolve())
            tv_class(staging, download=True)
            for file in files:
                os.replace(Path(staging) / folder / file, target / file)
    except BaseException as error:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        if not isinstance(error, _DOWNLOAD_ERRORS):
            raise
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        raise UserError(
            f"{target} does not hold {name} and the download failed ({reason}): "
            "put the data set there, or name the --data_path that has it"
        ) from error


@contextlib.contextmanager
def _quiet_network(timeout_s: float = 30) -> Iterator[None]:
    """Keep torchvision's prints and progress bars off the terminal, and never wait for ever on a silent server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


class _Format(NamedTuple):
    layout: Callable[[Any], Layout]
    read: Callable[[Any, Path], tuple[Split, Split]]


def _format_of(tv_class: Any) -> _Format | None:
    if issubclass(tv_class, datasets.CIFAR10):
        return _Format(_cifar_layout, read_cifar)
    mnist = [archive for archive, _ in datasets.MNIST.resources]
    if getattr(tv_class, "resources", None) and [archive for archive, _ in tv_class.resources] == mnist:
        return _Format(_mnist_layout, read_mnist)
    return None
