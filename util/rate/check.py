"""Does rate-based backpropagation do right by a network, what does it cost, and how near is it to BPTT?"""

import copy
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .attach import bptt_model_setting, detach, rate_model_setting
from .hooks import Hooks
from .problem import NetworkError, NotServedError
from .saved import saved_for_backward

_TOLERANCE = 1e-6  # relative, in float64
_EXPLODED = 100  # times BPTT's norm; a plain network of IF neurons, the poorest in doc/guide/attach.md, has 19
_THRESHOLDS = (1, 0.3, 0.1, 0.03)  # of the neurons' own: at T = 1 the deep layers of many networks are silent
_WINDOWS = (1, 2, 4)


def check_network(net: nn.Module, x: Tensor, step_mode: str = "m", *, time_dim: int = 0) -> bool:
    """Prints whether ``net`` can be trained with rate-based backpropagation, and returns it.

    It can if every module is served, if at T = 1, where the method is exact, every gradient equals BPTT's, and if at
    T = len(x) the output does and the gradients' norm is at most 100 times BPTT's. Also printed are functions that keep
    all T steps, and for K = 1, 2 and 4 windows what is kept for backward and how near the gradients come to BPTT's: a
    property of the method on this network, these weights and this batch, and no part of the verdict.

    Works on copies in float64 (at T = 1 with lower thresholds, where else layers would be silent): of ``net`` itself
    nothing changes but that its neurons are reset.

    Args:
        net: a SpikingJelly network, attached or not.
        x: a small batch, time first, [T, B, ...] in both step modes.
        step_mode, time_dim: as in `rate_model_setting`; ``x`` has time at ``time_dim``.

    Raises:
        Exception: whatever ``net`` itself raises, out of memory say, or given an ``x`` that it cannot take.
    """
    steps, name = x.shape[time_dim], type(net).__name__
    print(f"rate-based backpropagation on {name}, step mode {step_mode!r}, T = {steps}")
    try:
        windows = [k for k in _WINDOWS if steps % k == 0]
        many, *others = [_Comparison(net, x, step_mode, time_dim, windows=k) for k in windows]
        for threshold in _THRESHOLDS:
            one = _Comparison(net, _loudest_step(x, time_dim), step_mode, time_dim, threshold=threshold)
            if not one.silent():
                break
    except NotServedError as error:
        print(f"  {error}\nverdict: not served")
        return False
    if silent := one.silent():
        print(f"  no gradient comes to {', '.join(silent)} at T = 1, where no neuron is near its threshold")
        print("verdict: not known; try other weights or another x")
        return False
    lowered = f", thresholds lowered to {threshold:g} of theirs" if threshold < 1 else ""
    (worst, most), (steepest, ratio) = one.largest_difference(), many.largest_ratio()
    right = {
        f"gradients at T = 1: largest relative difference {most:.1e} ({worst}){lowered}": most < _TOLERANCE,
        f"output at T = {steps}: largest relative difference {many.output:.1e}": many.output < _TOLERANCE,
    }
    if many.agreement()[1] > _EXPLODED:
        right[
            f"gradients at T = {steps} explode, most of all that of {steepest}, {ratio:.1e} times BPTT's: behind it "
            "something is steep between the values of spikes, or normalises what is silent at one step"
        ] = False
    for text, fine in right.items():
        print(f"  {'ok   ' if fine else 'WRONG'} {text}")
    for (module, function), size in (many.costs - one.costs).most_common():
        print(f"  costs T here: {function} in {module}, {_mib(size)}: its T steps are kept and differentiated")
    print(f"  kept for backward by BPTT: {_mib(many.kept_by_bptt)}; with K windows of rates, gradients at T = {steps}:")
    for k, comparison in zip(windows, (many, *others), strict=True):
        cosine, ratio = comparison.agreement()
        print(f"    K = {k}: {_mib(comparison.kept)}, cosine {cosine:.3f} to BPTT's, norm {ratio:.2f} times BPTT's")
    print("verdict:", "served" if all(right.values()) else "do not train this network with rate-based backpropagation")
    return all(right.values())


def compare_gradients(
    net: nn.Module, x: Tensor, y: Tensor, step_mode: str = "m", *, time_dim: int = 0, windows: int = 1
) -> dict[str, tuple[float, float]]:
    """Rate-based gradients of the cross-entropy beside BPTT's, both in float64, on copies of ``net``.

    Args:
        x: [T, B, ...] (time at ``time_dim``).
        y: [B], labels.
        windows: of rates, as in `rate_model_setting`.

    Returns:
        For each parameter with a gradient that is not 0 but for rounding, the cosine of the two and the norm of the
        rate-based one over BPTT's; under "" those of all parameters together.
    """
    comparison = _Comparison(net, x, step_mode, time_dim, y, windows=windows)
    names = [name for name, grad in comparison.bptt.items() if grad.norm() > comparison.floor]
    return {name: comparison.agreement([name]) for name in names} | {"": comparison.agreement()}


