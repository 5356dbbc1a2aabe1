"""Losses of what users' forward hooks see: the values of the spiking steps, and the gradients of the rates."""

import pytest
import torch
from spikingjelly.activation_based import monitor, neuron
from torch import Tensor, nn

from tests.rate.method_helpers import (
    MODES,
    SETTING,
    Wrapped,
    assert_same_gradients,
    assert_served,
    attached,
    bytes_saved,
    gradients,
    images,
    mean_output,
    tiny_net,
)  # fmt: skip
from util.rate import rate_model_setting


def bptt_and_rate(steps: int, mode: str) -> list[nn.Module]:
    """Where rates with a window for each step are BPTT's."""
    return [SETTING["bptt"](tiny_net(), steps, mode), rate_model_setting(tiny_net(), steps, mode, windows=steps)]


def penalised(net: nn.Module, x: Tensor, mode: str, of_output: float):
    """Gradients of a loss of the output and of the mean square of each layer's rate, as hooks see it; and the rates."""
    seen = {"fire1": [], "fire2": []}
    for name, record in seen.items():
        net.get_submodule(name).register_forward_hook(lambda module, args, out, record=record: record.append(out))
    out = mean_output(net, x, mode)
    rates = [sum(y.reshape(-1, *y.shape[-3:]).sum(0) for y in record) for record in seen.values()]
    (of_output * out.square().sum() + sum(rate.square().mean() for rate in rates)).backward()
    return gradients(net), [rate.detach() for rate in rates]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("of_output", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_what_hooks_see_is_bptt_s_with_a_window_for_each_step(mode, of_output, steps):
    bptt, rate = (penalised(net, images(steps), mode, of_output) for net in bptt_and_rate(steps, mode))
    torch.testing.assert_close(rate[1], bptt[1], rtol=1e-12, atol=0)
    assert_same_gradients(rate[0], bptt[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_penalty_on_what_hooks_see_is_that_on_what_the_network_puts_out(mode):
    """At several steps, with weights of their own for each: the method gives each step the gradient of the mean."""
    weights, found = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), []
    for by_hook in (False, True):
        net = attached(Wrapped(lambda net, x: (hidden := net.body[:3](x), net.body[3:](hidden))), "rate", 3, mode)
        seen = []
        if by_hook:
            net.body[2].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        outs = [net(images(3))] if mode == "m" else [net(step) for step in images(3)]
        seen = seen or [hidden for hidden, _ in outs]
        spikes = seen[0] if mode == "m" else torch.stack(seen)
        ((spikes * weights.view(3, 1, 1, 1, 1)).sum().square() + sum(out.square().sum() for _, out in outs)).backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-10)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_may_be_computed_within_the_hook_of_inputs_and_potentials_too(mode, steps):
    found = []
    for net in bptt_and_rate(steps, mode):
        losses = []
        net.fire1.register_forward_hook(lambda m, a, out, to=losses: to.append(out.mean() + m.v.square().mean()))
        net.conv2.register_forward_hook(lambda m, args, out, to=losses: to.append((args[0] * 2).sin().sum()))
        mean_output(net, images(steps), mode)
        sum(losses).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_potentials_that_a_monitor_sees_are_bptt_s_and_have_their_gradients(mode):
    found = []
    for net in bptt_and_rate(3, mode):
        seen = monitor.AttributeMonitor("v", False, net, neuron.LIFNode)
        out = mean_output(net, images(3), mode)
        (out.sum() + sum(v.square().sum() for v in seen["fire2"])).backward()
        found.append((gradients(net), [v.detach() for v in seen["fire2"]]))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=1e-12)
    assert_same_gradients(found[1][0], found[0][0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_hooks_that_keep_nothing_cost_nothing(mode):
    plain, looked_at = tiny_net(), tiny_net()
    for module in looked_at:
        module.register_forward_hook(lambda module, args, out: (out.sum().item(), None)[1])
    saved = [bytes_saved(net, images(3), "rate", mode) for net in (plain, looked_at)]
    assert saved[1] == saved[0]


def test_the_graph_of_step_mode_m_can_be_gone_through_again_also_behind_hooks_that_keep_what_they_see():
    net, seen = attached(tiny_net(), "rate", 3, "m"), []
    net.fire1.register_forward_hook(lambda module, args, out: seen.append(out))
    loss = (mean_output(net, images(3), "m").square().sum() + seen[0].sum()) / 2
    loss.backward(retain_graph=True)
    twice = {name: 2 * grad for name, grad in gradients(net).items()}
    loss.backward()
    assert_same_gradients(gradients(net), twice, 1e-12)


def test_in_single_step_mode_a_second_backward_is_refused():
    loss = mean_output(attached(tiny_net(), "rate", 3, "s"), images(3), "s").square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time: in step mode 's' one backward follows the last"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_that_works_in_place_is_a_part_of_the_forward(mode):
    net = tiny_net()
    net.conv2.register_forward_hook(lambda module, args, out: (out.mul_(2), None)[1])
    assert_served(net, images(3), mode)
