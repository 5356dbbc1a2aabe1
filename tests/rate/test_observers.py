"""Losses of what users' forward hooks see: the values of the spiking steps, and the gradients of the rates."""

import pytest
import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    attached,
    gradients,
    images,
    labels,
    mean_output,
    tiny_net,
    train_step,
)
from util.rate import rate_model_setting


def penalised(net: nn.Module, x: Tensor, mode: str, of_names=("fire1", "fire2"), of_output: float = 1.0):
    """Gradients of a loss of the output and of the mean square of each layer's rate, as hooks see it; and the rates."""
    seen = {name: [] for name in of_names}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen[name].append(out))
        for name in of_names
    ]
    out = mean_output(net, x, mode)
    rates = [sum(record.reshape(-1, *record.shape[-3:]).sum(0) for record in seen[name]) for name in of_names]
    (of_output * out.square().sum() + sum(rate.square().mean() for rate in rates)).backward()
    for handle in handles:
        handle.remove()
    return gradients(net), [rate.detach() for rate in rates]


@pytest.mark.parametrize("of_output", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_what_hooks_see_is_bptt_s_at_one_step(mode, of_output):
    found = [
        penalised(attached(tiny_net(), m, 1, mode), images(1), mode, of_output=of_output) for m in ("bptt", "rate")
    ]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=0)
    assert_same_gradients(found[1][0], found[0][0], 1e-9)


class PutsOutSpikes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body[:3](x)
        return hidden, self.body[3:](hidden)


@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_what_hooks_see_is_that_on_what_the_network_puts_out(mode):
    """At several steps, with weights of their own for each: the method gives each step the gradient of the mean."""
    weights, found = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), []
    for by_hook in (False, True):
        net = attached(PutsOutSpikes(), "rate", 3, mode)
        seen = []
        if by_hook:
            net.body[2].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        outs = [net(images(3))] if mode == "m" else [net(step) for step in images(3)]
        seen = seen or [hidden for hidden, _ in outs]
        spikes = seen[0] if mode == "m" else torch.stack(seen)
        ((spikes * weights.view(3, 1, 1, 1, 1)).sum().square() + sum(out.square().sum() for _, out in outs)).backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_may_be_computed_within_the_hook_of_inputs_and_potentials_too(mode):
    found = []
    for method in ("bptt", "rate"):
        net, losses = attached(tiny_net(), method, 1, mode), []
        net.fire1.register_forward_hook(
            lambda m, a, out, losses=losses: losses.append(out.mean() + m.v.square().mean())
        )
        net.conv2.register_forward_hook(lambda m, args, out, losses=losses: losses.append((args[0] * 2).sin().sum()))
        mean_output(net, images(1), mode)
        sum(losses).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_potentials_that_a_monitor_sees_are_bptt_s_and_have_gradients(mode):
    records = []
    for method in ("bptt", "rate"):
        net = attached(tiny_net(), method, 3, mode)
        seen = monitor.AttributeMonitor("v", False, net, neuron.LIFNode)
        mean_output(net, images(3), mode)
        records.append(list(seen["fire2"]))
    assert all(record.requires_grad for record in records[1])
    torch.testing.assert_close(records[1], records[0], rtol=1e-12, atol=1e-12)


def test_a_hook_that_keeps_nothing_costs_nothing():
    """In step mode 'm' the output's graph is the rate pass's own, which can be gone through again."""
    net, totals = attached(tiny_net(), "rate", 3, "m"), []
    for module in net:
        module.register_forward_hook(lambda module, args, out: totals.append(out.sum().item()))
    out = mean_output(net, images(3), "m").square().sum()
    for _ in range(2):
        out.backward(retain_graph=True)
    twice = {name: grad / 2 for name, grad in gradients(net).items()}
    plain = attached(tiny_net(), "rate", 3, "m")
    mean_output(plain, images(3), "m").square().sum().backward()
    assert_same_gradients(twice, gradients(plain), 1e-12)


def test_in_single_step_mode_nothing_is_kept_for_a_hook_that_keeps_nothing():
    net = attached(tiny_net(), "rate", 1, "s")
    for module in net:
        module.register_forward_hook(lambda module, args, out: None)
    kept = net(images(1)[0]).grad_fn.graph.tensors
    assert {place[0] for place in kept} == {"fire1", "fire2", "the network"}  # numbers that stand for their input


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_that_works_in_place_acts_in_both_passes(mode):
    nets = [attached(tiny_net(), method, 1, mode) for method in ("bptt", "rate")]
    for net in nets:
        net.conv2.register_forward_hook(lambda module, args, out: (out.mul_(2), None)[1])
    bptt, rate = (train_step(net, images(1), labels(), mode).grads for net in nets)
    assert_same_gradients(rate, bptt, 1e-9)


class SkipsALayerInTheRatePass(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.aside = tiny_net(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.aside(x)
        return self.body(x)


def test_a_penalty_on_what_the_rate_pass_does_not_have_is_an_error_that_names_the_layer():
    net, seen = rate_model_setting(SkipsALayerInTheRatePass(), 1, "s"), []
    net.aside.register_forward_hook(lambda module, args, out: seen.append(out))
    net(images(1)[0])
    with pytest.raises(RuntimeError, match=r"what 'aside' put out .* does not call it in the rate pass"):
        seen[0].sum().backward()


def test_a_second_backward_behind_hooks_that_keep_what_they_see_is_refused():
    net, seen = attached(tiny_net(), "rate", 2, "m"), []
    net.fire1.register_forward_hook(lambda module, args, out: seen.append(out))
    out = mean_output(net, images(2), "m").sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time.*forward hooks keep"):
        out.backward()
