"""The files of CIFAR (pickles), and of MNIST and its like (idx, also as .gz), read without trusting them.

``tv_class``: torchvision's class of the data set, which knows file names, MD5s and class names.
"""

import gzip
import hashlib
import io
import logging
import os
import struct
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from ..errors import UserError
from .array_pickle import ArrayUnpickler, ForeignGlobalError, uint8_array
from .digits import CLASSES as DIGITS
from .files import Split, corrupt, read_bytes

logger = logging.getLogger(__name__)

MOST_EXPANSION = 50  # of a .gz file; deflated zeros expand 1000-fold


def read_cifar(tv_class: Any, folder: Path) -> tuple[Split, Split]:
    md5s = dict(tv_class.train_list + tv_class.test_list)
    meta_path = folder / tv_class.meta["filename"]
    # Each file is read once, so that what was checked is what is used.
    contents = {file: read_bytes(folder / file) for file in md5s}
    meta = read_bytes(meta_path)

    own = _is_own_data(folder, {file: _md5(contents[file]) == md5 for file, md5 in md5s.items()})
    if not own and _md5(meta) != tv_class.meta["md5"]:
        raise corrupt(meta_path, "its checksum differs from the published one")
    names = _unpickle(meta_path, meta).get(tv_class.meta["key"])
    names = [_text(name) for name in names] if isinstance(names, list) else []
    count = 100 if issubclass(tv_class, datasets.CIFAR100) else 10
    if len(names) != count or None in names:
        raise corrupt(meta_path, f"{tv_class.meta['key']} is no list of {count} names")

    batches = {file: _cifar_batch(folder / file, contents.pop(file), names) for file in md5s}
    if own:
        message = "%s: checksums differ from the published %s: training on your own data in its format"
        logger.warning(message, folder, tv_class.__name__)
    train, test = ([batches[file] for file, _ in part] for part in (tv_class.train_list, tv_class.test_list))
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
        raise corrupt(path, "its data is no array of bytes (uint8)") from error
    if data.ndim != 2 or data.shape[1] != 3072:
        raise corrupt(path, f"its data has shape {data.shape} instead of (N, 3072)")
    if not isinstance(labels, list) or any(type(label) is not int for label in labels):
        raise corrupt(path, "its labels are no list of integers")
    if len(labels) != len(data) or not labels:
        raise corrupt(path, f"it holds {len(data)} images and {len(labels)} labels")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))  # (N, 3072) -> (N, H, W, 3)
    return Split(images, _check_labels(path, labels, len(classes)), classes)


def _check_labels(path: Path, labels: list[int] | np.ndarray, num_classes: int) -> np.ndarray:
    outside = [int(label) for label in (min(labels), max(labels)) if not 0 <= label < num_classes]
    if outside:
        raise corrupt(path, f"label {outside[0]} is out of range, it has to be from 0 to {num_classes - 1}")
    return np.asarray(labels, dtype=np.int64)


def _unpickle(path: Path, content: bytes) -> dict[str, Any]:
    try:
        entry = ArrayUnpickler(content).load()
    except ForeignGlobalError as error:
        raise corrupt(path, f"it contains code ({error}), which was not run") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise corrupt(path, f"it is truncated or no pickle ({type(error).__name__})") from error
    if not isinstance(entry, dict):
        raise corrupt(path, "it holds no dictionary")
    return {_text(key): value for key, value in entry.items()}


def _text(name: Any) -> str | None:
    """A name as Python 2 or 3 pickled it; None where it is none."""
    return name.decode("latin1") if isinstance(name, bytes) else name if isinstance(name, str) else None


def read_mnist(tv_class: Any, folder: Path) -> tuple[Split, Split]:
    return _mnist_split(tv_class, folder, "train"), _mnist_split(tv_class, folder, "t10k")


def _mnist_split(tv_class: Any, folder: Path, prefix: str) -> Split:
    label_path = stored(folder / f"{prefix}-labels-idx1-ubyte")
    images = _read_idx(stored(folder / f"{prefix}-images-idx3-ubyte"), (28, 28))
    labels = _read_idx(label_path, ())
    if len(images) != len(labels) or not len(labels):
        raise corrupt(label_path, f"it holds {len(labels)} labels of {len(images)} images")
    classes = DIGITS if tv_class is datasets.MNIST else list(tv_class.classes)  # there: "0 - zero"
    return Split(images, _check_labels(label_path, labels, len(classes)), classes)


def stored(file: Path) -> Path:
    """Where ``file`` lies, which may be compressed, as MNIST and its like are published."""
    return file if os.path.lexists(file) else file.with_name(f"{file.name}.gz")


def _read_idx(path: Path, item_shape: tuple[int, ...]) -> np.ndarray:
    """An array (N, *item_shape) of bytes, after big-endian integers: 0x0800 + number of dimensions, N, item_shape."""
    content = _unpacked(path) if path.suffix == ".gz" else read_bytes(path)
    header = struct.Struct(f">{2 + len(item_shape)}I")
    if len(content) < header.size:
        raise corrupt(path, "it is truncated")
    magic, count, *shape = header.unpack_from(content)
    if magic != 0x0801 + len(item_shape) or tuple(shape) != item_shape:
        raise corrupt(path, f"its header is not that of an idx file of {item_shape or 'single'} bytes")
    expected = header.size + count * prod(item_shape)
    if len(content) != expected:
        raise corrupt(path, f"it has {len(content)} bytes and its header promises {expected}: truncated or overlong")
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(count, *item_shape)


def _unpacked(path: Path) -> bytes:
    packed = read_bytes(path)
    most = MOST_EXPANSION * len(packed)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise corrupt(path, f"it is truncated or no gzip file ({error})") from error
    if len(content) > most:
        raise corrupt(path, f"it expands more than {MOST_EXPANSION}-fold, as no such file does")
    return content
