"""Image data sets on disk: what is known of each, and reading their files without trusting them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import logging
import os
import socket
import struct
import tarfile
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from ..errors import UserError
from ..staging import check_may_make, sweep
from .array_pickle import ArrayUnpickler, ForeignGlobalError, uint8_array
from .digits import CLASSES as DIGITS
from .digits import read_digits, split_digits

logger = logging.getLogger(__name__)

MOST_EXPANSION = 50  # of a .gz file; deflated zeros expand 1000-fold


@dataclass(frozen=True)
class DatasetSpec:
    channels: int
    num_classes: int
    stored_size: int  # pixels a side, as the files hold the images
    image_size: int  # pixels a side, as the networks see them unless asked otherwise
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    crop: bool  # random crop after padding; the digits of 8x8 pixels fill their image
    flip: bool  # a mirrored animal is an animal, a mirrored digit is no digit
    auto_aug: bool
    cutout: bool
    train_batch_size: int
    max_workers: int  # processes that load it, on as many cores; none where making an image takes less than passing it
    published: Any = None  # torchvision's class: file names, MD5s, download; None: comes with scikit-learn


# CIFAR-10's std is the mean over images of each one's own, less than that of all pixels: the one in the field's use.
DATASETS: dict[str, DatasetSpec] = {
    "CIFAR10": DatasetSpec(
        channels=3, num_classes=10, stored_size=32, image_size=32, crop=True, flip=True, auto_aug=True, cutout=True,
        train_batch_size=128, max_workers=8,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), published=datasets.CIFAR10,
    ),
    "CIFAR100": DatasetSpec(
        channels=3, num_classes=100, stored_size=32, image_size=32, crop=True, flip=True, auto_aug=True, cutout=True,
        train_batch_size=128, max_workers=8,
        mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761), published=datasets.CIFAR100,
    ),
    "MNIST": DatasetSpec(
        channels=1, num_classes=10, stored_size=28, image_size=32, crop=True, flip=False, auto_aug=False, cutout=False,
        train_batch_size=128, max_workers=8,
        mean=(0.1307,), std=(0.3081,), published=datasets.MNIST,
    ),
    "FashionMNIST": DatasetSpec(
        channels=1, num_classes=10, stored_size=28, image_size=28, crop=True, flip=True, auto_aug=False, cutout=False,
        train_batch_size=128, max_workers=8,
        mean=(0.2860,), std=(0.3530,), published=datasets.FashionMNIST,
    ),
    "DIGITS": DatasetSpec(
        channels=1, num_classes=10, stored_size=8, image_size=8, crop=False, flip=False, auto_aug=False, cutout=False,
        train_batch_size=32, max_workers=0,
        mean=(0.3054,), std=(0.3760,),
    ),
}  # fmt: skip


class Split(NamedTuple):
    images: np.ndarray  # uint8, (N, H, W) or (N, H, W, 3)
    labels: np.ndarray  # int64, (N,)
    classes: list[str]  # the name of each label


def read_dataset(name: str, data_path: str | os.PathLike | None) -> tuple[Split, Split]:
    """The training and the test images; downloads published files where they are missing. Raises UserError."""
    spec = DATASETS[name]
    return _read_digits() if spec.published is None else _read_files(name, spec, data_path)


def _read_digits() -> tuple[Split, Split]:
    digits, labels = read_digits()
    images = np.rint(digits * (255 / 16)).astype(np.uint8)  # 0..16 to the bytes that ToTensor maps to 0..1
    train, test = (Split(images[members], labels[members], DIGITS) for members in split_digits(labels))
    return train, test


def _read_files(name: str, spec: DatasetSpec, data_path: str | os.PathLike | None) -> tuple[Split, Split]:
    layout, read = _FORMATS[spec.published]
    folder, files, _ = layout(spec.published)
    if not data_path:
        raise UserError(f"{name} needs --data_path: name the directory that holds {folder}, or is to hold it")
    root = Path(data_path).expanduser()
    for directory in (root, root / folder):
        check_directory(directory)
    # Whoever names the folder of the files itself means those files, not a download into it.
    inner = not (root / folder).exists() and any(os.path.isfile(_stored(root / file)) for file in files)
    place = root if inner else root / folder
    missing = [file for file in files if not os.path.isfile(_stored(place / file))]
    if len(missing) == len(files):
        _download(name, spec.published, root)
    elif missing:
        raise UserError(f"{place} lacks {', '.join(missing)}: add what is missing, or remove the directory")
    return read(spec, place)


class Layout(NamedTuple):
    folder: str  # below the data path
    files: list[str]  # in the folder
    archives: dict[str, str]  # what the files are unpacked from, below the data path, and its MD5


def _cifar_layout(published: Any) -> Layout:
    files = [file for file, _ in published.train_list + published.test_list]
    return Layout(published.base_folder, [*files, published.meta["filename"]], {published.filename: published.tgz_md5})


def _mnist_layout(published: Any) -> Layout:
    folder = f"{published.__name__}/raw"
    files = [archive.removesuffix(".gz") for archive, _ in published.resources]
    return Layout(folder, files, {f"{folder}/{archive}": md5 for archive, md5 in published.resources})


def _stored(file: Path) -> Path:
    """Where ``file`` lies, which may be compressed, as MNIST and FashionMNIST are published."""
    return file if os.path.lexists(file) else file.with_name(f"{file.name}.gz")


def check_directory(path: Path) -> None:
    """Raises UserError where ``path`` is there but is no directory, or none that may be read."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise UserError(f"{path} is not a directory: name the directory that holds the data")
    if os.path.isdir(path) and not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"{path} cannot be read: mend its permissions or name another directory")


