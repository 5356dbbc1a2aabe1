"""BatchNorm over the batches of all processes: `sync_batch_norm`, and its rule's mathematics."""

import torch
import torch.distributed as dist
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from .function import BatchNormRate


def sync_batch_norm(net: nn.Module) -> nn.Module:
    """Makes every BatchNorm of ``net`` take its statistics from the batches of all processes, in place.

    In training, once torch.distributed has been started with several processes; else each works as ever. In step mode
    'm', [T, B, C, ...], a channel has one statistic over all steps and samples, as without processes
    (``nn.SyncBatchNorm.convert_sync_batchnorm`` takes the batch for the channels there, and refuses CPUs). Serves BPTT
    and rate-based backpropagation, before or after attaching, on any device. Parameters and state_dict stay what they
    are. As with any collective, all processes must run the same layers.

    Returns:
        ``net``.

    Raises:
        TypeError: it holds a batch normalisation other than torch's or SpikingJelly's BatchNorm1d, 2d and 3d.
    """
    found = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, module in found:
        if type(module) not in _SYNCHRONISED and not isinstance(module, Synchronised):
            raise TypeError(
                f"{name!r} is a {type(module).__name__}, whose statistics cannot be synchronised: use BatchNorm1d, "
                "BatchNorm2d or BatchNorm3d"
            )
    for _, module in found:
        module.__class__ = _SYNCHRONISED.get(type(module), type(module))
    return net


class Synchronised:
    """What the synchronised BatchNorms add to their base class."""

    def forward(self, x: Tensor) -> Tensor:
        if not (uses_batch_statistics(self) and is_synchronised(self)):
            return super().forward(x)
        steps = getattr(self, "step_mode", "s") == "m"  # [T, B, C, ...]
        flat = x.flatten(0, 1) if steps else x
        self._check_input_dim(flat)
        running = self.running_mean, self.running_var, count_batch(self)
        return synchronised(flat, self.weight, self.bias, *running, self.eps).view(x.shape)


def synchronised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    momentum: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """BatchNorm of [N, C, ...] by the statistics of all processes; ``momentum`` None updates no running ones."""
    arguments = x, weight, bias, running_mean, running_var, momentum, eps
    if has_torch_function_unary(x):  # while a network runs that has the hooks on
        return handle_torch_function(synchronised, (x,), *arguments)
    mean, invstd, _ = statistics(x, running_mean, running_var, momentum, eps)
    return BatchNormRate.apply(x, weight, bias, mean, invstd, synchronised_batch_norm_gradients)


@torch.no_grad()
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    eps: float,
    repeats: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(var + eps) and how many values they are of, over all processes.

    ``repeats``: so many times this process's batch.
    """
    mean, var, count = statistics_of_all(x, repeats)
    if momentum is not None:
        update_running((running_mean, running_var), mean, var, momentum, count)
    return mean, (var + eps).rsqrt(), count


def _synchronised(kind: type[nn.Module]) -> type[nn.Module]:
    name = f"Sync{kind.__name__}" + ("Steps" if kind.__module__.startswith(layer.__name__) else "")
    attributes = {"__module__": __name__, "__qualname__": name}
    return type(name, (Synchronised, kind), attributes)


_SYNCHRONISED = {
    kind: _synchronised(kind) for place in (nn, layer) for n in "123" for kind in [getattr(place, f"BatchNorm{n}d")]
}
SYNCHRONISED = tuple(_SYNCHRONISED.values())
globals().update({kind.__name__: kind for kind in SYNCHRONISED})  # where pickle looks for them


def is_synchronised(module: nn.Module) -> bool:
    """Whether the module's batch is the one of several processes."""
    return (
        isinstance(module, Synchronised) and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    )


def uses_batch_statistics(module: nn.Module) -> bool:
    return module.training or module.running_mean is None


def count_batch(module: nn.Module) -> float | None:
    """The part of the running statistics that this batch makes up; None where none are kept."""
    if not module.training or not module.track_running_stats or module.running_mean is None:
        return None
    if module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    return module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)


def variance(invstd: Tensor, eps: float) -> Tensor:
    """The (biased) variance of which ``invstd`` = 1 / sqrt(var + eps)."""
    return (invstd.square().reciprocal() - eps).clamp_min(0)


@torch.no_grad()
def update_running(
    running: tuple[Tensor, Tensor], mean: Tensor, var: Tensor, momentum: float, count: Tensor | int
) -> None:
    """PyTorch's update of running mean and variance, by mean and (biased) variance of ``count`` values a channel."""
    running_mean, running_var = running
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


@torch.no_grad()
def statistics_of_all(x: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel of [N, C, ...] mean and variance [C] over the batches of all processes, and how many values [1].

    The means and variances of the processes are gathered: sums of squares would cancel where a mean is large. A process
    may have no sample. ``repeats`` of the same values count; a process without a sample need not know of them.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    channels = x.shape[1]
    own = wide.new_zeros(2 * channels + 1)
    if x.numel():
        var, mean = torch.var_mean(wide, [d for d in range(x.dim()) if d != 1], correction=0)
        torch.cat([mean, var, mean.new_tensor([repeats * x.numel() // channels])], out=own)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.stack(gathered).split([channels, channels, 1], 1)  # [processes, C], ..., [.., 1]
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count
    var = ((variances + (means - mean).square()) * counts).sum(0) / count
    return mean, var, count


def synchronised_batch_norm_gradients(
    grad: Tensor, c: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`BatchNormRate`'s gradients with means over all processes; those of weight and bias are of this one's batch.

    One reduction, of 3 numbers a channel. With weight * invstd = scale, and xhat = (c - mean) * invstd,
    grad_c = scale * (grad - mean(grad) - invstd * mean(grad * xhat) * (c - m(c))).
    """
    needs_c, _, needs_bias = needs
    var = invstd.square().reciprocal()
    factor = torch.ones_like(mean) if weight is None else weight
    if c.numel():
        grad_c, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, c, factor, mean, var, None, None, False, 0.0, (needs_c, True, True)
        )  # as if mean and var were constants
    else:  # of no sample, for which PyTorch's kernel on CPUs divides by 0
        grad_c, grad_weight, grad_bias = torch.zeros_like(c), torch.zeros_like(mean), torch.zeros_like(mean)
    if needs_c:
        others, channels = [d for d in range(c.dim()) if d != 1], c.shape[1]
        count = mean.new_tensor([c.numel() // channels])
        sums = torch.cat([grad_weight, grad_bias, c.sum(others, dtype=mean.dtype), count])
        dist.all_reduce(sums)
        with_xhat, of_grad, mean_c = (sums[:-1] / sums[-1]).view(3, channels)
        scale = invstd if weight is None else invstd * weight
        slope = scale * invstd * with_xhat
        shift = slope * mean_c - scale * of_grad
        slope, shift = (x.view(-1, *[1] * (c.dim() - 2)).to(grad_c.dtype) for x in (slope, shift))
        grad_c = torch.addcmul(grad_c + shift, slope, c, value=-1)
    return grad_c, grad_weight, grad_bias if needs_bias else None
