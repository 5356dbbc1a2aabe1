"""Methods by name: what they say of themselves, and SLTT's gradient beside SpikingJelly's own neuron."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import nn

from tests.train.test_engine import FULL, T, make_images, make_net, method_of
from util.rate.saved import saved_for_backward
from util.train.loss import ce
from util.train.method import METHODS, OneForward, Sltt, make_method
from util.train.options import TrainOptions


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_made_of_the_options_of_its_name(name):
    made = make_method(TrainOptions(method=name, T=6, step_mode="s", windows=2, sltt_steps=3))
    assert type(made) is METHODS[name]
    assert (made.T, made.step_mode) == (6, "s")
    assert made.name == {"rate": "rate2", "sltt": "sltt3"}.get(name, name)


def step_gradients(net: nn.Module, x: torch.Tensor, y: torch.Tensor, detach: bool) -> list[list[torch.Tensor]]:
    """Of each step's loss by itself."""
    functional.reset_net(net)
    found = []
    for _ in range(T):
        if detach:
            functional.detach_net(net)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return found


def learned(how: Sltt, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    net = make_net(how)
    how.learn(OneForward(net, how), x, lambda out: ce(out, y), FULL)
    return [p.grad for p in net.parameters()]


def same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.skipif(not hasattr(neuron, "SLTTLIFNode"), reason="an older SpikingJelly")
def test_sltt_gives_the_gradients_of_spikingjelly_s_neuron():
    x, y = make_images().tensors
    how = Sltt(T, "s")
    net = make_net(how)
    for i in (2, 5):
        lif = net.features[i]
        net.features[i] = neuron.SLTTLIFNode(
            lif.tau, lif.decay_input, lif.v_threshold, lif.v_reset, lif.surrogate_function
        )
    steps = step_gradients(net, x, y, detach=False)
    same(learned(how, x, y), [sum(grads) / T for grads in zip(*steps, strict=True)])


def test_sltt_k_is_the_mean_of_k_steps_drawn_by_torch_s_generator():
    x, y = make_images().tensors
    how = Sltt(T, "s", sltt_steps=2)
    steps = step_gradients(make_net(how), x, y, detach=True)
    drawn = set()
    for seed in range(8):
        torch.manual_seed(seed)
        chosen = tuple(sorted(torch.randperm(T)[:2].tolist()))
        drawn.add(chosen)
        functional_net = make_net(how)
        torch.manual_seed(seed)
        how.learn(OneForward(functional_net, how), x, lambda out: ce(out, y), FULL)
        expected = [sum(steps[t][i] for t in chosen) / 2 for i in range(len(steps[0]))]
        same([p.grad for p in functional_net.parameters()], expected)
    assert len(drawn) > 2


def test_sltt_returns_the_outputs_of_all_steps_and_the_loss_of_the_chosen():
    x, y = make_images().tensors
    how = Sltt(T, "s", sltt_steps=1)
    net = make_net(how)
    loss, outputs = how.learn(OneForward(net, how), x, lambda out: ce(out, y), FULL)
    assert torch.equal(outputs, method_of("bptt", "s").outputs(make_net(how), x).detach())
    assert min(abs(F.cross_entropy(step, y) - loss) for step in outputs) < 1e-12


def test_sltt_keeps_one_step_at_a_time():
    """What is saved for backward when a loss is made."""
    x, y = make_images().tensors
    saved = {}
    for steps in (2, 8):
        how = Sltt(steps, "s")
        net = make_net(how)
        with saved_for_backward(net) as count:
            sizes = []
            how.learn(OneForward(net, how), x, lambda out: (sizes.append(count()), ce(out, y))[1], FULL)  # noqa: B023
        saved[steps] = sizes
    assert len(saved[8]) == 8
    assert max(saved[8]) <= 1.01 * max(saved[2])
