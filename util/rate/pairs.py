"""Step mode 's', what a forward calls: values in every call, pairs of value and rate in the one that ends a window."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten

from .draws import generator_state, same_draws
from .in_place import changed_by
from .leaves import Leaves
from .places import EARLIER, Mark
from .problem import GRAD, NetworkError
from .rated import rated
from .rule import Rule
from .session import Setting
from .table import KNOWN
from .values import Values

# What they put out is made of the shape and type of their operand alone.
_SHAPE_ALONE = {"ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty"}
_MASKS = {"bernoulli", "bernoulli_"}
_CASTS = {"to", "type", "type_as", "int", "long", "short", "char", "byte", "bool"}
_RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "normal_",
           "uniform_", "exponential_", "poisson", "multinomial"}  # fmt: skip
_DROPPING = {F.scaled_dot_product_attention, F.multi_head_attention_forward}  # perhaps


_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__
_UNSEEN = {"register_hook", "retain_grad", "requires_grad_"}


class Pairs(Values):
    """The mode in which a network's forward runs in each of its T calls."""

    def __init__(self, setting: Setting, rules: dict[Any, Rule]):
        """``rules``: of functions."""
        super().__init__(setting)
        self.rules = rules
        self.changed: set[StorageWeakRef] = set()  # the memory that was changed in place in this call
        self.marked: list[Tensor] = []  # in all calls, of what may live on: inputs, buffers
        self.static: dict[int, tuple[Tensor, Any]] = {}  # what was put out and recorded where each step is the same

    def next_step(self) -> None:
        super().next_step()
        self.changed.clear()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, function = kwargs or {}, getattr(function, "stands_for", function)
        name = getattr(function, "__name__", str(function))
        if name in ("__get__", "__set__") or name in _SHAPE_ALONE:
            if function == _SET_DATA and (self.mark(args[0]) or self.deferred.knows(args[0])):
                raise NetworkError(
                    "step mode 's': .data is set inside forward, of which no rate knows; use step mode 'm'"
                )
            y = function(*args, **kwargs)
            if name != "__get__" or not isinstance(y, Tensor):
                return y
        elif function is torch.autograd.grad:
            raise NetworkError(GRAD)
        leaves = Leaves.of(args, kwargs)
        marks = [mark for x in leaves.values if isinstance(x, Tensor) and (mark := self.mark(x))]
        if not marks:
            return self._of_constants(function, name, args, kwargs, leaves.values)
        if torch._C._are_functorch_transforms_active():
            raise NetworkError("step mode 's': torch.func's transforms inside forward see no graph; use step mode 'm'")
        if any(mark.step != self.step for mark in marks):
            return self._of_earlier_steps(function, name, args, kwargs, leaves.values)
        if rule := self._rule(function, args, kwargs, len(marks)):
            return self.by_rule(rule, name, *args, **kwargs)
        return self._of_this_step(function, name, args, kwargs, leaves)

    # What is of no step

    def _of_constants(self, function, name: str, args: tuple, kwargs: dict, leaves: list) -> Any:
        """Of parameters and other tensors that are of no step."""
        y = function(*args, **kwargs)
        if isinstance(y, (tuple, list)):
            for i, x in enumerate(y):
                if isinstance(x, Tensor):
                    x._recipe = (*_recipe(name, leaves), i)
        if not isinstance(y, Tensor):
            return y
        if name in _MASKS:  # its mean stands for it
            place = self.place(name, ())
            self.record(place, y.detach() / self.steps, lambda a, b: b if a is None else a + b)
            return self.put_out(y, (*place, 0), self.records_of(place) if self.closing else None, name, False)
        if name in _RANDOM and self.steps > 1:
            y._mark = Mark(self, EARLIER, (0,), f"{name}, which draws anew at each step")
        elif not any(y is x for x in leaves):
            y._recipe = _recipe(name, leaves)
        return y

    def _of_earlier_steps(self, function, name: str, args: tuple, kwargs: dict, leaves: list) -> Any:
        """Ordinary autograd between what earlier calls have handed out and what this one does. No neuron may get it."""
        if torch.is_grad_enabled() and self.step > 1:
            for x in leaves:
                self.expose(x)
        y = function(*args, **kwargs)
        origins = [m.origin for x in leaves if (m := self.mark(x)) and m.step == EARLIER]
        origin = origins[0] if origins else f"{name}, of what an earlier step left behind"
        for x in tree_flatten(y)[0]:
            if isinstance(x, Tensor):
                x._mark = Mark(self, EARLIER, (0,), origin)
        return y

    # What is of this step

    def _rule(self, function, args: tuple, kwargs: dict, marks: int) -> Rule | None:
        """Of a function of one value of this step."""
        rule = self.rules.get(function)
        if rule is None or marks > 1 or "input" in kwargs or self.mark(args[0]) is None:
            return None
        return rule if rule.serves(*args, **kwargs) else None

    def serves(self, rule: Rule, x: Tensor, *args, **kwargs) -> bool:
        """As `MultiStep.serves`."""
        return rule.serves(x, *args, **kwargs)

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
        place = self.place(name, [x], [x, *others.values])
        mark, tag = self.mark(x), rated(x)
        static = mark is not None and mark.static
        spikes = tag is not None and tag.count is not None and self._is_unchanged(x)
        rule.steps, rule.count = self.steps, tag.count if spikes else None
        number, of_x = place[1], self.in_graph(x) if self.closing else None
        with torch.no_grad():
            if static and number in self.static:
                y, record = self.static[number]
                y = y.data
                rule.again(record, x, *args, **kwargs)
            else:
                y, record = rule.spike(x, *args, **kwargs)
                if static:
                    self.static[number] = y.data, record
            self.record(place, record, rule.together)
        torch.clear_autocast_cache()  # of casts without a graph (torch 2.3)
        rate = None
        if self.closing:
            rule.dtype = y.dtype
            args, kwargs = others.arguments([self.in_graph(z) for z in others.values])
            with self._parameters_in_graph(rule.module):
                rate = rule.rate(of_x, self.records_of(place), *args, **kwargs)
        if y is x:  # changed in place, and with it all that shares its memory
            self.changed.add(StorageWeakRef(x.untyped_storage()))
            rate = of_x.copy_(rate) if self.closing else None
        return self.put_out(y, (*place, 0), rate, name, self.has_graph([x, *others.values]), static)

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
        if name in _UNSEEN:
            raise NetworkError(f"step mode 's': {name} on a value inside forward sees no gradient; use step mode 'm'")
        if kwargs.get("generator") is not None:
            raise self._draws(name)
        changed = changed_by(function, args, kwargs)
        statistics = function is F.instance_norm or function is F.batch_norm  # which change from step to step
        if changed is not None:
            self.check_in_place(name, changed)
            self.marked.append(changed)
        place = self.place(name, leaves.values, leaves.values if statistics else None, target=changed)
        rates = [self.in_graph(x) for x in leaves.values] if self.closing else []
        if self.closing and (statistics or changed is not None or function not in KNOWN):
            rates = [self._kept_apart(x, rate) for x, rate in zip(leaves.values, rates, strict=True)]
        graph = self.has_graph(leaves.values)
        if changed is not None:
            self.changed.add(StorageWeakRef(changed.untyped_storage()))
            graph |= (mark := self.mark(changed)) is not None and mark.graph
        draws = function not in KNOWN or function in _DROPPING
        before = generator_state(leaves.values) if draws else None
        with torch.no_grad():
            y = function(*args, **kwargs)
        drawn = before is not None and not torch.equal(before, generator_state(leaves.values))
        if drawn and (self.steps > 1 or changed is not None):
            raise self._draws(name)
        out = changed if name == "__setitem__" else y
        if changed is None and any(y is x for x in leaves.values):
            return y
        if not isinstance(out, Tensor) and not any(isinstance(x, Tensor) for x in tree_flatten(out)[0]):
            return y
        torch.clear_autocast_cache()
        rate = None
        if self.closing:
            counts = name in _CASTS and isinstance(y, Tensor) and not (y.is_floating_point() or y.is_complex())
            if counts:  # which a rate is no longer
                rate = rates[0].detach()
            else:
                with same_draws(before if drawn else None, leaves.values):
                    rate = self._of_the_rates(function, name, *leaves.arguments(rates))
                rate = rates[0] if name == "__setitem__" else rate
        out = self.put_out_all(out, place, rate, name, graph and name != "detach" and function != _DATA)
        return None if name == "__setitem__" else out

    def _kept_apart(self, x: Any, rate: Any) -> Any:
        """A copy of what is of no step, as of running statistics, which the values' function alone may change."""
        return x.clone() if isinstance(x, Tensor) and not x.requires_grad and not self.mark(x) else rate

    def _of_the_rates(self, function, name: str, args: tuple, kwargs: dict) -> Any:
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise NetworkError(
                f"{name} cannot be given rates, of which one backward pass is made ({str(error).splitlines()[0]}); use "
                "step mode 'm'"
            ) from error

    def _draws(self, name: str) -> NetworkError:
        return NetworkError(
            f"step mode 's': {name} draws anew at each step what has no mean that could stand for it: use a dropout "
            "module or F.dropout, draw in front of the network, or use step mode 'm'"
        )


def _recipe(name: str, leaves: list) -> tuple:
    """How something of no step was made: of the same by the same it is the same at each step."""
    return name, *(getattr(x, "_recipe", id(x)) if isinstance(x, Tensor) else repr(x) for x in leaves)
