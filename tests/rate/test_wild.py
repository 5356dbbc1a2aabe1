"""What other people's forwards did, found by trying: outputs, buffers and gradients are BPTT's, or it is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from util.util import rate_model_setting, rate_of

from .method_helpers import Wrapped, assert_served, images, lif_node, tiny_net


class RunningMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor) -> Tensor:
        mean.mul_(0.9).add_(0.1 * x.mean())
        return x - mean

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class Holding(neuron.LIFNode):
    """A neuron that holds a layer."""

    def __init__(self, held: nn.Module):
        super().__init__(
            tau=1.25, decay_input=False, v_reset=None, v_threshold=0.3, surrogate_function=lif_node().surrogate_function
        )
        self.held = held

    def single_step_forward(self, x: Tensor) -> Tensor:
        return super().single_step_forward(self.held(x))

    def multi_step_forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.single_step_forward(step) for step in x])


def net_of(function) -> Wrapped:
    net = Wrapped(lambda net, x: net.body[3:](function(net.body[:3](x), net)))
    net.body = tiny_net()
    net.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8).double())
    net.register_buffer("mean", torch.zeros((), dtype=torch.float64))
    return net


def chunks(y: Tensor, net: nn.Module) -> Tensor:
    a, b = net.scale.chunk(2)
    return y * (a * b).view(4, 1, 1)


def transposed(y: Tensor, net: nn.Module) -> Tensor:
    return lif_in(net)(y.transpose(-1, -2)).view(*y.shape[:-2], -1).view_as(y)


def lif_in(net: nn.Module) -> nn.Module:
    return net.body.fire1


def set_data(y: Tensor, net: nn.Module) -> Tensor:
    y = y * 1.5
    y.data = y.data.round()
    return y


def set_weights(y: Tensor, net: nn.Module) -> Tensor:
    net.scale.data = F.normalize(net.scale.data, dim=0)
    return y * net.scale[:4].view(4, 1, 1)


def averaged(y: Tensor, net: nn.Module) -> Tensor:
    net.mean.mul_(0.9).add_(y.data.mean(), alpha=0.1)
    return y


def running(y: Tensor, net: nn.Module) -> Tensor:
    return RunningMean.apply(y, net.mean)


def detached(y: Tensor, net: nn.Module) -> Tensor:
    return (y * 2).detach_() + y


def own_generator(y: Tensor, net: nn.Module) -> Tensor:
    return y * torch.bernoulli(torch.sigmoid(y), generator=torch.Generator().manual_seed(1))


SERVED = {
    "m": (chunks, averaged, set_data, set_weights, detached),
    "s": (chunks, averaged, detached),
}


@pytest.mark.parametrize(("mode", "function"), [(m, f) for m in SERVED for f in SERVED[m]])
def test_it_is_served_as_bptt(mode, function):
    assert_served(net_of(function), images(2), mode)


@pytest.mark.parametrize("function", [set_data, set_weights, own_generator])
def test_single_step_mode_refuses_what_it_cannot_see(function):
    net = rate_model_setting(net_of(function), 1, "s")
    with pytest.raises(ValueError, match=r"step mode 's'.*use step mode 'm'"):
        net(images(1)[0])


def test_a_function_that_changes_a_buffer_does_so_once():
    """In the call that makes rates it runs a second time, on a copy."""
    assert_served(net_of(running), images(1), "s")


def test_what_is_made_by_torch_jit_alone_is_refused_in_single_step_mode():
    swish = torch.jit.trace(lambda x: x * x.sigmoid(), torch.rand(3, 5, dtype=torch.float64))
    net = rate_model_setting(Wrapped(lambda net, x: swish(net.body(x))), 1, "s")
    with pytest.raises(ValueError, match="no hook sees"):
        net(images(1)[0])


def test_an_input_changed_in_place_is_changed_once():
    for mode in "ms":
        x = images(1)
        net = rate_model_setting(Wrapped(lambda net, x: net.body(x.mul_(2))), 1, mode)
        net(x if mode == "m" else x[0])
        torch.testing.assert_close(x, 2 * images(1))


def test_spikes_lie_in_memory_as_bptt_s():
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.body[:2](x).transpose(-1, -2)
        y = net.body.fire1(y)
        return net.body[3:](y.view(*y.shape[:-2], -1).view_as(y))

    assert_served(Wrapped(forward), images(2), "m")


@pytest.mark.parametrize("held", [nn.LayerNorm(6), nn.BatchNorm2d(4, affine=False), nn.PReLU(), nn.Dropout(0.3)])
def test_a_neuron_that_holds_a_layer_runs_as_with_bptt_or_is_refused(held):
    net = tiny_net()
    net.fire1 = Holding(held).double()
    assert_served(net, images(2), "m")
    with pytest.raises(TypeError, match=r"holds a layer.*use step mode 'm'"):
        rate_model_setting(net, 2, "s")(images(2)[0])


def test_a_setting_that_is_refused_leaves_the_one_before():
    net = rate_model_setting(tiny_net(), 4, "m")
    with pytest.raises(ValueError, match="nope"):
        rate_model_setting(net, 2, "s", timeless=["nope"])
    assert net(images(4)).shape[0] == 4
    assert net.fire1.step_mode == "m"


def test_potentials_may_be_set_to_numbers_between_windows():
    net = rate_model_setting(tiny_net(), 4, "s", windows=2)
    for step in range(4):
        if step == 2:
            net.fire1.v = 0.0
        out = net(images(4)[step])
    out.sum().backward()


def test_a_module_rule_is_not_asked_for_what_has_no_rate():
    """Behind a function that mixes time its T steps are differentiated, folded into the batch or not."""
    net = Wrapped(lambda net, x: net.body[3:](net.body[:3](x).cumsum(0)))
    assert_served(net, images(2), "m")


@pytest.mark.parametrize("mode", ["m", "s"])
def test_norms_by_keyword(mode):
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.body[:2](x)
        y = y.flatten(0, 1) if mode == "m" else y
        y = F.layer_norm(F.group_norm(y, num_groups=2, eps=1e-4), normalized_shape=(6, 6), eps=1e-3)
        return net.body[2:](y.unflatten(0, (-1, 3)) if mode == "m" else y)

    assert_served(Wrapped(forward), images(2), mode)


def test_inference_mode_and_lazy_layers_are_refused_in_words():
    net = rate_model_setting(Wrapped(lambda net, x: (net.body(x), looked(x))[0]), 1, "m")
    with pytest.raises(ValueError, match=r"use torch\.no_grad"):
        net(images(1))
    with pytest.raises(ValueError, match="run the network once"):
        rate_model_setting(nn.Sequential(layer.Conv2d(2, 4, 3), lif_node(), nn.LazyLinear(3)), 1, "m")


def looked(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.mean(-1) * 2


def test_the_network_is_copied_after_a_buffer_took_its_data():
    net = rate_model_setting(net_of(averaged), 1, "s")
    net(images(1)[0]).sum().backward()
    functional.reset_net(net)
    assert not net.mean.requires_grad
    copy.deepcopy(net)


class Noisy(neuron.LIFNode):
    def __init__(self):
        super().__init__(tau=1.25, v_threshold=0.3)

    def single_step_forward(self, x: Tensor) -> Tensor:
        return super().single_step_forward(x + 0.3 * torch.randn_like(x))

    def multi_step_forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.single_step_forward(step) for step in x])


def test_a_random_neuron_runs_as_with_bptt_or_is_refused():
    net = tiny_net()
    net.fire1 = Noisy()
    assert_served(net, images(2), "m")
    with pytest.raises(TypeError, match=r"its step is random.*use step mode 'm'"):
        rate_model_setting(net, 2, "s")(images(2)[0])


def test_a_rate_read_in_single_step_mode_leaves_the_output_s_graph():
    """Also where a window is one step and the input needs a gradient."""

    def gradients(look) -> list[Tensor]:
        x = images(1)[0].requires_grad_()
        net = rate_model_setting(Wrapped(lambda net, x: net.body[3:](look(net.body[:3](x)))), 1, "s")
        net(x).square().sum().backward()
        return [x.grad, net.body.conv1.weight.grad]

    torch.testing.assert_close(gradients(lambda y: (rate_of(y), y)[1]), gradients(lambda y: y))
