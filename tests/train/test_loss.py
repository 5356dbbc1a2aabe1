"""Losses and terms of them: their values, and their gradients through each method in both step modes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.test_engine import FULL, T, make_images, make_net, method_of
from util.rate.saved import saved_for_backward
from util.train.loss import LOSSES, ce, mse, tet
from util.train.meter import FiringRates
from util.train.method import Method, OneForward
from util.train.terms import RatePenalty

OUTPUTS = torch.tensor([[[1.0, 0.0], [2.0, -1.0]], [[0.0, 3.0], [0.5, 0.5]]])  # [T, B, classes]
TARGET = torch.tensor([0, 1])
WAYS = [("bptt", "m"), ("bptt", "s"), ("rate", "m"), ("rate", "s")]


# Values


def test_the_default_is_the_cross_entropy_of_the_mean():
    assert torch.equal(ce(OUTPUTS, TARGET, 0.1), F.cross_entropy(OUTPUTS.mean(0), TARGET, label_smoothing=0.1))


def test_tet_is_the_mean_of_the_steps_cross_entropies_and_holds_the_outputs_at_1():
    entropy = sum(F.cross_entropy(step, TARGET) for step in OUTPUTS) / 2
    held = ((OUTPUTS - 1) ** 2).mean()
    torch.testing.assert_close(tet(OUTPUTS, TARGET, tet_weight=0.25), 0.75 * entropy + 0.25 * held)


def test_mse_is_of_the_mean_from_one_hot_labels():
    mean = [[0.5, 1.5], [1.25, -0.25]]
    by_hand = (0.5**2 + 1.5**2 + 1.25**2 + 1.25**2) / 4
    assert OUTPUTS.mean(0).tolist() == mean
    assert mse(OUTPUTS, TARGET).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_shares_of_classes_are_labels_too(loss):
    torch.testing.assert_close(loss(OUTPUTS, torch.eye(2)[TARGET]), loss(OUTPUTS, TARGET))


# Gradients


def gradients(how: Method, loss, x: torch.Tensor, y: torch.Tensor, penalty: float = 0.0) -> list[torch.Tensor]:
    net = make_net(how)
    with FiringRates(net, graph=True) as rates:
        term = RatePenalty(penalty)
        how.learn(OneForward(net, how), x, lambda out: loss(out, y) + term(out, y, rates), FULL)
    return [p.grad for p in net.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.fixture
def frames() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(6, T, 2, 6, 6, generator=generator, dtype=torch.float64), torch.arange(6)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_bptt_gives_autograd_s_gradients_of_a_loss_of_each_step(frames, step_mode):
    how, (x, y) = method_of("bptt", step_mode), frames
    net = make_net(how)
    with FiringRates(net, graph=True):
        outputs = (
            torch.stack([net(s) for s in x.unbind(1)]) if step_mode == "s" else net(x.transpose(0, 1), each_step=True)
        )
    tet(outputs, y).backward()
    same(gradients(how, tet, x, y), [p.grad for p in net.parameters()])


@pytest.mark.parametrize("penalty", [0.0, 3.0])
@pytest.mark.parametrize("loss", LOSSES.values())
def test_at_one_step_the_rate_s_gradients_are_bptt_s(frames, loss, penalty):
    x, y = frames
    found = [gradients(method_of(name, mode, 1), loss, x[:, :1], y, penalty) for name, mode in WAYS]
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_both_step_modes_give_the_rate_s_gradients_of_a_loss_of_each_step(frames, penalty):
    """Of an input without BatchNorm's statistics of each step: the same images at each."""
    x, y = frames[0][:, 0], frames[1]
    how = [method_of("rate", mode) for mode in "ms"]
    found = []
    for one in how:
        net = make_net(one).eval()
        with FiringRates(net, training=False, graph=True) as rates:
            term = RatePenalty(penalty)
            one.learn(
                OneForward(net, one), x, lambda out, rates=rates, term=term: tet(out, y) + term(out, y, rates), FULL
            )
        found.append([p.grad for p in net.parameters()])
    same(*found)


def test_a_loss_of_each_step_has_one_step_s_cost_in_rate_based_training():
    x, y = make_images(8).tensors
    saved = {}
    for steps in (2, 8):
        how = method_of("rate", "m", steps)
        net = make_net(how)
        with saved_for_backward(net) as count:
            loss = tet(how.outputs(net, x), y)
            saved[steps] = count()
        loss.backward()
    of_outputs = 8 * 7 * 8  # bytes of the outputs of a step: 8 images, 7 classes, float64
    assert saved[8] - saved[2] <= 6 * 4 * of_outputs


# The mean firing rate


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_the_penalty_is_the_mean_of_all_spikes_and_autograd_s_gradient_of_it(frames, step_mode):
    how, (x, y) = method_of("bptt", step_mode), frames
    net, spikes = make_net(how), []
    for name in (2, 5):
        net.features[name].register_forward_hook(lambda module, args, out: spikes.append(out))
    how.outputs(net, x)
    mean = sum(s.sum() for s in spikes) / sum(s.numel() for s in spikes)
    (3 * mean).backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
    same(gradients(how, lambda out, y: 0 * out.sum(), x, y, 3.0), expected)

    with FiringRates(net, graph=True) as rates:
        how.outputs(net, x)
    assert rates.mean().item() == pytest.approx(mean.item())


@pytest.mark.parametrize("graph", [False, True])
def test_firing_rates_of_rate_based_training_read_one_step_s_size_and_are_the_spikes(graph):
    x, _ = make_images(8).tensors
    how = method_of("rate", "m", 6)
    net, spikes, sizes = make_net(how), [], []

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.sum.default:
                sizes.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with FiringRates(net, graph=graph) as rates, Sums():
        how.outputs(net, x)
    net.features[2].register_forward_hook(lambda module, args, out: spikes.append(out.detach()))
    how.outputs(net, x)
    assert len(sizes) == 2
    assert sizes[0] == spikes[0][0].numel()
    rates.add(rates.take())
    assert rates.by_layer()["features.2"] == pytest.approx(spikes[0].mean().item(), rel=1e-6)
