"""What a forward does with its steps, by chance, or to what it keeps: served, or refused in step mode 's'."""

import functools
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from tests.rate.method_helpers import (
    MODES,
    SETTING,
    Wrapped,
    assert_same_gradients,
    assert_served,
    attached,
    between,
    bytes_saved,
    gradients,
    images,
    labels,
    lif_node,
    outputs,
    randomise_batch_norms,
    tiny_net,
    train_step,
)  # fmt: skip
from util.rate.problem import NetworkError
from util.util import UnsupportedModuleError, rate_model_setting

T = 4


class Layers(Wrapped):
    """A forward's ``function(self, x)`` with some layers to use."""

    def __init__(self, function, body=None, tail=None):
        super().__init__(function, body)
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.full((4,), 0.25))
        self.token = nn.Parameter(torch.rand(1, 4, 6, 6))
        self.drop, self.drop_, self.tail = nn.Dropout(0.3), nn.Dropout(0.4, inplace=True), tail or nn.Identity()
        self.attend, self.lstm = nn.MultiheadAttention(5, 1), nn.LSTM(5, 5)
        self.norm = nn.InstanceNorm2d(4, track_running_stats=True)
        self.double()


def of_output(function):
    return lambda net, x: function(net.body(x), net)


def batch_major(y, net):
    """Folds time into the batch the wrong way round, [B * T, ...]."""
    return y.transpose(0, 1).reshape(-1, *y.shape[2:]).view_as(y)


def attention_over_time(y, net):
    flat = y.flatten(1)
    return ((flat @ flat.T / flat.shape[1]).softmax(-1) @ flat).view_as(y)


def folded(function, d):
    """``function`` of the images of all steps, [T * B, ...] or with d = 1 [B * T, ...]."""
    return lambda net, x: net.body(
        function((y := x.transpose(0, d)).flatten(0, 1)).unflatten(0, y.shape[:2]).transpose(0, d)
    )


def drop_path(y, net, p=0.4):  # as timm's
    return y * y.new_empty((y.shape[0],) + (1,) * (y.dim() - 1)).bernoulli_(1 - p).div_(1 - p)


