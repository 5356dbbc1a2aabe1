"""A training script, imported for what it does with its data by what looks at its runs: predict.py and the analysis."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data import DATASETS
from ..dataset.files import FileReader
from ..errors import UserError
from .options import TrainOptions
from .setup import LoadedData

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Script:
    options_class: type[TrainOptions]
    load_data: Callable[[Any], LoadedData]


def script_of(config: Any, run: Path, own: str | None) -> Script:
    """The script that made ``run``, of this configuration: by its data set, or the user's ``own``. Raises UserError."""
    name = config.get("dataset") if isinstance(config, dict) else None
    if not own and name not in tuple(DATASETS):
        raise UserError(f"{run} was trained on {name!r}, by a script of your own: name it with --script")
    path = Path(own or ROOT / DATASETS[name].script)
    module = import_script(path)
    classes = [of for of in vars(module).values() if isinstance(of, type) and issubclass(of, TrainOptions)]
    found = [of for of in classes if of.__module__ == module.__name__] or [TrainOptions]
    if len(found) > 1 or not hasattr(module, "load_data"):
        raise UserError(f"{path} is no training script: it has to hold load_data and one class of options")
    return Script(found[0], module.load_data)


def file_reader_of(config: Any, run: Path, own: str | None) -> FileReader:
    """What reads a file for the network of ``run``: of its data set, or the user's ``own`` script. Raises UserError."""
    name = config.get("dataset") if isinstance(config, dict) else None
    if own:
        make = getattr(import_script(Path(own)), "file_reader", None)
        if make is None:
            raise UserError(
                f"{own} has no file_reader(config), which says how to read a file: see doc/guide/architecture.md"
            )
        return make(config)
    reader = DATASETS[name].file_reader(config) if name in tuple(DATASETS) else None
    if reader is None:
        raise UserError(f"{run} was trained on {name!r}, by a script of your own: name it with --script")
    return reader


def import_script(path: Path) -> Any:
    """The module in a file, its ``main`` not run. Raises UserError."""
    name = f"script_{path.resolve().parent.name}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or not path.is_file():
        raise UserError(f"{path} is no Python script: name the one that made the run")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of whatever is in it
        raise UserError(f"{path} cannot be imported ({type(error).__name__}: {error})") from error
    return module
