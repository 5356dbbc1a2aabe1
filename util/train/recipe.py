"""What training recipes of today add to the published one: mixed batches, and an average of the weights."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import tv_tensors
from torchvision.transforms import v2

LEAST_ALPHA = 1e-6  # of a smaller one float32 has no Beta distribution


class Mixing:
    """MixUp or CutMix of a batch, one of both at random where both are wanted (torchvision.transforms.v2).

    Called with images [B, C, H, W] or frames [B, T, C, H, W], mixed alike at all steps, and labels [B]; returns the
    mixed ones and labels [B, classes], each row the shares of the classes. Draws from torch's global generator.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int):
        """The alphas are of the Beta distribution that shares are drawn from; 0 leaves that kind out."""
        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        self.transform = v2.RandomChoice([kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha])

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.transform(tv_tensors.Video(x) if x.dim() == 5 else x, y)
        return x.as_subclass(Tensor), y


def mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> Callable[[Tensor, Tensor], tuple] | None:
    """A `Mixing`, or None where nothing is mixed."""
    return Mixing(mixup_alpha, cutmix_alpha, num_classes) if mixup_alpha or cutmix_alpha else None


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``net`` that becomes the exponential moving average of its parameters and buffers.

    Each ``update_parameters(net)`` keeps ``decay`` of the average, but for the first, which copies.
    """
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def hard_labels(y: Tensor) -> Tensor:
    """Labels [B], of shares [B, classes] those of the largest ones."""
    return y if y.dim() == 1 else y.argmax(1)