class Counts(nn.Module):
    """Scales by a number that rises with every forward."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.how = how

    def forward(self, x):
        scale = self.scale.data if self.how == ".data" else self.scale
        self.scale = 0.9 * scale + 0.5 if self.how == "replaced" else scale.copy_(0.9 * scale + 0.5)
        return x * self.scale.clone()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("trace", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.trace = 0.5 * self.trace + x.mean()
        return x + self.trace


class Adapts(neuron.LIFNode):
    """Its threshold rises with each spike, in an attribute that SpikingJelly knows nothing of."""

    theta = 0.0

    def single_step_forward(self, x):
        self.v = self.v + (x - self.v) / self.tau
        s = self.surrogate_function(self.v - 1 - self.theta)
        self.theta = 0.5 * self.theta + 0.2 * s.detach()
        return s


class OtherInMultiStep(neuron.IFNode):
    def single_step_forward(self, x):
        return super().single_step_forward(x)

    def multi_step_forward(self, x_seq):
        return super().multi_step_forward(x_seq) * 0.5


def computes_threshold(net, x):
    net.body.fire1.v_threshold = net.weights[0].exp()
    return net.body(x)


def drops_in_place(net, x):
    y = net.body[:2](x)
    return net.body[2:](y + net.drop_(y))


def counts(net, x):
    net.calls = getattr(net, "calls", 0) + 1
    return net.body(x * net.calls)


def with_tail(tail):
    return lambda: Layers(lambda net, x: net.tail(net.body(x)), tail=tail())


def put_on(how):
    net = tiny_net()
    if how == "subclass":
        forward = {"forward": lambda self, x: nn.Sequential.forward(self, x.cumsum(0))}
        net.__class__ = type("Mine", (nn.Sequential,), forward)
    elif how == "forward hook":
        net.conv2.register_forward_hook(lambda module, args, out: out.cumsum(0))
    else:
        net.conv2.forward = MethodType(lambda self, x: type(self).forward(self, x.cumsum(0)), net.conv2)
    return net


IN_BOTH_MODES = {
    "masks of F.dropout": between(lambda y, net: F.dropout(y, 0.4, net.training)),
    "masks in place": between(lambda y, net: F.dropout(y * 1, 0.4, net.training, True)),
    "masks of a module in place": drops_in_place,
    "masks beside a module": between(lambda y, net: F.dropout(net.drop(F.dropout(y, 0.2)), 0.4)),
    "drop path": between(drop_path),
    "token for each image": between(lambda y, net: y + net.token.expand(y.shape[-4], -1, -1, -1)),
    "token beside each image": between(lambda y, net: torch.cat(
        [y.flatten(0, -4), net.token.expand(y.shape[:-3].numel(), -1, -1, -1)], 1)[:, :4].view_as(y)),
    "weights tiled": between(
        lambda y, net: F.conv2d(y.flatten(0, -4), net.token[..., :1, :1].repeat(4, 1, 1, 1)).view_as(y)),
    "centred in space": lambda net, x: net.body(x - x.mean((-1, -2), keepdim=True)),
    "instance norm": between(lambda y, net: net.norm(y.flatten(0, -4)).view_as(y)),
    "settled spectral norm": with_tail(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)).eval()),
}  # fmt: skip
DRAWS, OTHER, EARLIER = "draws anew at each step", "at step [2-4] the network's forward", "what earlier steps left"
IN_MULTI_STEP_MODE = {  # and, where there is a message, in step mode 's' at T = 1
    "rand_like": (between(lambda y, net: y + torch.rand_like(y)), DRAWS),
    "randn": (between(lambda y, net: y + torch.randn(y.shape, dtype=y.dtype)), DRAWS),
    "rrelu": (between(lambda y, net: F.rrelu(y - 0.5, training=True)), DRAWS),
    "dropout of attention": (between(lambda y, net: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5)), DRAWS),
    "layer left out by chance": (between(lambda y, net: y * (1 if torch.rand(()) < 0.5 else 2)), None),
    "buffer in place": (with_tail(lambda: Counts("in place")), OTHER),
    "buffer replaced": (with_tail(lambda: Counts("replaced")), OTHER),
    "buffer's .data": (with_tail(lambda: Counts(".data")), OTHER),
    "buffer with a graph": (with_tail(Remembers), OTHER),
    "spectral norm": (with_tail(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))), OTHER),
    "old spectral norm": (with_tail(lambda: nn.utils.spectral_norm(nn.Linear(5, 5))), OTHER),
    "counter": (counts, OTHER),
    "neuron with another memory": (lambda: tiny_net(lambda: Adapts(v_threshold=0.3)), None),
    "neuron of other multi-steps": (lambda: tiny_net(lambda: OtherInMultiStep(v_threshold=0.3)), None),
    "threshold computed from parameters": (computes_threshold, None),
    **{f"cumsum by {how}": (functools.partial(put_on, how), None) for how in ("subclass", "forward hook", "instance")},
    "mean": (of_output(lambda y, net: y.mean(0)), None),
    "sum": (of_output(lambda y, net: y.sum(0)), None),
    "sum / T": (of_output(lambda y, net: y.transpose(0, 1).sum(1) / len(y)), None),
    "log-softmax of the sum": (of_output(lambda y, net: torch.sum(y, 0).log_softmax(-1)), None),
    "sum in a loop": (of_output(lambda y, net: sum(y)), None),
    "last step": (of_output(lambda y, net: y[-1]), None),
    "cumulated output": (of_output(lambda y, net: y.cumsum(0)), None),
    "deviation": (of_output(lambda y, net: y.mean(0) + y.var(0, unbiased=False)), None),
    "max": (of_output(lambda y, net: y.max(0)[0]), None),
    "amax": (of_output(lambda y, net: y.amax(dim=0)), None),
    "median": (of_output(lambda y, net: torch.median(y, 0)[0]), None),
    "sort": (of_output(lambda y, net: y.sort(0)[0][-1]), None),
    "logsumexp": (of_output(lambda y, net: y.permute(1, 2, 0).logsumexp(-1)), None),
    "weights of each step": (of_output(lambda y, net: (y * net.weights[: len(y)].view(-1, 1, 1)).sum(0)), None),
    "attention head": (of_output(lambda y, net: net.attend(y, y, y)[0]), None),
    "LSTM head": (of_output(lambda y, net: net.lstm(y)[0]), None),
    "choices within a step": (of_output(
        lambda y, net: torch.max(y, torch.zeros_like(y[:1, :1, :1])) + y.max(-1, keepdim=True)[0]), None),
    "cumulated input": (lambda net, x: net.body(x.cumsum(0)), None),
    "differences": (lambda net, x: net.body(x - F.pad(x, (0, 0) * 4 + (1, 0))[:-1]), None),
    "numbered steps": (lambda net, x: net.body(x * torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1, 1)), None),
    "delay": (between(lambda y, net: y.roll(1, 0)), None),
    "delay behind a closed gate": (between(lambda y, net: y + (net.weights[0] - 0.25) * y.roll(1, 0)), None),
    "steps know of later ones": (between(lambda y, net: torch.cat([y[:-1] + y[1:], y[-1:]])), None),
    "half as many steps": (between(lambda y, net: y.unflatten(0, (-1, 2)).mean(1) if len(y) > 1 else y), None),
    "turned around": (between(lambda y, net: y.flip(0)), None),
    "softmax over time": (between(lambda y, net: y.softmax(0)), None),
    "cumulated": (between(lambda y, net: y.cumsum(0)), None),
    "attention over time": (between(attention_over_time), None),
    "batch first": (between(batch_major), None),
    "[T * B]": (folded(F.gelu, 0), None),
    "[B * T]": (folded(F.gelu, 1), None),
    "convolution of [B * T]": (folded(lambda x: F.conv2d(x, torch.full((2, 2, 1, 1), 0.3).double()), 1), None),
    "group norm of [B * T]": (folded(lambda x: F.group_norm(x, 1), 1), None),
}  # fmt: skip


def net_of(made):
    """Of a forward(net, x), or of a function that makes the network."""
    return Layers(made) if getattr(made, "__code__", None) and made.__code__.co_argcount == 2 else made()


@pytest.mark.parametrize("batch", [2, T, "static"])  # T images could be taken for T steps
@pytest.mark.parametrize("kind", IN_MULTI_STEP_MODE | IN_BOTH_MODES)
def test_any_forward_is_served_in_multi_step_mode(kind, batch):
    x = images(T, 2 if batch == "static" else batch)
    made = IN_BOTH_MODES[kind] if kind in IN_BOTH_MODES else IN_MULTI_STEP_MODE[kind][0]
    assert_served(net_of(made), (3 if "neuron" in kind else 1) * (x[:1].expand_as(x) if batch == "static" else x))


@pytest.mark.parametrize("kind", IN_BOTH_MODES)
def test_what_each_step_does_alike_is_served_in_single_step_mode(kind):
    assert_served(net_of(IN_BOTH_MODES[kind]), images(T, T), "s")


@pytest.mark.parametrize("kind", [kind for kind, (_, message) in IN_MULTI_STEP_MODE.items() if message])
def test_what_each_step_does_otherwise_is_served_at_one_single_step_and_refused_at_more(kind):
    made, message = IN_MULTI_STEP_MODE[kind]
    assert_served(net_of(made), images(1, 2), "s")
    with pytest.raises(NetworkError, match=rf"{message}.*use step mode 'm'"):
        outputs(attached(net_of(made), "rate", T, "s"), images(T), "s")


NO_NEURONS = {
    "neuron with another memory": "changes 'theta', which is no memory",
    "threshold computed from parameters": "its v_threshold is computed from parameters",
}


@pytest.mark.parametrize(("kind", "reason"), NO_NEURONS.items())
def test_a_neuron_that_has_no_elementwise_derivative_is_refused_in_single_step_mode(kind, reason):
    net = rate_model_setting(net_of(IN_MULTI_STEP_MODE[kind][0]), 2, "s")
    with pytest.raises(UnsupportedModuleError, match=rf"fire1' .*{reason}"):
        net(3 * images(1)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["masks of F.dropout", "drop path"])
def test_masks_cost_one_step(kind, mode):
    saved = [bytes_saved(Layers(IN_BOTH_MODES[kind]), images(steps), "rate", mode) for steps in (2, 4)]
    assert saved[1] == saved[0]


@pytest.mark.parametrize("mode", MODES)
def test_functional_dropout_is_dropout_as_a_module(mode):
    found = []
    for drop in (lambda y, net: net.drop(y), lambda y, net: F.dropout(y, 0.4)):
        net = Wrapped(between(drop))
        net.drop = nn.Dropout(0.4)
        torch.manual_seed(5)
        found.append(train_step(attached(net, "rate", T, mode), images(T), labels(), mode).grads)
    assert_same_gradients(found[1], found[0], 1e-12)


def test_several_outputs_are_those_of_bptt():
    net, x = Wrapped(lambda net, x: {"steps": net.body(x), "energy": x.square().mean()}), images(4)
    expected = attached(net, "bptt", 4, "m")(x)
    torch.testing.assert_close(attached(net, "rate", 4, "m")(x), expected, rtol=1e-12, atol=1e-12)


REPEATS = {
    "unsqueeze, repeat": lambda x: x.unsqueeze(0).repeat(T, 1, 1, 1, 1),
    "expand": lambda x: x.expand(T, *x.shape),
    "unsqueeze, expand": lambda x: x.unsqueeze(0).expand(T, -1, -1, -1, -1),
    "stack": lambda x: torch.stack([x] * T),
    "stack of views": lambda x: torch.cat([x.unsqueeze(0) for _ in range(T)]),
    "repeat_interleave": lambda x: x.unsqueeze(0).repeat_interleave(T, 0),
    "expand_as": lambda x: x.unsqueeze(0).expand_as(x.new_empty(T, *x.shape)),
    "folded": lambda x: x.repeat(T, 1, 1, 1).unflatten(0, (-1, len(x))),
    "batch first": lambda x: x.unsqueeze(1).repeat(1, T, 1, 1, 1).transpose(0, 1),
    "worked on in place": lambda x: x.unsqueeze(0).repeat(T, 1, 1, 1, 1).mul_(2).div_(2),
    "where there are four dimensions": lambda x: x.unsqueeze(0).repeat(T, 1, 1, 1, 1) if x.dim() == 4 else x,
}


@pytest.mark.parametrize("windows", [1, T])
@pytest.mark.parametrize("b", [3, T])  # a batch of T images looks like one image over time
@pytest.mark.parametrize("kind", REPEATS)
def test_a_forward_that_repeats_its_image_trains_as_the_network_behind_it(kind, b, windows):
    x, y, found = images(1, b)[0], labels(b), []
    repeats = Wrapped(lambda net, x: net.body(REPEATS[kind](x)))
    for net, x_ in ((Wrapped(lambda net, x: net.body(x)), x.expand(T, *x.shape)), (repeats, x)):
        out = rate_model_setting(net, T, windows=windows)(x_)
        assert out.shape[0] == T
        F.cross_entropy(out.mean(0), y).backward()
        found.append(gradients(net.body))
    assert_same_gradients(found[1], found[0], 1e-10)


class StemInFront(nn.Module):
    """As in SEW-ResNet: the first convolution sees the image once, and its result is repeated; or [T, B, ...]."""

    def __init__(self, steps=T, unsqueeze="unsqueeze_"):
        super().__init__()
        torch.manual_seed(0)
        self.T, self.unsqueeze, self.conv, self.bn = steps, unsqueeze, nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.fire, self.conv2 = lif_node(), layer.SeqToANNContainer(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fire2, self.head = lif_node(), nn.Linear(16, 5)
        randomise_batch_norms(self).double()

    def forward(self, x):
        y = self.bn(self.conv(x.flatten(0, -4)))
        y = (
            y.view(*x.shape[:2], *y.shape[1:])
            if x.dim() == 5
            else getattr(y, self.unsqueeze)(0).repeat(self.T, 1, 1, 1, 1)
        )
        return self.head(self.fire2(self.conv2(self.fire(y))).flatten(2).mean(0))


@pytest.mark.parametrize(("steps", "windows"), [(1, 1), (T, 1), (T, T)])
@pytest.mark.parametrize("b", [3, T])
def test_layers_in_front_of_the_repetition_get_their_gradients(b, steps, windows):
    x, found = images(1, b)[0], []
    for method, options in (
        ("bptt", {}),
        ("rate", {"windows": windows, "timeless": ["x"]}),
        ("rate", {"windows": windows}),
    ):
        net = SETTING[method](StemInFront(steps), steps, **options)
        F.cross_entropy(
            net(x if "timeless" in options or method == "bptt" else x.expand(steps, *x.shape)), labels(b)
        ).backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[2], 1e-9)
    if steps == windows:
        assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("unsqueeze", ["unsqueeze", "unsqueeze_"])
def test_a_stem_on_a_batch_of_t_images_has_to_be_told_that_they_are_no_steps(unsqueeze):
    with pytest.raises(NetworkError, match=r"taken for time.*timeless="):
        rate_model_setting(StemInFront(T, unsqueeze), T)(images(1, T)[0])


def test_an_input_without_time_that_is_not_repeated_is_refused():
    net = rate_model_setting(Wrapped(lambda net, x: net.body(x)), T)
    with pytest.raises(ValueError, match=r"gets inputs of shape \[\[3, 2, 6, 6\]\], none of them \[T = 4, ...\]"):
        net(images(1)[0])


class Attends(nn.Module):
    """Self-attention among the tokens of one step."""

    def __init__(self, batch_first=True, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fire = layer.Linear(6, 8), lif_node(v_threshold=0.2)
        self.attend = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=batch_first)
        self.norm, self.fire2, self.head = nn.LayerNorm(8), lif_node(v_threshold=0.2), layer.Linear(8, 5)

    def forward(self, x):  # [T, B, L, 6] or [B, L, 6]
        y = self.fire(self.first(x))
        z = y.flatten(0, -3)  # [T * B, L, 8]
        if not self.attend.batch_first:
            z = z.transpose(0, 1)
        z = self.attend(z, z, z, need_weights=False)[0]
        z = (z if self.attend.batch_first else z.transpose(0, 1)).view_as(y)
        return self.head(self.fire2(self.norm(z) + y).mean(-2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_within_one_step_is_served(mode, batch_first, dropout):
    net, x = Attends(batch_first, dropout).double(), torch.rand(T, 3, 4, 6, dtype=torch.float64) * 3
    assert_served(net, x if mode == "m" or not dropout else x[:1], mode)
    if mode == "s" and dropout:
        with pytest.raises(NetworkError, match=rf"{DRAWS}.*use step mode 'm'"):
            outputs(attached(net, "rate", T, "s"), x, "s")


class Loops(nn.Module):
    """The tutorials' loop over time inside forward."""

    def __init__(self, resets=False):
        super().__init__()
        self.inner, self.resets = tiny_net(), resets

    def forward(self, x):
        if self.resets:
            functional.reset_net(self)
        return sum(self.inner(x) for _ in range(T)) / T


@pytest.mark.parametrize("resets", [False, True])
def test_the_inner_network_of_a_loop_trains_as_by_itself(resets):
    net, x = Loops(resets), images(1)[0]
    rate_model_setting(net.inner, T, "s")
    F.cross_entropy(net(x), labels()).backward()
    expected = train_step(attached(tiny_net(), "rate", T, "s"), x.expand(T, *x.shape), labels(), "s")
    assert_same_gradients(gradients(net.inner), expected.grads, 1e-12)
