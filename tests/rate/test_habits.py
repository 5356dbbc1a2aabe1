"""What people do around a network: exact, or an error that names module, reason and remedy; nothing in between."""

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import base, functional, layer, monitor, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.rate.method_helpers import (
    MODES,
    assert_rate_equals_bptt,
    assert_same_gradients,
    attached,
    gradients,
    images,
    labels,
    lif_node,
    mean_output,
    tiny_net,
    train_step,
)
from util.rate import UnsupportedModuleError, bptt_model_setting, detach, problems, rate_model_setting, rule_for
from util.rate.problem import NetworkError
from util.rate.rule import Rule


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_of_a_parameter_runs_once(mode):
    x, calls = images(3), []
    plain, hooked = attached(tiny_net(), "rate", 3, mode), attached(tiny_net(), "rate", 3, mode)
    for p in hooked.parameters():
        p.register_hook(lambda grad: calls.append(1) or grad / 2)
    expected = {name: grad / 2 for name, grad in train_step(plain, x, labels(), mode).grads.items()}
    assert_same_gradients(train_step(hooked, x, labels(), mode).grads, expected, 1e-12)
    assert len(calls) == len(expected)


@pytest.mark.parametrize("mode", MODES)
def test_a_monitor_sees_the_spiking_steps(mode):
    records = {}
    for method in ("bptt", "rate"):
        net = attached(tiny_net(), method, 3, mode)
        seen = monitor.OutputMonitor(net, neuron.LIFNode)
        train_step(net, images(3), labels(), mode)
        records[method] = [record.detach() for record in seen["fire2"]]
    torch.testing.assert_close(records["rate"], records["bptt"], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_that_changes_an_output_is_part_of_the_network(mode):
    nets = [attached(tiny_net(), method, 1, mode) for method in ("bptt", "rate")]
    for net in nets:
        net.conv2.register_forward_hook(lambda module, args, out: out * 2)
    bptt, rate = (train_step(net, images(1), labels(), mode).grads for net in nets)
    assert_same_gradients(rate, bptt, 1e-9)


def test_in_step_mode_s_a_backward_hook_which_would_see_nothing_is_refused():
    net = attached(tiny_net(), "rate", 3, "s")
    net.fire2.register_full_backward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModuleError, match=r"'fire2'.*backward hook.*step mode 'm'"):
        net(images(3)[0])


def test_a_full_backward_hook_sees_the_gradient_of_all_steps():
    mode = "m"
    net, seen = attached(tiny_net(), "rate", 3, mode), []
    net.fire2.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    mean_output(net, images(3), mode).square().sum().backward()
    other, spikes = (
        attached(tiny_net(), "rate", 3, mode),
        torch.zeros(3, 6, 3, 3, dtype=torch.float64, requires_grad=True),
    )
    other.fire2.register_forward_hook(lambda module, args, out: out + spikes)
    mean_output(other, images(3), mode).square().sum().backward()
    torch.testing.assert_close(sum(grad.view(-1, 3, 6, 3, 3).sum(0) for grad in seen), spikes.grad)


@pytest.mark.parametrize("mode", MODES)
def test_a_forgotten_reset_is_an_error_with_the_remedy(mode):
    net = attached(tiny_net(), "rate", 3, mode)
    mean_output(net, images(3), mode)
    with pytest.raises(RuntimeError, match=r"'fire1' still holds .* functional\.reset_net"):
        mean_output(net, images(3), mode)
    functional.reset_net(net)
    mean_output(net, images(3), mode)


@pytest.mark.parametrize("mode", MODES)
def test_detach_leaves_no_method_behind_a_wrapper_of_forward(mode):
    net = attached(tiny_net(), "rate", 3, mode)
    net.forward = functools.partial(net.forward)
    detach(net)
    expected = train_step(attached(tiny_net(), "bptt", 3, mode), images(3), labels(), mode).grads
    assert_same_gradients(train_step(bptt_model_setting(net, 3, mode), images(3), labels(), mode).grads, expected, 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["fire1", "bn2", "head"])
