"""The networks, by name: ``from model import resnet18`` or ``model.MODELS["resnet18"]``."""

from model.imagenet import preact_resnet34, sew_resnet34
from model.resnet import resnet18, resnet19
from model.spikformer import spikformer, spikformer_small
from model.vgg import vgg11, vgg13, vggsnn_cifar, vggsnn_dvs, vggsnn_small

MODELS = {
    f.__name__: f
    for f in (
        resnet18, resnet19, vggsnn_cifar, vggsnn_dvs, vggsnn_small, vgg11, vgg13, sew_resnet34, preact_resnet34,
        spikformer, spikformer_small,
    )
}  # fmt: skip

__all__ = [
    "MODELS", "preact_resnet34", "resnet18", "resnet19", "sew_resnet34", "spikformer", "spikformer_small", "vgg11",
    "vgg13", "vggsnn_cifar", "vggsnn_dvs", "vggsnn_small",
]  # fmt: skip
