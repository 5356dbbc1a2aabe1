"""What people do around a network: exact, or an error that names module, reason and remedy; nothing in between."""

import copy
import functools
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, monitor, neuron
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.rate.method_helpers import (
    MODES,
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


class TriedOut(nn.Sequential):
    """A forward of one's own, which is looked at."""


@pytest.mark.parametrize("kind", [nn.Sequential, TriedOut])
@pytest.mark.parametrize("mode", MODES)
def test_a_monitor_sees_the_spiking_steps_and_no_other_pass(mode, kind):
    records = {}
    for method in ("bptt", "rate"):
        net = attached(kind(OrderedDict(tiny_net().named_children())), method, 3, mode)
        seen = monitor.OutputMonitor(net, neuron.LIFNode)
        train_step(net, images(3), labels(), mode)
        records[method] = [record.detach() for record in seen["fire2"]]
    torch.testing.assert_close(records["rate"], records["bptt"], rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_hook_that_changes_an_output_acts_in_both_passes(mode):
    nets = [attached(tiny_net(), method, 1, mode) for method in ("bptt", "rate")]
    for net in nets:
        net.conv2.register_forward_hook(lambda module, args, out: out * 2)
    bptt, rate = (train_step(net, images(1), labels(), mode).grads for net in nets)
    assert_same_gradients(rate, bptt, 1e-9)


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
    with pytest.raises(RuntimeError, match=r"functional\.reset_net"):
        mean_output(other, x, mode)
    assert_same_gradients(train_step(other, x, labels(), mode).grads, expected.grads, 0)
    assert all(p.grad is None for p in net.parameters())
    sum(out.sum() for out in outs).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_potential_of_a_copy_made_within_a_window_raises_in_backward():
    net = attached(tiny_net(), "rate", 2, "m")
    net(images(2))
    with pytest.raises(RuntimeError, match=r"no gradient of fire2\.v: this is a copy"):
        copy.deepcopy(net).fire2.v.sum().backward()
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_modules_run_again_in_backward_are_refused(reentrant, mode):
    def forward(body, x):
        y = body.fire1(body.bn1(body.conv1(x)))
        return body[6:](checkpoint(lambda y: body[3:6](y), y, use_reentrant=reentrant))

    net = attached(Wrapped(forward), "rate", 3, mode)
    # With reentrant checkpoints in step mode 's' torch itself refuses first.
    said = r"inputs. (parameter|argument)" if reentrant and mode == "s" else r"'body\.conv2'.*run again in backward"
    with pytest.raises((UnsupportedModuleError, RuntimeError), match=said):
        F.cross_entropy(mean_output(net, images(3), mode), labels()).backward()


@dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize("mode", MODES)
def test_a_dataclass_is_refused(mode):
    net = attached(Wrapped(lambda body, x: Output(body(x))), "rate", 1, mode)
    with pytest.raises(UnsupportedModuleError, match="returns a Output"):
        net(images(1) if mode == "m" else images(1)[0])


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


def test_a_forward_bound_to_the_number_of_steps_is_told_so():
    net = attached(Wrapped(lambda body, x: body(torch.stack([x[t] * 2 for t in range(3)]))), "rate", 3, "m")
    with pytest.raises(RuntimeError, match="number of steps from its input"):
        net(images(3))


def test_all_problems_are_listed_at_once_and_the_network_is_left_alone():
    net = nn.Sequential(nn.LSTM(2, 2), tiny_net(), nn.AlphaDropout(), nn.SyncBatchNorm(2))
    found = problems(net)
    assert [(p.name, p.kind, p.verdict) for p in found] == [
        ("0", "LSTM", "method"),
        ("2", "AlphaDropout", "project"),
        ("3", "SyncBatchNorm", "project"),
    ]
    with pytest.raises(UnsupportedModuleError) as raised:
        rate_model_setting(net, 2)
    assert all(f"'{p.name}' ({p.kind}): {p.reason}; {p.remedy}" in str(raised.value) for p in found)
    assert not any("forward" in vars(module) for module in net.modules())


def test_a_layer_of_ones_own_is_served_by_a_registered_rule_and_a_second_one_is_refused():
    class MyLinear(nn.Linear):
        pass

    rule_for(MyLinear)(type("MyLinearRule", (Rule,), {}))
    with pytest.raises(ValueError, match="MyLinear has an entry already"):
        rule_for(MyLinear)(Rule)
    net = nn.Sequential(MyLinear(4, 8), lif_node(), MyLinear(8, 5)).double()
    x = torch.rand(1, 3, 4, dtype=torch.float64)
    bptt, rate = (train_step(attached(net, m, 1, "m"), x, labels(), "m").grads for m in ("bptt", "rate"))
    assert_same_gradients(rate, bptt, 1e-9)