def test_a_module_replaced_after_attaching_is_named(name, mode):
    net = attached(tiny_net(), "rate", 3, mode)
    new = {"fire1": lif_node(), "bn2": layer.BatchNorm2d(6), "head": layer.Linear(54, 5)}[name]
    setattr(net, name, new.double())
    functional.set_step_mode(net, mode)
    with pytest.raises(RuntimeError, match=f"'{name}' is new.*rate_model_setting"):
        mean_output(net, images(3), mode)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_made_between_forward_and_backward_trains_on_its_own(mode, copied):
    x, net = images(2), attached(tiny_net(), "rate", 2, mode)
    expected = train_step(attached(net, "rate", 2, mode), x, labels(), mode)
    net.eval()  # running statistics must not move before the copy is made
    if mode == "m":
        outs = [net(x)]
        other = copied(net.train())
    else:
        outs = [net(x[0])]
        other = copied(net.train())
        net.eval()
        outs.append(net(x[1]))
    assert_same_gradients(train_step(other, x, labels(), mode).grads, expected.grads, 0)
    assert all(p.grad is None for p in net.parameters())
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_of_a_network_that_has_run_asks_for_a_reset(mode):
    net = attached(tiny_net(), "rate", 2, mode)
    mean_output(net, images(2), mode)
    with pytest.raises(RuntimeError, match=r"functional\.reset_net"):
        mean_output(copy.deepcopy(net), images(2), mode)


def test_the_potential_of_a_copy_has_no_graph():
    net = attached(tiny_net(), "rate", 2, "m")
    net(images(2))
    assert not copy.deepcopy(net).fire2.v.requires_grad
    net.fire2.v.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_replicas_of_data_parallel_are_refused(mode):
    net = attached(tiny_net(), "rate", 2, mode)
    with pytest.raises(UnsupportedModuleError, match=r"nn\.DataParallel .* DistributedDataParallel"):
        net._replicate_for_data_parallel()
    detach(net)._replicate_for_data_parallel()


@pytest.mark.parametrize("copied", [False, True], ids=["part", "copy of a part"])
def test_detach_of_a_part_detaches(copied):
    net = nn.Sequential(tiny_net(), nn.Identity())
    before = set(vars(net)), [set(vars(module)) for module in net.modules()]
    rate_model_setting(net, 2, "m")
    part = copy.deepcopy(net[0]) if copied else net[0]
    detach(part)
    assert not any("forward" in vars(module) for module in part.modules())
    if not copied:
        assert before == (set(vars(net)), [set(vars(module)) for module in net.modules()])


def test_a_step_mode_set_by_hand_is_named():
    net = attached(tiny_net(), "rate", 3, "m")
    functional.set_step_mode(net, "s")
    with pytest.raises(RuntimeError, match=r"'conv1' was set to step mode 's'.*rate_model_setting"):
        net(images(3)[0])


class Wrapped(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body, self.run = tiny_net(), forward

    def forward(self, x):
        return self.run(self.body, x)


def checkpointing(reentrant: bool):
    def forward(body, x):
        y = body.fire1(body.bn1(body.conv1(x)))
        return body[6:](checkpoint(lambda y: body[3:6](y), y, use_reentrant=reentrant))

    return Wrapped(forward)


@pytest.mark.parametrize(
    ("reentrant", "mode", "said"),
    [
        (True, "m", r"'body\.fire2'.*inside a torch\.autograd\.Function, as by checkpointing"),
        (True, "s", r"'body\.fire2'.*inside a torch\.autograd\.Function, as by checkpointing"),
        (False, "m", "run again in backward|Recomputed values .* have different metadata"),
    ],
)
def test_modules_run_again_in_backward_are_refused(reentrant, mode, said):
    net = attached(checkpointing(reentrant), "rate", 3, mode)
    with pytest.raises((UnsupportedModuleError, RuntimeError), match=said):
        F.cross_entropy(mean_output(net, images(3), mode), labels()).backward()


def test_in_step_mode_s_checkpoints_that_are_not_reentrant_change_no_gradient():
    """And run nothing again."""
    found = train_step(attached(checkpointing(False), "rate", 3, "s"), images(3), labels(), "s").grads
    expected = train_step(attached(tiny_net(), "rate", 3, "s"), images(3), labels(), "s").grads
    assert_same_gradients(found, {f"body.{name}": grad for name, grad in expected.items()}, 1e-12)


@dataclass
class Output:
    logits: torch.Tensor


def test_a_dataclass_is_served_in_step_mode_m_and_refused_in_s():
    dataclass_of = Wrapped(lambda body, x: Output(body(x)))
    found = []
    for method in ("bptt", "rate"):
        net = attached(dataclass_of, method, 1, "m")
        net(images(1)).logits.sin().sum().backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-9)
    with pytest.raises(NetworkError, match="returns a Output"):
        attached(dataclass_of, "rate", 1, "s")(images(1)[0])


