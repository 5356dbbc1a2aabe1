"""From a checkpoint and a file to class probabilities, through the network and the test transform of its run."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import MODELS

from ..dataset.files import visible
from ..errors import UserError
from . import checkpoint
from .method import Bptt
from .options import OF_THIS_START, TrainOptions, upgraded, valid_config
from .own_script import file_reader_of
from .setup import choose_device, new_network
from .weights import load_weights


class Predictor:
    """A trained network, ready to name what is in a file.

        predictor = Predictor("log/RUN")
        for name, probability in predictor.top("cat.jpg", 3):
            print(f"{name}: {probability:.1%}")

    Attributes:
        net: the network, in evaluation mode, without hooks of rate-based backpropagation.
        classes: the name of each output.
        extensions: of the files that `read` takes.

    Raises:
        UserError: there is no checkpoint at ``run``, or none of a script that is known.
    """

    def __init__(self, run: str | os.PathLike, device: str | None = None, script: str | None = None) -> None:
        """Args:
        run: a checkpoint, or a run directory, whose best weights are taken.
        script: of your own, which made the run and whose ``file_reader(config)`` says how to read a file.
        """
        path = checkpoint.best_of(os.fspath(run))
        saved = checkpoint.load(path, "the checkpoint")
        options = _options(saved["config"], path)
        reader = file_reader_of(saved["config"], path, script)
        self.extensions, self._read = reader.extensions, reader.read
        self.classes = _class_names(saved, path)
        self.device = choose_device(device)
        self.net = new_network(options, len(self.classes), reader.channels)
        load_weights(self.net, saved["model"], path)
        self.net.to(self.device).eval()
        self._method = Bptt(options.T, options.step_mode)
        self._method.attach(self.net)

    def read(self, path: str | os.PathLike) -> Tensor:
        """What the network is to see of a file: an image [C, H, W], or the frames [T, 2, H, W] of a recording.

        An image of another size is resized so that its shorter side fits, and cropped in the centre.

        Raises:
            UserError: it cannot be read as such.
        """
        return self._read(Path(path))

    @torch.no_grad()
    def probabilities(self, inputs: Sequence[Tensor]) -> Tensor:
        """N inputs as `read` returns them -> [N, classes]: the softmax of the output's mean over the T steps."""
        return self._method.forward(self.net, torch.stack(list(inputs)).to(self.device)).softmax(1).cpu()

    def top(self, path: str | os.PathLike, count: int = 5) -> list[tuple[str, float]]:
        """The ``count`` most probable classes of a file, by name, with their probabilities. Raises UserError."""
        return self.ranked(self.probabilities([self.read(path)])[0], count)

    def ranked(self, probabilities: Tensor, count: int) -> list[tuple[str, float]]:
        """The same of a row [classes] of `probabilities`."""
        values, labels = probabilities.topk(min(count, len(self.classes)))
        return [(self.classes[label], value) for label, value in zip(labels.tolist(), values.tolist(), strict=True)]

    def files(self, paths: Sequence[str | os.PathLike]) -> Iterator[Path]:
        """The files named, and for a folder all below it that `read` takes, sorted. Raises UserError."""
        for path in map(Path, paths):
            if not path.exists():
                raise UserError(f"{path} is not there: name a file, or a folder of them")
            if not path.is_dir():
                yield path
                continue
            files = (file for file in path.rglob("*") if file.suffix.lower() in self.extensions)
            found = sorted(visible(files, path))
            if not found:
                raise UserError(f"{path} holds no file that can be read (of {', '.join(self.extensions)})")
            yield from found


def _options(config: Any, path: Path) -> TrainOptions:
    """What the network was built with."""
    defaults = {f.name: f.default for f in fields(TrainOptions) if f.name not in OF_THIS_START}
    config = upgraded(config)
    if not valid_config(TrainOptions, config) or config.get("arch") not in MODELS:
        raise UserError(f"{path} holds no configuration of the scripts in experiment/: it cannot be used here")
    return TrainOptions(**{name: config.get(name, default) for name, default in defaults.items()})


def _class_names(saved: dict[str, Any], path: Path) -> list[str]:
    """The names in the checkpoint; of one that was made before they were kept, numbers."""
    names = saved.get("classes")
    if names is None:
        with contextlib.suppress(Exception):  # of weights that are none
            *_, last = saved["model"].values()  # a network ends in its classifier
            names = [str(label) for label in range(len(last))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is damaged: its class names are no list of words")
    return names
