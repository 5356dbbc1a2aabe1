"""What a network's forward does between its modules that depends on the number of time steps, or on chance.

The rate pass runs the same forward on one step in place of T. Torch's function mode shows what modules do not: an image
repeated T times, a sum over time, dropout by function. Only networks in which the first forward met such a call run
with the mode on.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .draws import Mask, drawing_from, mean_mask, random_state
from .probe import sample
from .session import Session

_REPEAT = {
    *(Tensor.repeat, Tensor.tile, Tensor.repeat_interleave, torch.tile, torch.repeat_interleave),
    *(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to),
}
_VIEW = {Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to}
_INTERLEAVE = {Tensor.repeat_interleave, torch.repeat_interleave}
_JOIN = {torch.stack, torch.cat, torch.concat, torch.concatenate}
_REDUCE = {Tensor.sum: "sum", torch.sum: "sum", Tensor.mean: "mean", torch.mean: "mean"}
_CHOOSE = {
    **dict.fromkeys(
        (Tensor.max, torch.max, Tensor.min, torch.min, Tensor.amax, torch.amax, Tensor.amin, torch.amin), 1
    ),
    **dict.fromkeys((Tensor.median, torch.median, Tensor.nanmedian, torch.nanmedian, Tensor.mode, torch.mode), 1),
    **dict.fromkeys((Tensor.sort, torch.sort, Tensor.logsumexp, torch.logsumexp, Tensor.prod, torch.prod), 1),
    **dict.fromkeys((Tensor.topk, torch.topk, Tensor.kthvalue, torch.kthvalue, Tensor.quantile, torch.quantile), 2),
}  # where the dimension stands among the arguments
_MASK = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout}
_DRAW = {
    *(Tensor.bernoulli_, Tensor.bernoulli, torch.bernoulli, Tensor.uniform_, Tensor.normal_, Tensor.exponential_),
    *(Tensor.random_, Tensor.geometric_, Tensor.cauchy_, Tensor.log_normal_, Tensor.multinomial),
    *(torch.rand, torch.randn, torch.randint, torch.randperm, torch.rand_like, torch.randn_like, torch.randint_like),
    *(torch.normal, torch.poisson, torch.multinomial, torch.rrelu, F.rrelu, F.gumbel_softmax),
    *(F.alpha_dropout, F.feature_alpha_dropout, F.scaled_dot_product_attention, F.multi_head_attention_forward),
}
_BERNOULLI = {Tensor.bernoulli_, Tensor.bernoulli, torch.bernoulli}
_SOME_STATE = torch.Generator().get_state()

Arrange = Callable[[Tensor, int], Tensor]  # a tensor of T steps, the dimension that is time -> the steps of a trial


class InlineError(Exception):
    """What the forward does that the rate pass cannot repeat, in words that go on after the network's name."""


class DrawError(InlineError):
    """Random numbers that the rate pass cannot repeat."""

    def __init__(self, function: str):
        super().__init__(
            f"its forward calls {function}, which draws other numbers at every step, of which there is no mean: use a "
            "dropout module, F.dropout or Tensor.bernoulli_, or draw in front of the network"
        )


