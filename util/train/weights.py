"""Weights of a network, of this project's checkpoints and of other code's files."""

import logging
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from . import checkpoint

logger = logging.getLogger(__name__)

HOLDERS = ("model", "state_dict", "net", "model_state_dict")  # what weights are called in files that hold several
# What DataParallel and DDP, torch.compile, FSDP and activation checkpointing put into the names, wherever they wrap.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def start_from(net: nn.Module, path: Path) -> None:
    """Gives ``net`` the weights in ``path``, but for a ``classifier`` of other sizes, which stays new; that is said.

    The file: a checkpoint of this project, a safetensors file, or what torch.save made of a ``state_dict``, also within
    a dictionary, and also of a network that was wrapped, or a part of something larger, as Lightning's ``model.``.

    Raises:
        UserError: there is no such file, or its weights are not of a network like ``net``.
    """
    own = net.state_dict()
    with checkpoint.intact_named(path, "--weights"):
        weights, left_out = _of_the_network(_state_dict(_content(path), path), own)
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{path} holds weights that are not finite: use others")
    others = sorted(
        name
        for name, value in weights.items()
        if name.startswith("classifier.") and name in own and value.shape != own[name].shape
    )
    load_weights(net, {**weights, **{name: own[name] for name in others}}, path)
    said = f", but for {', '.join(f'{name} of shape {list(weights[name].shape)}' for name in others)}: left new"
    beside = f"; not of this network: {_some(left_out)}" if left_out else ""
    logger.info(f"starting from the weights in {path}{said if others else ''}{beside}")


def load_weights(net: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raises UserError where the weights, read from ``path``, are not those of ``net``."""
    own, given = net.state_dict().keys(), weights.keys() if isinstance(weights, dict) else set()
    lacking, unknown = ([name for name in a if name not in b] for a, b in ((own, given), (given, own)))
    differ = (("it lacks", lacking), ("it has instead" if lacking else "the network lacks", unknown))
    reason = "; ".join(f"{words} {_some(names)}" for words, names in differ if names)
    try:
        if not reason:
            net.load_state_dict(weights)
            return
    except Exception as error:  # whatever a structure leads to that no network wrote
        # torch lists what does not fit line by line, after a line that only says so
        reason = textwrap.shorten(next(iter(str(error).splitlines()[1:]), str(error)), 240, placeholder=" ...")
    raise UserError(f"the weights in {path} do not fit the network: {reason}")


def _some(names: Iterable[Any]) -> str:
    """The first three."""
    names = [textwrap.shorten(str(name), 60, placeholder="...") for name in names]
    return ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


def _content(path: Path) -> Any:
    """Raises UserError where the file cannot be read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return checkpoint.read(path, own=False)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # of its own kinds
        raise UserError(f"{path} is no safetensors file, or a damaged one ({error})") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Of what a file holds: itself, or what it holds under one of `HOLDERS`. Raises UserError."""
    if isinstance(content, dict):
        content = next((content[name] for name in HOLDERS if isinstance(content.get(name), dict)), content)
    if isinstance(content, dict) and content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(name): value for name, value in content.items()}
    holds = f", and holds {_some(content)}" if isinstance(content, dict) and content else ""
    raise UserError(
        f"{path} holds no weights: it is neither a checkpoint nor a state_dict, alone or as "
        f"{' or '.join(map(repr, HOLDERS))}{holds}"
    )


def _of_the_network(weights: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights by the names of ``own``, as far as these differ by a prefix and by wrappers alone.

    And the names of what stood beside the network: where something is taken off all of its names, the others.
    """
    wrappers = set(WRAPPERS) - {part for name in own for part in name.split(".")}
    bare = {name: ".".join(part for part in name.split(".") if part not in wrappers) for name in weights}
    names, first = set(bare.values()), next(iter(own))
    starts = {name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")}
    whole = [start for start in starts if all(start + name in names for name in own)]
    if len(whole) == 1:
        bare = {name: short.removeprefix(whole[0]) for name, short in bare.items()}
    beside = [name for name, short in bare.items() if name == short]
    if not own.keys() <= {short for name, short in bare.items() if name != short}:
        beside = []
    return {short: weights[name] for name, short in bare.items() if name not in beside}, beside
