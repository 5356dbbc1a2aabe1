"""Step mode 's': T calls, each of one step, that share one backward pass.

The calls of a window record what its rates need; its last one carries pairs of value and rate through every function
that the forward calls. Functions are told by their order, so every step has to call the same ones. What a call hands
out or leaves behind waits for the graph of the window's last call (deferred.py).
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .deferred import Deferred, Place, Same
from .dynamics import learnable_parameters
from .function import Linearised
from .neurons import Neurons
from .problem import NetworkError
from .rated import rated, tagged
from .rule import Rule, functions
from .session import Setting
from .stand_in import functions_shown, is_looking

# What they put out is made of the shape and type of their operand alone.
_SHAPE_ALONE = {"ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"}
_RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_", "uniform_",
           "exponential_", "poisson", "rrelu", "alpha_dropout", "feature_alpha_dropout", "multinomial"}  # fmt: skip
_MASKS = {"bernoulli", "bernoulli_"}


class Mark(NamedTuple):
    """On each tensor that the forward makes: of which call it is.

    Attributes:
        run: which T calls.
        step: of them, from 1; 0 where it is made of what an earlier step has left behind.
        place: where in the graph its rate is; None where no gradient goes there.
        origin: the function that made it.
        static: whether it is the same at every step.
    """

    run: "Run"
    step: int
    place: Place | None
    origin: str
    static: bool = False


class Run(TorchFunctionMode):
    """T calls of the network, and the mode in which its forward runs in each."""

    def __init__(self, setting: Setting, parameters: list[Tensor], rules: dict[Any, Rule]):
        """``parameters``: the network's that are trained; ``rules``: of functions."""
        super().__init__()
        self.setting, self.rules = setting, rules
        self.steps = setting.time_step // setting.windows  # of a window
        self.step = 0
        self.deferred = Deferred(setting.time_step)
        for p in parameters:
            self.deferred.source(p)
        self.inputs: list[Any] = []  # of the first call
        self.input_sums: list[Any] = []
        self.first_call: list[tuple] = []  # its functions and their arguments that are no tensors
        self.constants: dict[tuple[int, int], Tensor] = {}  # of its functions, the operands that are none of a step
        self.records: dict[int, Any] = {}  # of the window's steps so far, by function
        self.progress: dict[str, Any] = {}  # of each neuron layer
        self.static: dict[int, tuple[Tensor, Any]] = {}  # what such functions have put out and recorded
        self.called: set[int] = set()
        self.ended = self.entered = False

    @property
    def window(self) -> int:
        return (self.step - 1) // self.steps

    @property
    def closing(self) -> bool:
        """Whether this call ends a window."""
        return self.step % self.steps == 0

    @property
    def opening(self) -> bool:
        return (self.step - 1) % self.steps == 0

    # The calls

    def call(self, forward: Callable, args: tuple, kwargs: dict, timeless: list[Any]) -> Any:
        """One step of the network. ``timeless``: those of its arguments that it may fill."""
        self.step += 1
        self.number, self.made = 0, []
        self.called.clear()
        if self.opening:
            self.records, self.input_sums = {}, []
        self._take_inputs(args, kwargs, timeless)
        try:
            with functions_shown(self), self:
                self.entered = True
                out = forward(*args, **kwargs)
        finally:
            self.entered = False
        if self.number < len(self.first_call):
            raise self._differs(f"does not call {self.first_call[self.number][0]} again")
        if self.step == 1:
            self.deferred.begin()
        self.deferred.count_step()
        leaves, structure = tree_flatten(out)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) and any(isinstance(x, Tensor) for x in getattr(leaf, "__dict__", {}).values()):
                raise NetworkError(
                    f"the network returns a {type(leaf).__name__}, whose tensors would get no gradient; return a tensor, "
                    "or a tuple, list or dict of tensors"
                )
        outputs = [self._handed_out(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        del out, leaves
        for reference in self.made:
            if (tensor := reference()) is not None:
                self._expose(tensor)
        self.ended = self.step == self.setting.time_step
        if self.ended:
            self.progress, self.records, self.static, self.constants = {}, {}, {}, {}
        return tree_unflatten(outputs, structure)

    def _take_inputs(self, args: tuple, kwargs: dict, timeless: list[Any]) -> None:
        args = tuple(None if any(x is y for y in timeless) else x for x in args)
        kwargs = {name: x for name, x in kwargs.items() if not any(x is y for y in timeless)}
        leaves, structure = tree_flatten((args, kwargs))
        if self.step == 1:
            self.inputs, self.structure = leaves, structure
        if structure != self.structure:
            raise RuntimeError(
                "the network's arguments are not those of the first step of this window: call it alike at each step, "
                "and functional.reset_net(net) between batches"
            )
        for i, (x, first) in enumerate(zip(leaves, self.inputs, strict=True)):
            if not isinstance(x, Tensor):
                if x != first:
                    raise RuntimeError(
                        f"the network got {first!r} at the first of {self.setting.time_step} steps and now {x!r}: what "
                        "differs from step to step must be a tensor, of which there is a mean"
                    )
                self.input_sums += [None] * self.opening
                continue
            if x.requires_grad and x is not first:
                raise RuntimeError(
                    "step mode 's': an input that needs a gradient must be the same tensor at every step; "
                    "attach the whole network, or use step mode 'm'"
                )
            if x.shape != first.shape:
                raise RuntimeError(
                    f"the network got {list(first.shape)} earlier in this window, now {list(x.shape)}: call "
                    "functional.reset_net(net) between batches"
                )
            self._take_input(i, x, first)

    def _take_input(self, i: int, x: Tensor, first: Tensor) -> None:
        same = x is first and (self.step == 1 or x._version == first._mark_version)
        if self.step == 1:
            first._mark_version = x._version
            self.deferred.source(x)
        wide = x if x.is_floating_point() or x.is_complex() else x.to(torch.get_default_dtype())
        if self.opening:
            self.input_sums.append([wide.detach().clone(), same, x])
        else:
            total = self.input_sums[i]
            total[0], total[1] = total[0] + wide.detach(), total[1] and (same or (not x.is_floating_point() and torch.equal(x, total[2])))
        x._mark = Mark(self, self.step, None, "the input", same and self.setting.static_input)
        if self.closing:
            total, same, _ = self.input_sums[i]
            rate = self.deferred.source(x) if same else (total / self.steps).to(wide.dtype)
            tagged(x, rate, 0, 1)

    def _handed_out(self, y: Tensor) -> Tensor:
        mark = self._mark(y)
        potential = getattr(y, "_potential", None)
        if potential is not None:
            return potential()
        if mark is None or mark.place is None or mark.step != self.step or not y.is_floating_point():
            return y
        self._resolve(mark.place, y)
        return self.deferred.of(mark.place, y)

    def _expose(self, tensor: Tensor) -> None:
        """Gives a value that somebody holds the gradient of its rate."""
        mark = self._mark(tensor)
        if mark and mark.place is not None and mark.step == self.step and tensor.is_floating_point():
            if tensor.grad_fn is None or mark.origin == _RATE:
                self._resolve(mark.place, tensor)
                tag = rated(tensor)
                self.deferred.expose(mark.place, tensor)
                if tag:
                    tagged(tensor, *tag[:3], tag.count)

    def _resolve(self, place: Place, tensor: Tensor) -> None:
        if self._mark(tensor).origin == _RATE:
            self.deferred.resolve(place, Same.apply(tensor))
        elif self.closing:
            self.deferred.resolve(place, rated(tensor).rate)

    # The functions

    def _mark(self, x: Any) -> Mark | None:
        mark = getattr(x, "_mark", None)
        return mark if mark is not None and mark.run is self else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__") or name in _SHAPE_ALONE:
            y = function(*args, **kwargs)
            if name != "__get__" or not isinstance(y, Tensor):
                return y
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        marks = [mark for x in tensors if (mark := self._mark(x))]
        if not marks:
            return self._of_constants(function, name, args, kwargs, leaves)
        if any(mark.origin == _RATE for mark in marks):
            return self._of_rates(function, leaves, structure)
        if any(mark.step != self.step for mark in marks):
            return self._of_earlier_steps(function, args, kwargs, tensors, marks)
        if name in _RANDOM and self.setting.time_step > 1:
            raise self._draws(name)
        return self._of_this_step(function, name, leaves, structure)

    def _of_constants(self, function, name: str, args: tuple, kwargs: dict, leaves: list) -> Any:
        """Of parameters and other tensors that are of no step."""
        y = function(*args, **kwargs)
        if not isinstance(y, Tensor):
            return y
        if name in _MASKS:
            return self._drawn(y)
        if name in _RANDOM and self.setting.time_step > 1:
            y._mark = Mark(self, 0, None, name)
        elif not any(y is x for x in leaves):
            y._recipe = (function, *(getattr(x, "_recipe", id(x)) if isinstance(x, Tensor) else x for x in leaves))
        return y

    def _drawn(self, mask: Tensor) -> Tensor:
        """A mask that is drawn at each step, and whose mean is its rate."""
        number = self._count(("bernoulli", ()))
        with torch.no_grad():
            self._record(number, mask / self.steps, lambda a, b: a + b)
        return self._made(mask, number, 0, self.records[number] if self.closing else None, "bernoulli")

    def _of_rates(self, function, leaves: list, structure: Any) -> Any:
        """What is made of `rated.rate_of` is no more than a part of the graph."""
        leaves = [self.deferred.source(x) if isinstance(x, Tensor) and self.deferred.knows(x) else x for x in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        y = function(*args, **kwargs)
        for i, tensor in enumerate(x for x in tree_flatten(y)[0] if isinstance(x, Tensor)):
            if self._mark(tensor) is None:
                self._mark_rate(tensor, i)
        return y

    def _mark_rate(self, tensor: Tensor, i: int = 0) -> None:
        tensor._mark = Mark(self, self.step, (self.window, "rate", len(self.made), i), _RATE)
        self.made.append(weakref.ref(tensor))

    def rate_of(self, rate: Tensor) -> Tensor:
        """A rate as a user gets it."""
        with _pop_mode_temporarily():
            alias = Same.apply(rate) if rate.requires_grad else rate.detach()
        self._mark_rate(alias)
        return alias

    def _of_earlier_steps(self, function, args: tuple, kwargs: dict, tensors: list[Tensor], marks: list[Mark]) -> Any:
        """Ordinary autograd between what earlier calls have handed out and this one's; no neuron may get it."""
        if torch.is_grad_enabled() and self.step > 1:
            for x in tensors:
                self._expose(x)
        origin = next((mark.origin for mark in marks if mark.step == 0), f"{function.__name__}, which takes what an earlier step left behind,")
        y = function(*args, **kwargs)
        for tensor in tree_flatten(y)[0]:
            if isinstance(tensor, Tensor):
                tensor._mark = Mark(self, 0, None, origin)
        return y

    def _of_this_step(self, function, name: str, leaves: list, structure: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        rule = self._rule(function, args, kwargs)
        if rule is None:
            in_place = _changes(name, function, args, kwargs)
            if in_place and self._mark(args[0]) and self._mark(args[0]).static:
                raise RuntimeError(
                    "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                    "without it"
                )
            given = [_unchanged(x) if self.closing and i == 0 and in_place else None for i, x in enumerate(leaves[:1])]
            rates = self._rates(leaves) if self.closing else None
            with torch.no_grad():
                y = function(*args, **kwargs)
            if not any(isinstance(x, Tensor) for x in tree_flatten(y)[0]):
                return y
            number = self._count((name, tuple(x for x in leaves if not isinstance(x, Tensor))), leaves)
            rate = None
            if self.closing:
                if in_place and self._mark(args[0]) is None:
                    rates[0] = given[0]
                rates = [self._constant(number, i, x) if isinstance(x, Tensor) and x is leaves[i] else x for i, x in enumerate(rates)]
                rate = self._apply_to_rates(function, *tree_unflatten(rates, structure))
            return self._all_made(y, number, rate, name, False)
        return self.module(rule, *args, **kwargs)

    def _apply_to_rates(self, function, args: tuple, kwargs: dict) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NetworkError(
                f"{function.__name__} cannot be given rates, of which one backward pass is made "
                f"({str(error).splitlines()[0]}); use step mode 'm'"
            ) from error

    def module(self, rule: Rule, x: Tensor, *args, **kwargs) -> Any:
        """A function or module that has a rule."""
        leaves, structure = tree_flatten((args, kwargs))
        name = getattr(rule.original, "__name__", type(rule).__name__) if rule.module is None else type(rule.module).__name__
        number = self._count((name, id(rule.module)), [x, *leaves])
        mark, tag = self._mark(x), rated(x)
        static = mark is not None and mark.static
        rule.steps, rule.count = self.steps, None if tag is None else tag.count
        with torch.no_grad():
            if static and number in self.static:
                y, record = self.static[number]
                y = y.data
                rule.again(record, x, *args, **kwargs)
            else:
                y, record = rule.spike(x, *args, **kwargs)
                if static:
                    self.static[number] = y.data, record
            self._record(number, tree_map(torch.clone, record) if static else record, rule.together)
        rate = None
        if self.closing:
            rule.dtype = y.dtype
            leaves = [self._constant(number, i, z) if isinstance(z, Tensor) else z for i, z in enumerate(leaves, 1)]
            args, kwargs = tree_unflatten(leaves, structure)
            rate = rule.rate(tag.rate if tag else self._constant(number, 0, x), self.records[number], *args, **kwargs)
        return self._made(y, number, 0, rate, name, static)

    def _rule(self, function, args: tuple, kwargs: dict) -> Rule | None:
        rule = self.rules.get(function)
        if rule is None or "input" in kwargs or self._mark(args[0]) is None:
            return None
        others = tree_flatten((args[1:], kwargs))[0]
        return rule if not any(self._mark(x) for x in others) and rule.serves(*args, **kwargs) else None

    def _record(self, number: int, record: Any, together: Callable) -> None:
        self.records[number] = together(self.records[number], record) if number in self.records else record

    def _rates(self, leaves: list) -> list:
        """What stands for the operands in the graph."""
        rates = []
        for x in leaves:
            mark = self._mark(x)
            if mark is None:
                rates.append(x)
                continue
            tag = rated(x)
            if tag is None:
                raise NetworkError(f"of what {mark.origin} puts out there is no rate; use step mode 'm'")
            rates.append(tag.rate)
        return rates

    def _constant(self, number: int, i: int, x: Tensor) -> Tensor:
        """What stands in the graph for an operand that is of no step: the first step's."""
        if self._mark(x) or not x.requires_grad:
            return x
        return self.deferred.source(x if self.deferred.knows(x) else self.constants[number, i])

    def _count(self, call: tuple, operands: list | tuple = ()) -> int:
        """The number of this function in the call, from 0."""
        number, self.number = self.number, self.number + 1
        if self.step == 1:
            self.first_call.append(call)
        elif number >= len(self.first_call) or not _same(call, self.first_call[number]):
            before = self.first_call[number][0] if number < len(self.first_call) else "nothing"
            raise self._differs(f"calls {call[0]} with other arguments, where the first step has {before}")
        for i, x in enumerate(operands):
            if isinstance(x, Tensor) and self._mark(x) is None:
                first = self.constants.setdefault((number, i), x)
                if self.step == 1:
                    self.deferred.source(x)
                elif not _same_constant(x, first):
                    raise self._differs(f"gives {call[0]} another tensor that is no argument of the network ({list(x.shape)})")
        return number

    def _differs(self, what: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': at step {self.step} the network's forward {what}. One backward pass serves all steps, so each "
            "has to do the same; leave memory to neurons, or use step mode 'm'"
        )

    def _draws(self, name: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': {name} draws anew at each step what has no mean that could stand for it: use a dropout module or "
            "F.dropout, draw in front of the network, or use step mode 'm'"
        )

    def _all_made(self, y: Any, number: int, rate: Any, name: str, static: bool) -> Any:
        if isinstance(y, (tuple, list)):
            items = [
                self._made(a, number, i, rate[i] if self.closing else None, name, static) if isinstance(a, Tensor) else a
                for i, a in enumerate(y)
            ]
            return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)
        return self._made(y, number, 0, rate, name, static)

    def _made(self, y: Tensor, number: Any, i: int, rate: Tensor | None, name: str, static: bool = False, count: Tensor | None = None) -> Tensor:
        """Marks what a function has made."""
        if y._is_view():
            y = y.data
        place = (self.window, number, i) if torch.is_grad_enabled() else None
        y._mark = Mark(self, self.step, place, name, static)
        self.made.append(weakref.ref(y))
        if isinstance(rate, Tensor) and rate.shape == y.shape:
            tagged(y, rate, 0, 1, count)
            if self.deferred.pending(place):
                self.deferred.resolve(place, rate)
        return y

    # Neurons

    def enter(self, neurons: Neurons, x: Tensor) -> Tensor | None:
        """A neuron layer is about to run on ``x``. Returns the rate of ``x`` in the call that ends a window."""
        neurons.check_call(self, self.called)
        mark = self._mark(x)
        if mark is not None and mark.step != self.step:
            raise neurons.unsupported(
                f"its input is made by {mark.origin} of what is no rate; leave memory to neurons, or use step mode 'm'"
            )
        number = self._count(("neurons", neurons.name), [x])
        if not self.closing:
            return None
        tag = rated(x)
        return tag.rate if tag else self._constant(number, 0, x)

    def put_out(self, neurons: Neurons, spikes: Tensor, rate: Tensor | None, count: Tensor | None) -> Tensor:
        """The spikes of a neuron layer."""
        return self._made(spikes, neurons.name, 0, rate, neurons.name, count=count)

    def reading(
        self, neurons: Neurons, i: int, value: Tensor, slopes: tuple[Tensor | float, ...], sources: list[Tensor] | None
    ) -> Callable[[Tensor], Tensor]:
        """How the neurons' i-th state variable is read after this step, ``value``, with its ``slopes``.

        ``sources``: in the graph, in the call that ends the window.
        """
        step, window = self.step, self.window
        places = [(window, neurons.name, "source", j) for j in range(len(slopes))]
        for place, source in zip(places, sources or (), strict=False):
            self.deferred.resolve(place, source)

        def exactly() -> Tensor:
            """After the call: the state after that step, its input taken for constant over the window's steps."""
            shapes = [value, *(owner._parameters[name] for owner, name in learnable_parameters(neurons.module))]
            shapes += [value] * (len(slopes) - len(shapes))
            of_window = [self.deferred.of(p, x.new_zeros(()).expand(x.shape)) for p, x in zip(places, shapes, strict=True)]
            return Linearised.apply((value,), slopes, *of_window)

        def read(value: Tensor) -> Tensor:
            if not self.entered:
                return exactly()
            with _pop_mode_temporarily():
                if id(neurons) not in self.called:
                    y = exactly() if self.step > step else value
                    y._mark = Mark(self, 0, None, f"{neurons.name}.{neurons.names[i]}, read before the neuron has run,")
                    return y
                number = self._count(("the potential of", neurons.name, i))
                record = (value / self.steps, *(slope / self.steps for slope in slopes))
                self._record(number, record, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)))
                rate = None
                if sources is not None:
                    mean, *mean_slopes = self.records[number]
                    rate = Linearised.apply((mean,), tuple(mean_slopes), *sources)
                y = self._made(value.data, number, 0, rate, neurons.name)
                y._potential = exactly
                return y

        return read


_RATE = "a rate"


def _same(call: tuple, first: tuple) -> bool:
    try:
        return bool(call == first)
    except (RuntimeError, ValueError):
        return False


def _same_constant(x: Tensor, first: Tensor) -> bool:
    if x is first:
        return True
    recipes = getattr(x, "_recipe", None), getattr(first, "_recipe", None)
    if all(recipe is not None for recipe in recipes):
        return _same(*recipes)
    return x.shape == first.shape and x.dtype == first.dtype and torch.equal(x, first)


def _changes(name: str, function, args: tuple, kwargs: dict) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"


def _unchanged(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
