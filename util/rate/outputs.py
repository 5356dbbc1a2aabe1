"""What a network hands out, in its output and in what its forward leaves behind: the values of the spike pass, with the
gradients of the rate pass. At once where both passes are over, and otherwise when the rate pass comes.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .deferred import DeferredGradients
from .filled import Filled, Place
from .function import SpikeValue, Unreadable
from .neuron_rule import NeuronRule
from .problem import PassError
from .rule import Rule
from .step_calls import is_float

Left = dict[Place, Tensor]  # what a forward has left behind


class Outputs:
    def __init__(
        self, time_step: int, parameters: list[nn.Parameter], rules: list[Rule], modules: dict[str, nn.Module]
    ):
        """
        Args:
            parameters: the network's, in whose backward an error is raised.
            modules: by name, those whose attributes the forward may set.
        """
        self.time_step, self.parameters, self.rules, self.modules = time_step, parameters, rules, modules

    # Both passes are over

    def joined(self, spiked: Any, rated: Any) -> Any:
        """The spike pass's output, with the gradients of the rate pass's."""
        outputs = [self._with_gradient(a, b) if isinstance(a, Tensor) else a for a, b in _paired(spiked, rated)]
        return tree_unflatten(outputs, tree_flatten(spiked)[1])

    def left_joined(self, left: Left, rates: Left) -> Left:
        """What a forward has left behind in the spike pass, with the gradients of the same in the rate pass."""
        shared = _in_both(left, rates)
        return {
            place: self._folded_with_gradient(value, rates[place])
            if place in shared and self._fits(value, rates[place])
            else self._without_gradient(place, value)
            for place, value in left.items()
        }

    def _with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """``value`` [B, ...] or [T, B, ...], with the gradient of ``rate`` [B, ...] or [1, B, ...]."""
        if not rate.requires_grad:
            return value
        self._check_shapes(value, rate)
        return SpikeValue.apply(rate, (value,))

    def _folded_with_gradient(self, value: Tensor, rate: Tensor) -> Tensor:
        """As `_with_gradient`, also for ``value`` [T * B, ...] and ``rate`` [B, ...]."""
        if value.shape == rate.shape or len(rate) == 1:
            return self._with_gradient(value, rate)
        steps = value.unflatten(0, (self.time_step, len(rate)))
        return self._with_gradient(steps, rate.unsqueeze(0)).flatten(0, 1)

    def _without_gradient(self, place: Place, value: Tensor) -> Tensor:
        """``value``, whose backward raises."""
        error = PassError(
            f"no gradient of {place[0]}: the network's forward does not leave the same there for one step as for "
            f"{self.time_step}; let it treat time as the leading dimension, return it, or train with BPTT"
        )
        return Unreadable.apply(error, (value,), *self.parameters)

    # The rate pass is still to come

    def deferred(self, spiked: Any, gradients: DeferredGradients) -> Any:
        """The spike pass's output, with the ``gradients`` that the rate pass is going to have."""
        leaves, structure = tree_flatten(spiked)
        outputs = [self._deferred_output(i, y, gradients) if is_float(y) else y for i, y in enumerate(leaves)]
        return tree_unflatten(outputs, structure)

    def _deferred_output(self, i: int, y: Tensor, gradients: DeferredGradients) -> Tensor:
        for rule in self.rules:
            for name, value in rule.module.named_memories() if isinstance(rule, NeuronRule) else ():
                if value is y:
                    return getattr(rule.module, name)
        return gradients.of(_output(i), y.clone())

    def left_deferred(self, left: Left, gradients: DeferredGradients) -> Left:
        """What a forward has left behind in the spike pass, as `deferred`."""
        return {place: gradients.of(_behind(place), x) for place, x in left.items()}

    def resolve(self, gradients: DeferredGradients, spiked: Any, rated: Any, left: Left, rates: Left) -> None:
        """Gives what was `deferred` the gradients of the rate pass, and takes from modules those that it has not."""
        for i, (value, rate) in enumerate(_paired(spiked, rated)):
            if is_float(value):
                self._check_shapes(value, rate)
                gradients.resolve(_output(i), rate)
        for place in _in_both(left, rates):
            if self._fits(left[place], rates[place]):
                gradients.resolve(_behind(place), rates[place])
        constant = {_behind(place) for place, rate in rates.items() if not rate.requires_grad}
        of_modules = Filled(((), {}), self.modules)
        of_modules.map(lambda x: x.detach() if DeferredGradients.place_of(x) in constant else x)
        gradients.resolved()

    # Shapes

    def _fits(self, value: Tensor, rate: Tensor) -> bool:
        """Whether ``value`` is [T * B, ...] or [T, B, ...] to the other's [B, ...] or [1, B, ...]; or the same."""
        if value.shape == rate.shape:
            return True
        return bool(rate.dim()) and value.shape == (self.time_step * len(rate), *rate.shape[1:])

    def _check_shapes(self, value: Tensor, rate: Tensor) -> None:
        if value.shape != rate.shape and value.shape != (self.time_step, *rate.shape[1:]):
            raise PassError(
                f"the network's output is {list(value.shape)} in the spike pass and {list(rate.shape)} in the rate "
                "pass: it does not treat its leading dimension as time"
            )


def _output(i: int) -> tuple[str, int]:
    return "the network", i


def _behind(place: Place) -> tuple[str, int, str]:
    return (*place, "left")


def _paired(first: Any, second: Any) -> list[tuple[Any, Any]]:
    """The values at the same places of the two passes' outputs."""
    one, other = tree_flatten(first)[0], tree_flatten(second)[0]
    if len(one) != len(other):
        raise PassError(f"the network puts out {len(one)} values in the spike pass and {len(other)} in the rate pass")
    return list(zip(one, other, strict=True))


def _in_both(left: Left, rates: Left) -> set[Place]:
    """The places in which both passes have left something; of what holds more in one of them, none."""
    differ = {holder for holder, _ in left.keys() ^ rates.keys()}
    return {place for place in left.keys() & rates.keys() if place[0] not in differ}