class Inline(TorchFunctionMode):
    """Shows what the forward of one network, for one kind of input, calls; see `__torch_function__`.

    Attributes:
        repeated: of each call that may repeat, by its number, whether it repeats something T times.
        may_shorten: what it repeats may be time, of which the rate pass has one step.
        makes_steps: its input has no time; the steps are made by such a repetition.
        draws: it draws random numbers.
        sums: it sums over time, and the rate pass has to count its only step T times.
        steps_known_apart: nobody needs to try out whether one step knows of another.
        arrange: while a network that makes its steps is tried out, what they are.
    """

    def __init__(self, session: Session, input_dim: int = 0):
        super().__init__()
        self.session, self.time_step = session, session.setting.time_step
        self.input_dim = input_dim
        self.makes_steps = self.draws = self.sums = self.steps_known_apart = False
        self.repeated: dict[int, bool] = {}
        self.may_shorten = session.setting.step_mode == "m"
        self.arrange: Arrange | None = None
        self.short = False  # whether the pass is one of a single step
        self.shapes: dict[tuple[str, int], torch.Size] = {}  # what calls of the last pass over T steps got

    def needed(self, phase: str) -> bool:
        shortens = self.may_shorten and any(self.repeated.values())
        return phase == "probe" or self.draws or self.sums or (shortens and phase == "rate")

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        if function in _REPEAT or function in _JOIN:
            return self._repeat(function, args, kwargs)
        if function in _REDUCE:
            return self._reduce(function, args, kwargs)
        if function in _CHOOSE and self.session.phase == "probe":
            self._check_choice(function, args, kwargs)
        if function in _MASK:
            return self._mask(function, args, kwargs)
        if function in _DRAW:
            return self._draw(function, args, kwargs)
        return function(*args, **kwargs)

    def summed_over_time(self) -> bool:
        """Whether a sum of the last pass over T steps may have been over them."""
        return any(kind == "sum" and self.time_step in shape for (kind, _), shape in self.shapes.items())

    def _shape_of_long_pass(self, kind: str, shape: torch.Size) -> torch.Size | None:
        """What the same call got in the pass over T steps; None in that pass itself."""
        key = kind, self._count(kind)
        if self.short:
            return self.shapes.get(key, shape)
        self.shapes[key] = shape
        return None

    def _repeat(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        source = self._source(function, args, kwargs)
        if self.session.phase == "spike" or source is None or not self.may_shorten:
            return function(*args, **kwargs)
        number = self._count("repeat")
        with torch.no_grad():
            y = function(*args, **kwargs)
        dim = self._time_dim(function, source, y)
        if not self.short:
            self.repeated[number] = dim is not None
        if dim is None or not self.repeated.get(number):
            return function(*args, **kwargs) if torch.is_grad_enabled() else y
        if self.arrange is not None:
            if y.shape[dim] == self.time_step:
                return self.arrange(y, dim)
            return self.arrange(y.unflatten(dim, (self.time_step, -1)), dim).flatten(dim, dim + 1)
        if self.short:
            x = source.reshape([size // self.time_step if d == dim else size for d, size in enumerate(y.shape)])
            return x if function in _VIEW else x.clone()  # the network may work in place on it
        return y

    @staticmethod
    def _source(function: Callable, args: tuple, kwargs: dict) -> Tensor | None:
        """What is repeated; None where different tensors are joined."""
        first = args[0] if args else next(iter(kwargs.values()))
        if function not in _JOIN:
            return first
        source, *others = first
        return source if all(x is source or _same_memory(x, source) for x in others) else None

    def _time_dim(self, function: Callable, source: Tensor, y: Tensor) -> int | None:
        """The dimension of ``y`` in which ``source`` stands T times, block after block."""
        of, got, steps = source.shape, y.shape, self.time_step
        if not of or got.numel() != of.numel() * steps:
            return None
        if got[0] == steps and got[1:] == of:
            return 0
        if len(got) > 1 and got[1] == steps and (got[:1] + got[2:]) == of and len(got) > self.input_dim:
            return 1
        if len(got) == len(of):
            blocks = function not in _INTERLEAVE or of[0] == 1
            if blocks and got[0] == steps * of[0] and got[1:] == of[1:]:
                return 0
            if len(of) > self.input_dim and of[1] == 1 and got[1] == steps and got[:1] + got[2:] == of[:1] + of[2:]:
                return 1
        return None

    def _reduce(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        y = function(*args, **kwargs)
        x, dims = _reduced(args, kwargs, 1)
        kind = _REDUCE[function]
        number = self.session.calls[self, kind]
        over_time = self._over_time(kind, x, dims)
        if self.session.phase == "probe":
            for d in over_time:
                self.session.probed[f"{kind} {number} over {d}"] = sample(x.movedim(d, 0), True)
        return y * self.time_step if self.sums and self.short and kind == "sum" and over_time else y

    def _over_time(self, kind: str, x: Tensor, dims: list[int]) -> list[int]:
        """Those of a call's dimensions that are T long, and in a pass of a single step 1."""
        long = self._shape_of_long_pass(kind, x.shape)
        if long is None:
            return [d for d in dims if x.shape[d] == self.time_step]
        alike = len(long) == x.dim()
        return [d for d in dims if alike and long[d] == self.time_step and x.shape == (*long[:d], 1, *long[d + 1 :])]

    def _check_choice(self, function: Callable, args: tuple, kwargs: dict) -> None:
        x, dims = _reduced(args, kwargs, _CHOOSE[function])
        named = args[_CHOOSE[function]] if len(args) > _CHOOSE[function] else kwargs.get("dim")
        if named is None or isinstance(named, Tensor):
            return  # of all values: a scale, or something to look at; or of two tensors
        over_time = self._over_time("choice", x, dims)
        if over_time and self.short and self.time_step > 1:
            raise InlineError(
                f"its forward takes {function.__name__} over time, whose gradient is not that of a mean: let it return "
                "all steps, their mean or their sum"
            )

    def _mask(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        x, *rest = args or (kwargs["input"],)
        options = {name: value for name, value in kwargs.items() if name not in ("input", "inplace")}
        in_place = kwargs.get("inplace", len(rest) > 2 and rest[2])

        def out_of_place(x: Tensor) -> Tensor:
            return function(x, *rest[:2], **options)

        if self.session.phase == "probe":
            self._draws(lambda: out_of_place(x), x.device)
            return x if in_place else x.clone()
        if not self.draws:
            return function(*args, **kwargs)
        if self.session.phase == "spike":
            mask = Mask.before(out_of_place, x)
            y = function(*args, **kwargs)
            self._drew("mask", x, mask, mask.state)
            return y
        masks, shape = self._drawn("mask")
        if not masks:
            return function(*args, **kwargs)
        if x.shape == shape and len(masks) == 1:
            mask = masks[0].again()
        else:
            mask = mean_mask(masks, self.session.setting.steps_per_call)
        if mask.shape != x.shape:
            raise DrawError(function.__name__)
        return x.mul_(mask) if in_place else x * mask

    def _draw(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if kwargs.get("generator") is not None:
            raise DrawError(f"{function.__name__} with a generator of its own")
        device = next((x.device for x in args if isinstance(x, Tensor)), torch.get_default_device())
        device = torch.device(kwargs.get("device") or device)

        def call() -> Any:
            return function(*args, **kwargs)

        if self.session.phase == "probe":
            y, drawn = self._draws(call, device)
            if not drawn:
                return y
            if _is_mask(function, args, kwargs):
                return y.fill_(1)
            shape = _shape(y)
            if self._shape_of_long_pass("draw", shape) not in (None, shape):
                raise DrawError(function.__name__)
            return y
        if not self.draws:
            return call()
        if self.session.phase == "spike":
            before = random_state(device)
            y = call()
            self._drew("draw", y, before, before)
            return y
        states, shape = self._drawn("draw")
        if not states:
            return call()
        with drawing_from(states[0], device):
            y = call()
        if _shape(y) == shape and (len(states) == 1 or self.session.setting.step_mode == "m"):
            return y
        if not _is_mask(function, args, kwargs):
            raise DrawError(function.__name__)
        like = args[0].detach().new_empty(shape)
        masks = [Mask(lambda x: function(x, *args[1:], **kwargs), state, like, device) for state in states]
        mean = mean_mask(masks, self.session.setting.steps_per_call)
        if mean.shape != y.shape:
            raise DrawError(function.__name__)
        return y.copy_(mean)

    def _draws(self, call: Callable[[], Any], device: torch.device) -> tuple[Any, bool]:
        """What a call returns, in each pass the same, and whether it drew random numbers."""
        with drawing_from(_SOME_STATE if device.type == "cpu" else random_state(device), device):
            before = random_state(device)
            y = call()
            drawn = not torch.equal(before, random_state(device))
        self.draws |= drawn
        return y, drawn

    def _drew(self, kind: str, x: Any, draw: Any, before: Tensor) -> None:
        """Records a call in the spike pass, and its ``draw`` if it has drawn."""
        device = x.device if isinstance(x, Tensor) else x[0].device
        record = self.session.window.records[self, kind].of(self._count(kind), _shape(x), f"{kind} in the forward")
        if not torch.equal(before, random_state(device)):
            record.value = [*(record.value or []), draw]

    def _drawn(self, kind: str) -> tuple[list, torch.Size]:
        """The draws of the same call in the spike pass, one for each step in step mode 's', and their shape there."""
        record = self.session.window.records[self, kind].take(self._count(kind), f"{kind} in the forward")
        return record.value or [], record.input_shape

    def _count(self, kind: str) -> int:
        self.session.calls[self, kind] += 1
        return self.session.calls[self, kind] - 1


def _reduced(args: tuple, kwargs: dict, place: int) -> tuple[Tensor, list[int]]:
    """What a reduction gets, and its dimensions, of which the argument at ``place`` tells."""
    x = args[0] if args else kwargs["input"]
    dims = args[place] if len(args) > place else kwargs.get("dim", kwargs.get("axis"))
    if dims is None or isinstance(dims, Tensor) or dims == ():
        return x, list(range(x.dim()))
    dims = [dims] if isinstance(dims, int) else dims
    return x, [d % x.dim() for d in dims] if x.dim() else []


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _shape(y: Any) -> torch.Size:
    return y.shape if isinstance(y, Tensor) else y[0].shape


def _is_mask(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether it is a Bernoulli draw with one probability for all values, of which there is a mean."""
    p = args[1] if len(args) > 1 else kwargs.get("p", 0.5 if function is Tensor.bernoulli_ else None)
    return function in _BERNOULLI and isinstance(p, float | int) and args[0].is_floating_point()
