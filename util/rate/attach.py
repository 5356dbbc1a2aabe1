"""Rate-based backpropagation for a SpikingJelly network: put the hooks on, and take them off.

    rate_model_setting(net, time_step=4, step_mode="m")     # your training loop stays as it is
    ...
    bptt_model_setting(net, time_step=4, step_mode="m")     # back to backpropagation through time

Method: Yu et al., "Advancing Training Efficiency of Deep Spiking Neural Networks through Rate-based Backpropagation",
NeurIPS 2024.
"""

from collections.abc import Collection, Iterator
from numbers import Integral

from spikingjelly.activation_based import functional
from torch import nn

from .hooks import Hooks
from .neurons import Neurons
from .problem import UnsupportedModuleError
from .session import Setting

__all__ = ["UnsupportedModuleError", "bptt_model_setting", "detach", "rate_model_setting"]


def rate_model_setting(
    net: nn.Module,
    time_step: int,
    step_mode: str = "m",
    *,
    time_dim: int = 0,
    compiled: bool = False,
    static_input: bool = False,
    timeless: Collection[str] = (),
    windows: int = 1,
) -> nn.Module:
    """Makes ``net`` train with rate-based backpropagation, in place; parameters and state_dict stay what they are.

    With gradients enabled a forward runs the T steps as ever and records one backward pass through time-averaged
    rates; what it does that is no operation on rates is differentiated over the T steps. Without gradients the network
    runs as ever. Attaching again replaces the earlier setting.

    Args:
        net: a network of SpikingJelly neurons.
        time_step: T, the number of steps of a forward ('m') or calls of a window ('s').
        step_mode: 'm', net takes [T, B, ...]; 's', net is called T times with [B, ...], and
            ``functional.reset_net(net)`` stands between batches.
        time_dim: the dimension of the network's inputs that is time, in mode 'm'; 1 where they are [B, T, ...] and the
            forward transposes them.
        compiled: run all steps of a neuron layer, and BatchNorm, in fewer passes over memory, by torch.compile.
        static_input: where the input is the same at every step (an image), compute what stands in front of the first
            neurons once. Hand over ``image.expand(T, *image.shape)`` in mode 'm' (with ``time_dim`` 0), the same tensor
            in each of the T calls in mode 's'. The network must not work in place on it or on what its first layers
            put out.
        timeless: the names of those of the forward's arguments that have no time dimension: a condition, a diffusion
            step, where T images in a batch could be taken for T steps. In mode 's' none need be named.
        windows: K, into how many windows of T / K steps time is cut, each with a rate of its own. 1 is the published
            method, T is BPTT; between them gradients come nearer to BPTT's, for more memory.

    Returns:
        ``net``.

    Raises:
        TypeError: ``net`` is no module.
        ValueError: ``time_step``, ``step_mode``, ``windows`` or ``timeless`` out of range, a net without spiking
            neurons, or part of a network that has the hooks on.
        UnsupportedModuleError: modules that are refused, all of them; the net is left as it was.
    """
    _check(net, time_step, step_mode)
    if not isinstance(windows, Integral) or isinstance(windows, bool) or windows < 1 or time_step % windows:
        raise ValueError(f"windows must be a whole number that divides time_step = {time_step}, not {windows!r}")
    setting = Setting(int(time_step), step_mode, time_dim, compiled, static_input, tuple(timeless), int(windows))
    Hooks.check(net, setting)
    _detach_whole(net)
    for name, _ in _foreign(net):
        raise ValueError(f"{name!r} is part of a network with hooks of its own: detach that network first")
    Hooks(net, setting)
    return net


def bptt_model_setting(net: nn.Module, time_step: int, step_mode: str = "m") -> nn.Module:
    """Makes ``net`` train with BPTT, in place: takes hooks off and sets the step mode. Returns ``net``."""
    _check(net, time_step, step_mode)
    detach(net)
    functional.set_step_mode(net, step_mode)
    return net


def detach(net: nn.Module) -> nn.Module:
    """Takes off the hooks of ``net`` and of its submodules, if any: the very same network as before, step modes too.

    Those of a network that ``net`` is a part of are taken off as a whole.
    """
    _detach_whole(net)
    for _, hooks in _foreign(net):
        hooks.remove()
    return net


def _detach_whole(net: nn.Module) -> None:
    """Takes off the hooks of networks that are ``net`` or within it."""
    for module in net.modules():
        if found := Hooks.of(module):
            found.remove()


def _foreign(net: nn.Module) -> Iterator[tuple[str, Hooks]]:
    """Neurons in ``net`` on which a network around it has put hooks."""
    for name, module in net.named_modules():
        for method in vars(module).values():
            if stands_in := Neurons.in_place_of(method):
                yield name, stands_in.hooks
                break


def _check(net: nn.Module, time_step: int, step_mode: str) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be a network (torch.nn.Module), not {net!r:.80}")
    if not isinstance(time_step, Integral) or isinstance(time_step, bool) or time_step < 1:
        raise ValueError(f"time_step must be a whole number of at least 1, not {time_step!r}")
    if step_mode not in ("m", "s"):
        raise ValueError(f"step_mode must be 'm' (multi-step) or 's' (single-step), not {step_mode!r}")