_DOWNLOAD_ERRORS = (OSError, RuntimeError, ValueError, EOFError, http.client.HTTPException, tarfile.TarError)


def _download(name: str, published: Any, root: Path) -> None:
    """Fetch and unpack the published files, or leave everything as it was and raise UserError."""
    folder, files, archives = _FORMATS[published].layout(published)
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
            published(staging, download=True)
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend its permissions or replace it") from error


def _corrupt(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not usable: {reason}; replace it by an intact file")


def _read_cifar(spec: DatasetSpec, folder: Path) -> tuple[Split, Split]:
    published = spec.published
    md5s = dict(published.train_list + published.test_list)
    meta_path = folder / published.meta["filename"]
    # Each file is read once, so that what was checked is what is used.
    contents = {file: _read_bytes(folder / file) for file in md5s}
    meta = _read_bytes(meta_path)

    own = _is_own_data(folder, {file: _md5(contents[file]) == md5 for file, md5 in md5s.items()})
    if not own and _md5(meta) != published.meta["md5"]:
        raise _corrupt(meta_path, "its checksum differs from the published one")
    names = _unpickle(meta_path, meta).get(published.meta["key"])
    names = [_text(name) for name in names] if isinstance(names, list) else []
    if len(names) != spec.num_classes or None in names:
        raise _corrupt(meta_path, f"{published.meta['key']} is no list of {spec.num_classes} names")

    batches = {file: _cifar_batch(folder / file, contents.pop(file), names) for file in md5s}
    if own:
        message = "%s: checksums differ from the published %s: training on your own data in its format"
        logger.warning(message, folder, published.__name__)
    train, test = ([batches[file] for file, _ in part] for part in (published.train_list, published.test_list))
    return _join(train), _join(test)


def _is_own_data(folder: Path, matches: dict[str, bool]) -> bool:
    """False: the published data. True: no file is published, so the user's own. A mixture is a damaged copy."""
    changed = [file for file, match in matches.items() if not match]
    if changed and len(changed) < len(matches):
        paths = ", ".join(str(folder / file) for file in changed)
        raise UserError(
            f"{paths}: corrupt, the checksum differs from the published one though other files match: "
            "fetch the data set again, or keep data of your own apart from the published files"
        )
    return bool(changed)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _join(batches: list[Split]) -> Split:
    images, labels, classes = zip(*batches, strict=True)
    return Split(np.concatenate(images), np.concatenate(labels), classes[0])


def _cifar_batch(path: Path, content: bytes, classes: list[str]) -> Split:
    entry = _unpickle(path, content)
    labels = entry.get("labels", entry.get("fine_labels"))
    try:
        data = uint8_array(entry.get("data"))
    except (ValueError, TypeError, OverflowError) as error:
        raise _corrupt(path, "its data is no array of bytes (uint8)") from error
    if data.ndim != 2 or data.shape[1] != 3072:
        raise _corrupt(path, f"its data has shape {data.shape} instead of (N, 3072)")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise _corrupt(path, "its labels are no list of integers")
    if len(labels) != len(data) or not labels:
        raise _corrupt(path, f"it holds {len(data)} images and {len(labels)} labels")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # (N, 3072) -> (N, H, W, 3)
    return Split(images, _check_labels(path, labels, len(classes)), classes)


def _check_labels(path: Path, labels: list[int] | np.ndarray, num_classes: int) -> np.ndarray:
    outside = [int(label) for label in (min(labels), max(labels)) if not 0 <= label < num_classes]
    if outside:
        raise _corrupt(path, f"label {outside[0]} is out of range, it has to be from 0 to {num_classes - 1}")
    return np.asarray(labels, dtype=np.int64)


def _unpickle(path: Path, content: bytes) -> dict[str, Any]:
    try:
        entry = ArrayUnpickler(content).load()
    except ForeignGlobalError as error:
        raise _corrupt(path, f"it contains code ({error}), which was not run") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise _corrupt(path, f"it is truncated or no pickle ({type(error).__name__})") from error
    if not isinstance(entry, dict):
        raise _corrupt(path, "it holds no dictionary")
    return {_text(key): value for key, value in entry.items()}


def _text(name: Any) -> str | None:
    """A name as Python 2 or 3 pickled it; None where it is none."""
    return name.decode("latin1") if isinstance(name, bytes) else name if isinstance(name, str) else None


def _read_mnist(spec: DatasetSpec, folder: Path) -> tuple[Split, Split]:
    return _mnist_split(spec, folder, "train"), _mnist_split(spec, folder, "t10k")


def _mnist_split(spec: DatasetSpec, folder: Path, prefix: str) -> Split:
    label_path = _stored(folder / f"{prefix}-labels-idx1-ubyte")
    images = _read_idx(_stored(folder / f"{prefix}-images-idx3-ubyte"), (spec.stored_size, spec.stored_size))
    labels = _read_idx(label_path, ())
    if len(images) != len(labels) or not len(labels):
        raise _corrupt(label_path, f"it holds {len(labels)} labels of {len(images)} images")
    classes = DIGITS if spec.published is datasets.MNIST else spec.published.classes
    return Split(images, _check_labels(label_path, labels, spec.num_classes), classes)


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
    """An array (N, *item_shape) of bytes, after big-endian integers: 0x0800 + number of dimensions, N, item_shape."""
    content = _unpacked(path) if path.suffix == ".gz" else _read_bytes(path)
    header = struct.Struct(f">{2 + len(item_shape)}I")
    if len(content) < header.size:
        raise _corrupt(path, "it is truncated")
    magic, count, *shape = header.unpack_from(content)
    if magic != 0x0801 + len(item_shape) or tuple(shape) != item_shape:
        raise _corrupt(path, f"its header is not that of an idx file of {item_shape or 'single'} bytes")
    expected = header.size + count * prod(item_shape)
    if len(content) != expected:
        raise _corrupt(path, f"it has {len(content)} bytes and its header promises {expected}: truncated or overlong")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(count, *item_shape)


def _unpacked(path: Path) -> bytes:
    packed = _read_bytes(path)
    most = MOST_EXPANSION * len(packed)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(path, f"it is truncated or no gzip file ({error})") from error
    if len(content) > most:
        raise _corrupt(path, f"it expands more than {MOST_EXPANSION}-fold, as no such file does")
    return content


class _Format(NamedTuple):
    layout: Callable[[Any], Layout]
    read: Callable[[DatasetSpec, Path], tuple[Split, Split]]


_FORMATS: dict[Any, _Format] = {
    datasets.CIFAR10: _Format(_cifar_layout, _read_cifar),
    datasets.CIFAR100: _Format(_cifar_layout, _read_cifar),
    datasets.MNIST: _Format(_mnist_layout, _read_mnist),
    datasets.FashionMNIST: _Format(_mnist_layout, _read_mnist),
}