class Pair(NamedTuple):
    logits: torch.Tensor
    penalty: torch.Tensor


@pytest.mark.parametrize("mode", MODES)
def test_a_named_tuple_is_served(mode):
    found = []
    for method in ("bptt", "rate"):
        net = attached(Wrapped(lambda body, x: Pair(y := body(x), y.square().mean())), method, 1, mode)
        out = net(images(1) if mode == "m" else images(1)[0])
        (out.logits.sin().sum() + out.penalty).backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_derivative_is_refused(mode):
    net = attached(tiny_net(), "rate", 1, mode)
    loss = mean_output(net, images(1), mode).square().sum()
    (grad,) = torch.autograd.grad(loss, net.conv1.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fire, self.head = nn.Embedding(9, 8), lif_node(v_threshold=0.1), layer.Linear(8, 5)

    def forward(self, tokens):
        return self.head(self.fire(self.embed(tokens)).mean(-2))


@pytest.mark.parametrize("mode", MODES)
def test_token_ids_that_are_the_same_at_every_step_are_served(mode):
    torch.manual_seed(0)
    net, tokens = Text().double(), torch.randint(0, 9, (3, 4)).expand(1, 3, 4)
    bptt, rate = (train_step(attached(net, m, 1, mode), tokens, labels(), mode).grads for m in ("bptt", "rate"))
    assert_same_gradients(rate, bptt, 1e-9)
    assert gradients(net)["head.weight"] is None
    mean_output(attached(net, "rate", 4, mode), tokens.expand(4, 3, 4), mode)


def test_a_forward_that_loops_over_its_steps_does_what_it_does_with_bptt():
    net, found = Wrapped(lambda body, x: body(torch.stack([x[t] * (t + 1) for t in range(3)]))), []
    for setting in (bptt_model_setting, functools.partial(rate_model_setting, windows=3)):
        found.append(train_step(setting(copy.deepcopy(net), 3), images(3), labels(), "m"))
    assert_same_gradients(found[1].grads, found[0].grads, 1e-9)


class Keeps(base.MemoryModule):
    def __init__(self):
        super().__init__()
        self.register_memory("kept", 0.0)


def everything() -> nn.Module:
    return nn.Sequential(layer.SynapseFilter(), tiny_net(), Keeps(), nn.SyncBatchNorm(2), lif_node(store_v_seq=True))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("m", {("0", "SynapseFilter"): False, ("2", "Keeps"): False, ("4", "LIFNode"): True}),
        ("s", dict.fromkeys([("0", "SynapseFilter"), ("2", "Keeps"), ("3", "SyncBatchNorm"), ("4", "LIFNode")], True)),
    ],
)
def test_all_problems_are_listed_at_once_and_the_network_is_left_alone(mode, expected):
    """Those that are refused, and those that run as with BPTT."""
    net = everything()
    found = problems(net, mode)
    assert {(p.name, p.kind): p.refused for p in found} == expected
    with pytest.raises(UnsupportedModuleError) as raised:
        rate_model_setting(net, 2, mode)
    assert raised.value.problems == [p for p in found if p.refused]
    assert all(f"'{p.name}' ({p.kind}): {p.reason}; {p.remedy}" in str(raised.value) for p in raised.value.problems)
    assert not any("forward" in vars(module) for module in net.modules())


class MyLinear(nn.Linear):
    pass


@rule_for(MyLinear)
class MyLinearRule(Rule):
    def spike(self, x):
        return self.original(x), self.mean(x)

    def rate(self, x, mean):
        torch.testing.assert_close(x.detach(), mean.view_as(x))
        return self.original(x)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_of_ones_own_is_served_by_a_registered_rule(mode):
    net = nn.Sequential(MyLinear(4, 8), lif_node(v_threshold=0.3), MyLinear(8, 5)).double()
    assert_rate_equals_bptt(net, torch.rand(1, 3, 4, dtype=torch.float64), labels(), mode)
    mean_output(attached(net, "rate", 3, mode), torch.rand(3, 3, 4, dtype=torch.float64), mode).sum().backward()


def test_a_second_rule_for_a_layer_is_refused():
    with pytest.raises(ValueError, match="MyLinear has a rule already"):
        rule_for(MyLinear)(Rule)
