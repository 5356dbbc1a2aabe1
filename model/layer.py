"""The neurons, the convolution-BatchNorm pair and the frame around a network: what every model here is built of.

All layers are SpikingJelly's: they take [B, ...] in step mode 's' and [T, B, ...] in step mode 'm'.
"""

from typing import Any

import torch
from spikingjelly.activation_based import base, layer, neuron, surrogate
from torch import nn

# The derivative of a step that backward passes take; of each, ``alpha`` makes it steeper.
SURROGATES = {
    "sigmoid": surrogate.Sigmoid,
    "atan": surrogate.ATan,
    "erf": surrogate.Erf,
    "soft_sign": surrogate.SoftSign,
    "piecewise_quadratic": surrogate.PiecewiseQuadratic,
    "piecewise_exp": surrogate.PiecewiseExp,
}
USUAL_ALPHA: dict[str, float] = {name: kind().alpha for name, kind in SURROGATES.items()}  # SpikingJelly's


def lif(
    decay: float = 0.2,
    thresh: float = 1.0,
    v_reset: float | None = None,
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
) -> neuron.LIFNode:
    """A layer of leaky integrate-and-fire neurons (paper, section 3.1), driven by a current x[t]:

        h[t] = decay * v[t-1] + x[t]            charge
        s[t] = 1 if h[t] >= thresh else 0       fire
        v[t] = h[t] - thresh * s[t]             soft reset (v_reset None); hard reset: v_reset where s[t] = 1

    In backward passes ds/dh is a * p * (1 - p) with p = sigmoid(a * (h - thresh)), a = 4, or another of `SURROGATES`.

    Args:
        decay: membrane decay per time step, 0 < decay < 1; SpikingJelly calls 1 / (1 - decay) tau.
        thresh: firing threshold, > 0.
        v_reset: potential after a spike; None subtracts ``thresh`` instead.
        detach_reset: let no gradient pass through s[t] in the reset.
        surrogate: one of `SURROGATES`.
        alpha: its steepness a, > 0; None: its usual one.

    Raises:
        ValueError: an unknown ``surrogate``, or a number out of range.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay must lie between 0 and 1 (both excluded), not {decay}")
    if 1 - decay == 1:
        raise ValueError(f"decay {decay} is too small to make a difference")
    if not thresh > 0:
        raise ValueError(f"thresh must be greater than 0, not {thresh}")
    return neuron.LIFNode(
        tau=1 / (1 - decay), decay_input=False, **_firing(thresh, v_reset, detach_reset, surrogate, alpha)
    )


def make_neuron(neuron: str = "lif", **options) -> nn.Module:
    """A layer of neurons by name, one of `NEURONS`; ``options`` as of `lif`. The networks pass on what they are given.

    Raises:
        ValueError: an unknown name, or an option out of range.
    """
    if neuron not in NEURONS:
        raise ValueError(f"unknown neuron {neuron!r}: choose one of {', '.join(NEURONS)}")
    return NEURONS[neuron](**options)


def plif(decay: float = 0.2, **firing: Any) -> neuron.ParametricLIFNode:
    """`lif` with a decay that is learned, one for the layer (Fang et al., 2021), ``decay`` at the start."""
    return neuron.ParametricLIFNode(init_tau=lif(decay, **firing).tau, decay_input=False, **_firing(**firing))


def integrate_and_fire(decay: float = 0.2, **firing: Any) -> neuron.IFNode:
    """`lif` without a leak: h[t] = v[t-1] + x[t]. ``decay`` is there for the others and has no effect."""
    lif(decay, **firing)  # raises where one of them is out of range
    return neuron.IFNode(**_firing(**firing))


def _firing(
    thresh: float = 1.0,
    v_reset: float | None = None,
    detach_reset: bool = True,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
) -> dict[str, Any]:
    """What SpikingJelly's neurons have in common."""
    if surrogate not in SURROGATES:
        raise ValueError(f"unknown surrogate {surrogate!r}: choose one of {', '.join(SURROGATES)}")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha must be greater than 0, not {alpha}")
    return {
        "v_threshold": float(thresh),
        "v_reset": None if v_reset is None else float(v_reset),
        "surrogate_function": SURROGATES[surrogate](alpha=float(alpha or USUAL_ALPHA[surrogate])),
        "detach_reset": detach_reset,
    }


NEURONS = {"lif": lif, "plif": plif, "if": integrate_and_fire}


def conv_bn(in_channel: int, out_channel: int, kernel: int = 3, stride: int = 1, bias: bool = False) -> list[nn.Module]:
    """A convolution that keeps the size (divided by ``stride``), and its BatchNorm."""
    return [
        layer.Conv2d(in_channel, out_channel, kernel, stride=stride, padding=kernel // 2, bias=bias),
        layer.BatchNorm2d(out_channel),
    ]


def add_stages(
    layers: list[nn.Module], block: type[nn.Module], plan: list[tuple[int, int, int]], width: int, **neuron: Any
) -> dict[str, int]:
    """Appends residual blocks to what will be a network's ``features``.

    Args:
        plan: of each stage the blocks, their channels, and the stride of the first.
        width: channels that the first stage gets.

    Returns:
        ``stages`` of `SpikingClassifier`.
    """
    ends = {}
    for blocks, channels, stride in plan:
        for i in range(blocks):
            layers.append(block(width, channels, stride if i == 0 else 1, **neuron))
            width = channels
        ends[f"features.{len(layers) - 1}"] = width
    ends.popitem()
    return ends


class SpikingClassifier(nn.Module, base.StepModule):
    """``features`` then ``classifier``, averaged over time where the network sees all of it.

    Shapes:
        step mode 'm': [T, B, C, H, W] -> [B, classes], the mean over T; with ``each_step`` [T, B, classes].
        step mode 's': [B, C, H, W] -> [B, classes], one time step; the caller averages.

    Attributes:
        stages: the modules behind which stages end, but for the last, by name: how many channels each puts out.
    """

    def __init__(self, features: nn.Module, classifier: nn.Module, stages: dict[str, int] | None = None):
        super().__init__()
        self.stages = stages or {}
        self.step_mode = "s"
        self.features = features
        self.classifier = classifier

    def forward(self, x: torch.Tensor, each_step: bool = False) -> torch.Tensor:
        out = self.classifier(self.features(x))  # [T, B, classes] or [B, classes]
        return out.mean(0) if self.step_mode == "m" and not each_step else out
