"""Reading pickled arrays without trusting the file: of what it names nothing is called, neither code nor numpy's own.

What it makes is bounded by its size: `ArrayUnpickler`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np


class _Pickled:
    """Stands for an array or a dtype while a file is unpickled, and only remembers what it was to be made of.

    numpy's own constructors are no safer than code: np.ndarray makes objects of any bytes, at any address.
    """

    __match_args__ = ("args",)

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that a pickled array asks for, by the names of older and newer releases of numpy; protocol 5 uses _frombuffer.
_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): None,  # an argument of _reconstruct, not to be called
    ("numpy", "dtype"): _Pickled,
    ("numpy.core.multiarray", "_reconstruct"): _Pickled,
    ("numpy._core.multiarray", "_reconstruct"): _Pickled,
    ("numpy.core.numeric", "_frombuffer"): _Pickled,
    ("numpy._core.numeric", "_frombuffer"): _Pickled,
}


def uint8_array(pickled: Any) -> np.ndarray:
    """The array of bytes that a _Pickled stands for; ValueError when it stands for anything else."""
    match (pickled.state or pickled.args) if isinstance(pickled, _Pickled) else None:
        case (int(), shape, _Pickled(("u1", *_)), fortran, raw):  # what ndarray.__setstate__ takes
            order = "F" if fortran else "C"
        case (raw, _Pickled(("u1", *_)), shape, order):  # what _frombuffer takes
            pass
        case _:
            raise ValueError("no array of bytes")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote bytes as text
    return np.frombuffer(raw, np.uint8).reshape(shape, order=order)


class ForeignGlobalError(Exception):
    """A pickle asks for something that no array is made of."""


class ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and builtin containers; a plain unpickler would run whatever code a file names.

    Raises:
        ForeignGlobalError: the file names anything else.
        ValueError: it is no whole pickle, or would take memory out of proportion to its size.
    """

    def __init__(self, content: bytes) -> None:
        _check_opcodes(content)
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._text_left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._latin1
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise ForeignGlobalError(f"{module}.{name}") from None

    def _latin1(self, text: str, encoding: str) -> bytes:
        """Stands for codecs.encode, by which protocols 0 to 2 write bytes; other codecs may take for ever."""
        self._text_left -= len(text)
        if encoding != "latin1" or self._text_left < 0:
            raise ValueError("text that no array is written as")
        return text.encode("latin1")


def _check_opcodes(content: bytes) -> None:
    """Raises ValueError for a memo index beyond the file's length, up to which unpickling would make room."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(content):
            raise ValueError(f"memo index {argument}")
