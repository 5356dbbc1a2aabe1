"""What may be typed for an option: argparse types, which say of a bad value what a good one is."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..data import DATASETS

HUGE = 1e6  # the bound of numbers that have no other; far beyond use, far within float32


SCRIPTS = {name: spec.script for name, spec in DATASETS.items()}  # what trains on a data set


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, open_low: bool = False, open_high: bool = False
) -> Callable[[str], Any]:
    """An argparse type: a finite ``kind`` (int or float) within the bounds, which are included unless open."""

    def parse(text: str) -> Any:
        noun = "a whole number" if kind is int else "a number"
        limits = [f"{'above' if open_low else 'at least'} {_written(low)}"] if low > -math.inf else []
        limits += [f"{'below' if open_high else 'at most'} {_written(high)}"] if high < math.inf else []
        try:
            value = kind(text)
            fits = math.isfinite(value) and (value > low if open_low else value >= low)
            fits = fits and (value < high if open_high else value <= high)
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            point = ": write a point, no comma" if kind is float and re.fullmatch(r"-?\d*,\d*", text) else ""
            must = " ".join([noun, " and ".join(limits)]).strip()
            raise argparse.ArgumentTypeError(f"must be {must}, not {text!r}{point}")
        return value

    parse.placeholder = "N" if kind is int else "X"  # what --help shows for the value
    return parse


def _written(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def number_or_none(text: str) -> float | None:
    """An argparse type: a finite float, or the word none."""
    if text.lower() == "none":
        return None
    try:
        return number(float, -HUGE, HUGE)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace("must be", "must be none or", 1)) from None


def path(text: str) -> str:
    """An argparse type: a path, made absolute so that it means the same from another directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or directory, not ''")
    try:
        absolute = os.path.abspath(os.path.expanduser(text))
        os.lstat(absolute)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # what is looked for there is the script's affair
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"is no usable path: {getattr(error, 'strerror', error)}") from error
    return absolute


def file_name(text: str) -> str:
    """An argparse type: a name for a directory, which is no path and not hidden."""
    if not re.fullmatch(r"[\w+=@,-][\w+=@,.-]*", text):
        raise argparse.ArgumentTypeError(
            f"must be a plain name for a directory, of letters, digits and -_.+=@,, not {text!r}"
        )
    return text


def one_of(names: Sequence[str], **others: str) -> Callable[[str], str]:
    """An argparse type: one of ``names``, whatever its case, or another name of one of them: ``others``."""
    known = {name.lower(): name for name in names} | {other.lower(): name for other, name in others.items()}

    def parse(text: str) -> str:
        if text.lower() in known:
            return known[text.lower()]
        hint = did_you_mean(text, names)
        raise argparse.ArgumentTypeError(f"unknown: {text!r}{hint} (known: {', '.join(names)})")

    return parse


def dataset_name(names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: ``one_of`` the data sets of a script, which tells the script of another one."""
    own = one_of(names)

    def parse(text: str) -> str:
        if text in SCRIPTS and text not in names:
            raise argparse.ArgumentTypeError(f"{text} is of {SCRIPTS[text]} (known here: {', '.join(names)})")
        return own(text)

    return parse


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """A question to put behind a mistyped word, empty where nothing known is like it."""
    by_core = {core_of(name): name for name in known}
    close = difflib.get_close_matches(core_of(typed), by_core, n=1, cutoff=0.7)
    return f", did you mean {by_core[close[0]]}?" if close else ""


def core_of(word: str) -> str:
    """What is compared: what many flags begin with would make any two of them alike."""
    return word.lower().lstrip("-").removeprefix("no-")
