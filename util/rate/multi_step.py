"""Step mode 'm': the forward runs once, on T steps, and a rate travels with what has one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from . import layers, norms  # noqa: F401  fill the table of rules
from .alike import alike
from .in_place import changed_by
from .neurons import LOOP, Neurons
from .problem import GRAD, NetworkError
from .rated import mean_of_steps, rated, tagged
from .rule import Rule
from .session import Setting
from .stand_in import functions_shown
from .table import KNOWN

_MASKS = (Tensor.bernoulli_, Tensor.bernoulli, torch.bernoulli)
_SCALINGS = (Tensor.div_, Tensor.mul_, Tensor.div, Tensor.mul, torch.div, torch.mul)
_REPETITIONS = (Tensor.expand, Tensor.repeat, Tensor.tile, torch.tile, torch.stack, torch.broadcast_to,
                Tensor.repeat_interleave, torch.repeat_interleave, Tensor.expand_as)  # fmt: skip


_DATA = Tensor.data.__get__
# Behind them a value is no longer the one of which its rate is the mean, or its graph no longer the rate's.
_PARTING = {Tensor.register_hook, Tensor.retain_grad, Tensor.detach_, Tensor.requires_grad_, Tensor.data.__set__,
            Tensor.requires_grad.__set__}  # fmt: skip
_SPECIAL = {*_PARTING, _DATA, torch.autograd.grad}
_KNOWN = KNOWN | {*_MASKS, *_SCALINGS, *_REPETITIONS, *_SPECIAL}


class MultiStep(TorchFunctionMode):
    """While a network's forward runs: functions of values that have a rate put out values with theirs.

    A function that is not known, or not for such arguments, runs as it is: autograd differentiates it over the T steps.
    """

    def __init__(
        self, setting: Setting, rules: dict[Any, Rule], inputs: list[Tensor], with_time: list[Tensor],
        counted: Callable | None,
    ):  # fmt: skip
        """
        Args:
            rules: of functions.
            inputs: the network's.
            with_time: those of them that have time.
            counted: what functions that are differentiated over T steps run in.
        """
        super().__init__()
        self.setting, self.rules, self.inputs, self.with_time = setting, rules, inputs, with_time
        self.known = _KNOWN | rules.keys()
        self.called: set[int] = set()
        self.trained = False  # whether there is a parameter in front of the first neurons
        self.repeats = 1  # see `Rule.repeats`
        self.counted = counted
        self.watches_all = counted is not None  # functions that are not known, too

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, function = kwargs or {}, getattr(function, "stands_for", function)
        if not self.watches_all and function not in self.known:
            return function(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            return function(*args, **kwargs)
        if function in _SPECIAL:
            return self._special(function, args, kwargs)
        if self.watches_all and (of := getattr(changed_by(function, args, kwargs), "_data_of", None)) is not None:
            vars(of).pop("_rated", None)  # changed where autograd does not see it
        if _any_rated(args, kwargs):
            y = self._with_rate(function, args, kwargs)
            if y is not NotImplemented:
                if not self.called and (tag := rated(y)) is not None:
                    self.trained |= tag.rate.requires_grad
                return y
        elif not self.with_time and function in _REPETITIONS:
            return self._repeated(function, args, kwargs)
        with self.counted(function.__name__) if self.counted else nullcontext():
            y = function(*args, **kwargs)
        if function in _MASKS or (function in _SCALINGS and getattr(args[0], "_mask", None) is not None):
            y._mask = y._version  # drawn, not computed: its mean over time stands for it where it is a factor
        return y

    def _special(self, function, args: tuple, kwargs: dict) -> Any:
        if function is torch.autograd.grad:
            raise NetworkError(GRAD)
        if function in _PARTING:
            vars(args[0]).pop("_rated", None)
        y = function(*args, **kwargs)
        if function == _DATA:
            y._data_of, self.watches_all = args[0], True
        return y

    def _with_rate(self, function, args: tuple, kwargs: dict) -> Any:
        """NotImplemented where nothing is known of the function, or not for such arguments."""
        if function in _REPETITIONS and (y := self._of_an_image(function, args, kwargs)) is not None:
            return y
        if rule := self.rules.get(function):
            x, *others = args if args else (kwargs["input"],)
            named = {name: value for name, value in kwargs.items() if name != "input"}
            tag = rated(x)
            if tag and tag.dim == 0 and not _any_rated(others, named) and rule.serves(x, *others, **named):
                rule.repeats = self.repeats
                return rule.all_steps(x, tag, *others, **named)
        return alike(function, args, kwargs)

    def serves(self, rule: Rule, x: Tensor, *args, **kwargs) -> bool:
        """Whether the rule of a module serves such an input; else its forward is ordinary code."""
        return (tag := rated(x)) is not None and tag.dim == 0 and rule.serves(x, *args, **kwargs)

    def module(self, rule: Rule, x: Tensor, *args, **kwargs) -> Any:
        """The forward of a module that has a rule."""
        return rule.all_steps(x, rated(x), *args, **kwargs)

    def enter(self, neurons: Neurons, x: Tensor) -> None:
        """A neuron layer is about to run on ``x``."""
        in_time = (tag := rated(x)) is not None and tag.dim == 0
        if self.trained and not self.called and not in_time and len(x) > 1 and torch.equal(x[:1].expand_as(x), x):
            self._check_repeated()
        neurons.check_call(self, self.called)
        if not self.with_time and len(x) != self.setting.time_step:
            raise NetworkError(
                f"{neurons.name!r} gets {len(x)} time steps where time_step = {self.setting.time_step}: time has to be "
                f"its leading dimension, apart from the batch; {LOOP}"
            )

    def _repeated(self, function, args: tuple, kwargs: dict) -> Any:
        """Where the forward makes its steps of an image: what is repeated is the rate of what comes out."""
        y = function(*args, **kwargs)
        x = args[0][0] if function is torch.stack else args[0]
        if function is torch.stack and any(other is not x for other in args[0]):
            return y
        windows, steps = self.setting.windows, self.setting.time_step
        batch = next((len(i) for i in self.inputs if i.dim()), None)
        for dim in {0, self.setting.time_dim}:
            if not isinstance(y, Tensor) or y.dim() <= dim or y.shape[dim] != steps or steps == 1:
                continue
            without = [*y.shape[:dim], *y.shape[dim + 1 :]]
            one = [*without[:dim], 1, *without[dim:]]
            if x.numel() * steps == y.numel() and list(x.shape) in (without, one) and without[:1] == [batch]:
                rate = x.reshape(one).expand([*without[:dim], windows, *without[dim:]])
                return tagged(y, rate, dim, windows)
        if (
            function in (Tensor.repeat, Tensor.tile)
            and x.shape[:1] == (batch,)
            and y.shape == (steps * batch, *x.shape[1:])
        ):
            return tagged(y, x.repeat(windows, *[1] * (x.dim() - 1)), 0, windows)
        return y

    def _of_an_image(self, function, args: tuple, kwargs: dict) -> Tensor | None:
        """The repetition of an input [B, ...] whose batch has T images, so that it was taken for [T, ...].

        Raises:
            NetworkError: of what has been made of such an input.
        """
        x, steps = args[0][0] if function is torch.stack else args[0], self.setting.time_step
        if self.called or (function is torch.stack and any(y is not x for y in args[0])):
            return None
        if steps == 1 or not isinstance(x, Tensor) or (tag := rated(x)) is None or x.shape[tag.dim] != steps:
            return None
        y = function(*args, **kwargs)
        if y.shape[:1] != (steps,) or y.numel() != steps * x.numel():
            return None
        if any(x.data_ptr() == i.data_ptr() for i in self.inputs):
            return self._repeated(function, args, kwargs)
        self._check_repeated()
        return None

    def _check_repeated(self) -> None:
        """Raises NetworkError where a forward makes the same of all steps of inputs that are not the same."""
        dim = self.setting.time_dim
        if any(not torch.equal(x.narrow(dim, 0, 1).expand_as(x), x) for x in self.with_time):
            raise NetworkError(
                "the network's forward repeats its input, of which the leading dimension was taken for time, as it is "
                "of length T: name the argument in rate_model_setting(..., timeless=[...])"
            )


def _any_rated(args: Any, kwargs: dict) -> bool:
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            if rated(x) is not None:
                return True
        elif isinstance(x, (tuple, list)) and any(isinstance(y, Tensor) and rated(y) is not None for y in x):
            return True
    return False


@contextmanager
def watching(
    setting: Setting, rules: dict[Any, Rule], args: tuple, kwargs: dict, timeless: list[Any], counted: Callable | None
) -> Iterator[MultiStep]:
    """A forward runs on such arguments: those with time have their mean for a rate."""
    without = {id(x) for x in tree_flatten(timeless)[0]}
    inputs = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor) and x.dtype != torch.bool]
    dim, steps = setting.time_dim, setting.time_step
    with_time = [x for x in inputs if id(x) not in without and x.dim() > dim and x.shape[dim] == steps]
    try:
        for x in inputs:
            vars(x).pop("_rated", None)  # of another network, perhaps
        for x in with_time:
            tagged(x, _mean_input(x, setting), dim, setting.windows)
        mode = MultiStep(setting, rules, inputs, with_time, counted)
        with functions_shown(mode), mode:
            yield mode
    finally:
        for x in with_time:
            vars(x).pop("_rated", None)


def _mean_input(x: Tensor, setting: Setting) -> Tensor:
    """The rate of an input."""
    dim, windows = setting.time_dim, setting.windows
    if not x.is_floating_point() and not x.is_complex():
        x = x.to(torch.get_default_dtype())
    if x.stride(dim) == 0:
        return x.narrow(dim, 0, windows)
    return mean_of_steps(x.movedim(dim, 0), setting.time_step // windows, windows).movedim(0, dim).to(x.dtype)