class _Comparison:
    """One step of both methods on the same weights, batch and random numbers."""

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        step_mode: str,
        time_dim: int,
        y: Tensor | None = None,
        threshold: float = 1,
        windows: int = 1,
    ):
        functional.reset_net(net)
        net = detach(_copied(net)).double()
        net.zero_grad(set_to_none=True)
        for module in net.modules():
            if threshold != 1 and isinstance(getattr(module, "v_threshold", None), float):
                module.v_threshold *= threshold
        self.costs: Counter[tuple[str, str]] = Counter()  # bytes that functions keep by themselves
        self.kept, rated, self.rate = self._run(_copied(net), x, step_mode, time_dim, y, windows)
        self.kept_by_bptt, expected, self.bptt = self._run(net, x, step_mode, time_dim, y, None)
        for grads in (self.rate, self.bptt):
            for name, p in net.named_parameters():
                if name in self.rate or name in self.bptt:
                    grads.setdefault(name, torch.zeros_like(p))
        self.output = max((a - b).norm() / b.norm().clamp_min(1e-300) for a, b in zip(rated, expected, strict=True))
        # What is 0 but for rounding, as of a bias in front of a BatchNorm, is held against the largest gradient.
        self.floor = 1e-5 * max(grad.norm() for grad in self.bptt.values())

    def _run(
        self, net: nn.Module, x: Tensor, step_mode: str, time_dim: int, y: Tensor | None, windows: int | None
    ) -> tuple:
        """One step of training; ``windows``: None for BPTT."""
        x = x.double() if x.is_floating_point() else x
        time_step = x.shape[time_dim]
        with ExitStack() as stack:
            stack.enter_context(_in_float64())
            if windows is None:
                bptt_model_setting(net, time_step, step_mode)
            else:
                rate_model_setting(net, time_step, step_mode, time_dim=time_dim, windows=windows)
                stack.enter_context(_counting_costs(net, self.costs))
            count = stack.enter_context(saved_for_backward(net))
            out = net(x) if step_mode == "m" else [net(step) for step in x.unbind(time_dim)]
            kept = count()
            values = [value for value in tree_flatten(out)[0] if isinstance(value, Tensor) and value.requires_grad]
            if not values:
                raise NetworkError(f"no output of {type(net).__name__} depends on a parameter that is being trained")
            if y is None:
                loss = sum((value * _weights(value, time_step)).sum() for value in values)
            else:
                mean = sum(out) / time_step if step_mode == "s" else out.mean(0) if out.dim() == 3 else out
                loss = nn.functional.cross_entropy(mean, y)
            loss.backward()
        grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        return kept, [value.detach() for value in values], grads

    def silent(self) -> list[str]:
        """The weights to which no gradient comes, and about which the comparison says nothing."""
        return [name for name, grad in self.bptt.items() if grad.dim() > 1 and not grad.any()]

    def largest_difference(self) -> tuple[str, float]:
        """The parameter whose gradients differ most, and by how much, relative to BPTT's."""
        return self._largest({name: self.rate[name] - grad for name, grad in self.bptt.items()})

    def largest_ratio(self) -> tuple[str, float]:
        """The parameter whose rate-based gradient is the largest beside BPTT's, and how many times that."""
        return self._largest(self.rate)

    def _largest(self, grads: dict[str, Tensor]) -> tuple[str, float]:
        sizes = {n: (grads[n].norm() / self.bptt[n].norm().clamp_min(self.floor)).item() for n in self.bptt}
        return max(sizes.items(), key=lambda item: item[1])

    def agreement(self, names: Iterable[str] = ()) -> tuple[float, float]:
        """Cosine, and norm of the rate-based gradient over BPTT's, of some parameters or of all."""
        rate, bptt = (torch.cat([grads[n].flatten() for n in names or self.bptt]) for grads in (self.rate, self.bptt))
        return (rate @ bptt / (rate.norm() * bptt.norm())).item(), (rate.norm() / bptt.norm()).item()


def _copied(net: nn.Module) -> nn.Module:
    """A copy, also where modules hold what is computed from parameters, as pruned and weight-normed ones do."""
    try:
        return copy.deepcopy(net)
    except RuntimeError:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)


@contextmanager
def _counting_costs(net: nn.Module, costs: Counter[tuple[str, str]]) -> Iterator[None]:
    """Adds to ``costs`` what functions without a rate keep for backward, by module and function."""
    names = [type(net).__name__]
    hooks = []
    for name, module in net.named_modules():
        if module is not net:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: names.append(repr(name))))
            hooks.append(module.register_forward_hook(lambda *_: names.pop() and None))

    @contextmanager
    def counted(function: str) -> Iterator[None]:
        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                costs[names[-1], function] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    Hooks.of(net).counted = counted
    try:
        yield
    finally:
        Hooks.of(net).counted = None
        for hook in hooks:
            hook.remove()


@contextmanager
def _in_float64() -> Iterator[None]:
    """Also for what the network's forward makes; and with the same random numbers each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
    except RuntimeError as error:
        if not re.search("(?i)float.*double|double.*float", str(error)):
            raise
        hint = "the check runs in float64, and the forward makes float32 of its own: use x.dtype there"
        raise RuntimeError(f"{error} ({hint})") from error
    finally:
        torch.set_default_dtype(before)


def _weights(value: Tensor, time_step: int) -> Tensor:
    """Other weights for every element, but the same at every step of [T, B, ...]: of a loss of the mean over time."""
    shape = value.shape[1:] if value.shape[:1] == (time_step,) else value.shape
    return torch.linspace(-1, 1.5, shape.numel(), dtype=value.dtype, device=value.device).view(shape)


def _loudest_step(x: Tensor, time_dim: int) -> Tensor:
    """The step with the largest norm, of [T, B, ...] as [1, B, ...]: an event recording may begin with a blank one."""
    sizes = x.movedim(time_dim, 0).reshape(x.shape[time_dim], -1).double().norm(dim=1)
    return x.narrow(time_dim, int(sizes.argmax()), 1)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
