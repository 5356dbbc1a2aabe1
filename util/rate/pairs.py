"""Step mode 's', the functions that a forward calls: values in every call, pairs of value and rate in a window's last.

What a function makes is told by how it was made: by which function, of what (`Mark.place`). Each step has to make it
alike; a step that does otherwise is refused where that would matter.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._pytree import tree_flatten

from .alike import KNOWN, changed_by
from .deferred import Deferred
from .leaves import Leaves
from .problem import GRAD, NetworkError
from .rated import rated, tagged
from .rule import Rule
from .session import Setting

# What they put out is made of the shape and type of their operand alone.
_SHAPE_ALONE = {"ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"}
_MASKS = {"bernoulli", "bernoulli_"}
_CASTS = {"to", "type", "type_as", "int", "long", "short", "char", "byte", "bool"}
_RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_",
           "uniform_", "exponential_", "poisson", "multinomial"}  # fmt: skip
_DROPPING = {F.scaled_dot_product_attention, F.multi_head_attention_forward}  # perhaps
_EARLIER = 0  # in place of a step

Place = tuple[Any, ...]


class Mark(NamedTuple):
    """On each tensor that a forward makes.

    Attributes:
        run: of which T calls it is.
        step: of which of them, from 1; `_EARLIER` where it is made of what an earlier one has left behind.
        place: how it was made, window included; of its rate in the graph.
        origin: the function that made it.
        graph: whether a gradient goes there.
        static: whether it is the same at every step.
    """

    run: "Pairs"
    step: int
    place: Place
    origin: str
    graph: bool = False
    static: bool = False


class Pairs(TorchFunctionMode):
    """The mode in which a network's forward runs in each of its T calls."""

    def __init__(self, setting: Setting, rules: dict[Any, Rule]):
        """``rules``: of functions."""
        super().__init__()
        self.setting, self.rules = setting, rules
        self.steps = setting.time_step // setting.windows  # of a window
        self.step = 0
        self.deferred = Deferred(setting.time_step)
        self.made: list[weakref.ref] = []  # in this call
        self.occurrences: Counter[tuple] = Counter()  # in this call, of functions on the same operands
        self.numbers: dict[tuple, int] = {}  # of the ways in which something was made
        self.constants: dict[tuple, tuple[Tensor, int]] = {}  # operands that are of no step, at the first
        self.changed: set[StorageWeakRef] = set()  # the memory that was changed in place in this call
        self.records: dict[Place, Any] = {}  # of the window's steps so far
        self.recorded: Counter[Place] = Counter()  # of how many
        self.static: dict[int, tuple[Tensor, Any]] = {}  # what was put out and recorded where each step is the same

    @property
    def window(self) -> int:
        return (self.step - 1) // self.steps

    @property
    def opening(self) -> bool:
        """Whether this call begins a window."""
        return (self.step - 1) % self.steps == 0

    @property
    def closing(self) -> bool:
        """Whether this call ends a window."""
        return self.step % self.steps == 0

    def mark(self, x: Any) -> Mark | None:
        mark = getattr(x, "_mark", None)
        return mark if mark is not None and mark.run is self else None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, function = kwargs or {}, getattr(function, "stands_for", function)
        if function is torch.autograd.grad:
            raise NetworkError(GRAD)
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__") or name in _SHAPE_ALONE:
            y = function(*args, **kwargs)
            if name != "__get__" or not isinstance(y, Tensor):
                return y
        leaves = Leaves.of(args, kwargs)
        marks = [mark for x in leaves.values if isinstance(x, Tensor) and (mark := self.mark(x))]
        if marks and torch._C._are_functorch_transforms_active():
            raise NetworkError("step mode 's': torch.func's transforms inside forward see no graph; use step mode 'm'")
        if not marks:
            return self._of_constants(function, name, args, kwargs, leaves.values)
        if any(mark.step != self.step for mark in marks):
            return self._of_earlier_steps(function, name, args, kwargs, leaves.values)
        if rule := self._rule(function, args, kwargs):
            return self.by_rule(rule, name, *args, **kwargs)
        return self._of_this_step(function, name, args, kwargs, leaves)

    # What is of no step

    def _of_constants(self, function, name: str, args: tuple, kwargs: dict, leaves: list) -> Any:
        """Of parameters and other tensors that are of no step."""
        y = function(*args, **kwargs)
        if not isinstance(y, Tensor):
            return y
        if name in _MASKS:  # its mean stands for it
            place = self._place(name, ())
            self._record(place, y.detach() / self.steps, lambda a, b: b if a is None else a + b)
            return self._put_out(y, (*place, 0), self._records_of(place) if self.closing else None, name, False)
        if name in _RANDOM and self.steps > 1:
            y._mark = Mark(self, _EARLIER, (0,), f"{name}, which draws anew at each step")
        elif not any(y is x for x in leaves):
            y._recipe = (name, *(getattr(x, "_recipe", id(x)) if isinstance(x, Tensor) else repr(x) for x in leaves))
        return y

    def _of_earlier_steps(self, function, name: str, args: tuple, kwargs: dict, leaves: list) -> Any:
        """Ordinary autograd between what earlier calls have handed out and what this one does. No neuron may get it."""
        if torch.is_grad_enabled() and self.step > 1:
            for x in leaves:
                self.expose(x)
        y = function(*args, **kwargs)
        origins = [m.origin for x in leaves if (m := self.mark(x)) and m.step == _EARLIER]
        origin = origins[0] if origins else f"{name}, of what an earlier step left behind"
        for x in tree_flatten(y)[0]:
            if isinstance(x, Tensor):
                x._mark = Mark(self, _EARLIER, (0,), origin)
        return y

    # What is of this step

    def _rule(self, function, args: tuple, kwargs: dict) -> Rule | None:
        rule = self.rules.get(function)
        if rule is None or "input" in kwargs or self.mark(args[0]) is None:
            return None
        others = Leaves.of(args[1:], kwargs).values
        return rule if not any(self.mark(x) for x in others) and rule.serves(*args, **kwargs) else None

    def module(self, rule: Rule, x: Tensor, *args, **kwargs) -> Tensor:
        """The forward of a module that has a rule."""
        name = type(rule.module).__name__
        self.check_input(name, x)
        return self.by_rule(rule, name, x, *args, **kwargs)

    def check_input(self, name: str, x: Tensor) -> None:
        """Raises NetworkError where what has a rule gets what has no rate."""
        mark = self.mark(x)
        if mark is not None and mark.step != self.step:
            raise NetworkError(
                f"step mode 's': the input of {name!r} depends on what earlier steps left ({mark.origin}), of "
                "which there is no rate; leave memory to neurons, or use step mode 'm'"
            )

    def by_rule(self, rule: Rule, name: str, x: Tensor, *args, **kwargs) -> Tensor:
        """A function or module that has a rule."""
        others = Leaves.of(args, kwargs)
        place = self._place(name, [x], [x, *others.values])
        mark, tag = self.mark(x), rated(x)
        static = mark is not None and mark.static
        spikes = tag is not None and tag.count is not None and self._is_unchanged(x)
        rule.steps, rule.count = self.steps, tag.count if spikes else None
        number, of_x = place[1], self._in_graph(x) if self.closing else None
        with torch.no_grad():
            if static and number in self.static:
                y, record = self.static[number]
                y = y.data
                rule.again(record, x, *args, **kwargs)
            else:
                y, record = rule.spike(x, *args, **kwargs)
                if static:
                    self.static[number] = y.data, record
            self._record(place, record, rule.together)
        torch.clear_autocast_cache()  # of casts without a graph (torch 2.3)
        rate = None
        if self.closing:
            rule.dtype = y.dtype
            args, kwargs = others.arguments([self._in_graph(z) for z in others.values])
            with self._parameters_in_graph(rule.module):
                rate = rule.rate(of_x, self._records_of(place), *args, **kwargs)
            if y is x:  # changed in place, and with it all that shares its memory
                rate = of_x.copy_(rate)
        if y is x:
            self.changed.add(StorageWeakRef(x.untyped_storage()))
        graph = self._has_graph([x, *others.values])
        return self._put_out(y, (*place, 0), rate, name, graph, static)

    def _is_unchanged(self, x: Tensor) -> bool:
        """Whether nothing has changed its memory in place in this call."""
        return not self.changed or StorageWeakRef(x.untyped_storage()) not in self.changed

    @contextmanager
    def _parameters_in_graph(self, module: torch.nn.Module | None) -> Iterator[None]:
        """The parameters of a module that has a rule replaced by what stands for them."""
        owners = [(m._parameters, n, p) for m in module.modules() for n, p in m._parameters.items()] if module else []
        try:
            for parameters, name, p in owners:
                parameters[name] = p if p is None else self.deferred.source(p)
            yield
        finally:
            for parameters, name, p in owners:
                parameters[name] = p

    def _of_this_step(self, function, name: str, args: tuple, kwargs: dict, leaves: Leaves) -> Any:
        if name in ("register_hook", "retain_grad"):
            raise NetworkError(f"step mode 's': {name} on a value inside forward sees no gradient; use step mode 'm'")
        changed = changed_by(function, args, kwargs)
        in_place = changed is not None
        if in_place and self.mark(changed) is None and (changed._is_view() or isinstance(changed, torch.nn.Parameter)):
            raise NetworkError(
                f"step mode 's': {name} writes into a part of a tensor that is of no step; use step mode 'm'"
            )
        if in_place and self.mark(changed) and self.mark(changed).origin == "__get__":
            raise NetworkError(
                f"step mode 's': {name} changes the .data of a tensor, of which no rate knows; use step mode 'm'"
            )
        if changed is not None and (mark := self.mark(changed)) and mark.static:
            raise RuntimeError(
                "static_input: an input, or what the network's first layers put out, was changed in place; attach "
                "without it"
            )
        statistics = function is F.instance_norm or function is F.batch_norm  # which change from step to step
        place = self._place(name, leaves.values, leaves.values if statistics else None, target=changed)
        rates = [self._in_graph(x) for x in leaves.values] if self.closing else []
        if self.closing and changed is not None and self.mark(changed) is None:
            rates[0] = changed.detach().clone()  # what is of no step is changed once
        if self.closing and function is F.instance_norm:  # so are running statistics
            rates = [
                None if x is not leaves.values[0] and i in (1, 2) else r
                for i, (x, r) in enumerate(zip(leaves.values, rates, strict=True))
            ]
        graph = self._has_graph(leaves.values)
        draws = function not in KNOWN or function in _DROPPING
        if in_place:
            self.changed.add(StorageWeakRef(changed.untyped_storage()))
            graph |= (mark := self.mark(changed)) is not None and mark.graph
        before = _generator_state(leaves.values) if draws else None
        with torch.no_grad():
            y = function(*args, **kwargs)
        drawn = before is not None and not torch.equal(before, _generator_state(leaves.values))
        if drawn and (self.steps > 1 or in_place):
            raise self._draws(name)
        if changed is None and any(y is x for x in leaves.values):
            return y
        if (
            name != "__setitem__"
            and not isinstance(y, Tensor)
            and not any(isinstance(x, Tensor) for x in tree_flatten(y)[0])
        ):
            return y
        torch.clear_autocast_cache()
        if self.closing and name in _CASTS and isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex()):
            rate = rates[0].detach()  # of what is counted, which a rate is no longer
        elif drawn:  # the same draws
            after = _generator_state(leaves.values)
            _set_generator_state(before, leaves.values)
            rate = self._of_the_rates(function, name, *leaves.arguments(rates))
            _set_generator_state(after, leaves.values)
        else:
            rate = self._of_the_rates(function, name, *leaves.arguments(rates)) if self.closing else None
        if name == "__setitem__":
            self._put_out(changed, (*place, 0), rates[0] if self.closing else None, name, graph)
            return None
        return self._put_out_all(y, place, rate, name, graph and name != "detach")

    def _of_the_rates(self, function, name: str, args: tuple, kwargs: dict) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NetworkError(
                f"{name} cannot be given rates, of which one backward pass is made ({str(error).splitlines()[0]}); use "
                "step mode 'm'"
            ) from error

    def _in_graph(self, x: Any) -> Any:
        """What stands for an operand in the graph: its rate, or of what is of no step a copy, lest hooks run twice."""
        if not isinstance(x, Tensor):
            return x
        mark, tag = self.mark(x), rated(x)
        if tag is not None and mark is not None:
            return tag.rate
        if mark is not None:
            raise NetworkError(f"of what {mark.origin} puts out there is no rate; use step mode 'm'")
        if x.requires_grad and not self.deferred.knows(x):
            x, _ = self.constants.get(getattr(x, "_first", None), (x, 0))
            if self.step > 1 and not self.deferred.knows(x):
                raise self.differs(f"uses a tensor of shape {list(x.shape)} that needs a gradient and was not there")
        return self.deferred.source(x)

    def _has_graph(self, operands: list) -> bool:
        tensors = [x for x in operands if isinstance(x, Tensor)]
        return torch.is_grad_enabled() and any(m.graph if (m := self.mark(x)) else x.requires_grad for x in tensors)

    # How something was made

    def _place(self, name: str, operands: Any, tensors: Any = None, target: Tensor | None = None) -> Place:
        """Of what the function makes of its ``operands``.

        ``tensors``, by default those, may be of no step; the ``target`` it changes in place.
        """
        marks = ((x, self.mark(x)) for x in operands)
        of = tuple(mark.place[1:] if mark else self._identity(x) for x, mark in marks)
        if tensors is not None:
            of += tuple(self._identity(x) for x in tensors if isinstance(x, Tensor) and not self.mark(x))
        number = self.occurrences[name, of]
        self.occurrences[name, of] += 1
        place = (self.window, self.numbers.setdefault((name, of, number), len(self.numbers)))
        for i, x in enumerate(operands if tensors is None else tensors):
            if (
                isinstance(x, Tensor)
                and self.mark(x) is None
                and x is not target
                and (tensors is None or x.requires_grad)
            ):
                self._check_constant(name, (place[1], i), x)
        return place

    def _identity(self, x: Any) -> Any:
        """Of an operand that is of no step: of parameters, which they are."""
        if not isinstance(x, Tensor):
            return repr(x)
        return id(x) if isinstance(x, torch.nn.Parameter) else None

    def _check_constant(self, name: str, at: tuple, x: Tensor) -> None:
        """Raises NetworkError where an operand that is of no step is not the first step's."""
        first, version = self.constants.setdefault(at, (x, x._version))
        if self.step == 1:
            self.deferred.source(x)
        if not (x._version == version if x is first else _same(x, first)):
            raise self.differs(f"gives {name} another tensor of shape {list(x.shape)}, which is none of its arguments")
        if x is not first and x.requires_grad:
            x._first = at

    def differs(self, what: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': at step {self.step} the network's forward {what}, unlike at the first step. One "
            "backward pass serves all steps, so each has to do the same; leave memory to neurons, or use step mode 'm'"
        )

    def _draws(self, name: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': {name} draws anew at each step what has no mean that could stand for it: use a dropout "
            "module or F.dropout, draw in front of the network, or use step mode 'm'"
        )

    def _record(self, place: Place, record: Any, together: Callable) -> None:
        self.records[place] = together(self.records.get(place), record)
        self.recorded[place] += 1

    def _records_of(self, place: Place) -> Any:
        if self.recorded[place] != self.steps:
            raise self.differs(f"calls {self._name_of(place)} on something else")
        return self.records[place]

    def _put_out_all(self, y: Any, place: Place, rate: Any, name: str, graph: bool) -> Any:
        if not isinstance(y, (Tensor, tuple, list)):
            return y
        if isinstance(y, Tensor):
            return self._put_out(y, (*place, 0), rate, name, graph)
        rates = rate if self.closing else [None] * len(y)
        items = [
            self._put_out(a, (*place, i), b, name, graph) if isinstance(a, Tensor) else a
            for i, (a, b) in enumerate(zip(y, rates, strict=True))
        ]
        return type(y)(*items) if hasattr(y, "_fields") else type(y)(items)

    def _put_out(
        self,
        y: Tensor,
        place: Place,
        rate: Tensor | None,
        name: str,
        graph: bool,
        static: bool = False,
        count: Any = None,
    ) -> Tensor:
        """Marks what a function has made, and gives it its rate."""
        y = y.data if y._is_view() else y
        y._mark = Mark(self, self.step, place, name, graph and (y.is_floating_point() or y.is_complex()), static)
        self.made.append(weakref.ref(y))
        if isinstance(rate, Tensor) and rate.shape == y.shape:
            tagged(y, rate, 0, 1, count)
            if self.deferred.pending(place):
                self.deferred.resolve(place, rate)
        return y

    # What is handed out

    def handed_out(self, y: Tensor) -> Tensor:
        """An output of the network, with the gradient of its rate."""
        mark = self.mark(y)
        if exactly := getattr(y, "_exactly", None):
            return exactly()
        if mark is None or not mark.graph or mark.step == _EARLIER:
            return y
        self._resolve(mark, y)
        return self.deferred.of(mark.place, y)

    def _check_handed_out(self) -> None:
        """Raises NetworkError where something was handed out in this window of which its last call makes no rate."""
        if self.closing:
            for place in self.deferred.unresolved(self.window):
                raise self.differs(f"does not make again what an earlier step handed out ({self._name_of(place)})")

    def _name_of(self, place: Place) -> str:
        return next((key[0] for key, number in self.numbers.items() if number == place[1]), str(place[1]))

    def expose(self, x: Any) -> None:
        """Gives a value of this call that somebody holds the gradient of its rate."""
        mark = self.mark(x)
        if mark is None or not mark.graph or mark.step != self.step or x.grad_fn is not None:
            return
        tag = rated(x)
        self._resolve(mark, x)
        self.deferred.expose(mark.place, x)
        if tag:
            tagged(x, *tag[:3], tag.count)

    def _resolve(self, mark: Mark, x: Tensor) -> None:
        if self.closing and (tag := rated(x)):
            self.deferred.resolve(mark.place, tag.rate)

    def rate_of(self, rate: Tensor) -> Tensor:
        """A rate as a user gets it: what is made of it is no part of the window's graph."""
        self.deferred.begin()
        place = (self.window, "rate_of", len(self.made))
        self.deferred.resolve(place, rate)
        with _pop_mode_temporarily():
            alias = self.deferred.of(place, rate.detach())
        self.made.append(weakref.ref(alias))
        return alias


def _generator_state(operands: list) -> Tensor:
    """Of the generator that functions of such operands draw from."""
    on_gpu = next((x.device for x in operands if isinstance(x, Tensor) and x.is_cuda), None)
    if on_gpu is None or torch.cuda.is_current_stream_capturing():
        return torch.get_rng_state()
    return torch.cuda.get_rng_state(on_gpu)


def _set_generator_state(state: Tensor, operands: list) -> None:
    on_gpu = next((x.device for x in operands if isinstance(x, Tensor) and x.is_cuda), None)
    if on_gpu is None or torch.cuda.is_current_stream_capturing():
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, on_gpu)


def _same(x: Tensor, first: Tensor) -> bool:
    if x is first:
        return True
    recipes = getattr(x, "_recipe", None), getattr(first, "_recipe", None)
    if x.requires_grad and all(recipe is not None for recipe in recipes) and recipes[0] != recipes[1]:
        return False
    return x.shape == first.shape and x.dtype == first.dtype and torch.equal(x, first)
