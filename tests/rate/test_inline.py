"""What a forward does between its modules that depends on the number of steps, on chance, or on what it has changed."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
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
    cases,
    gradients,
    images,
    labels,
    lif_node,
    mean_output,
    outputs,
    randomise_batch_norms,
    tiny_net,
    train_step,
)
from util.rate.problem import NetworkError
from util.util import UnsupportedModuleError, rate_model_setting

T = 4

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


def drop_path(y, net, p=0.4):  # as timm's
    return y * y.new_empty((y.shape[0],) + (1,) * (y.dim() - 1)).bernoulli_(1 - p).div_(1 - p)


RANDOM = {
    "F.dropout": lambda y, net: F.dropout(y, 0.4, net.training),
    "F.dropout in place": lambda y, net: F.dropout(y * 1, 0.4, net.training, True),
    "beside a module": lambda y, net: F.dropout(net.drop(F.dropout(y, 0.2)), 0.4),
    "drop path": drop_path,
}


@pytest.mark.parametrize(("kind", "mode"), cases(RANDOM, MODES, known=[("F.dropout in place", "s")]))
def test_masks_are_served_by_their_mean(kind, mode):
    net = Wrapped(between(RANDOM[kind]))
    net.drop = nn.Dropout(0.3)
    assert_served(net, images(3), mode)
    if kind != "beside a module":
        saved = [bytes_saved(net, images(steps), "rate", mode) for steps in (2, 4)]
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


NOISE = {
    "rand_like": lambda y, net: y + torch.rand_like(y),
    "randn": lambda y, net: y + torch.randn(y.shape, dtype=y.dtype),
    "rrelu": lambda y, net: F.rrelu(y - 0.5, training=True),
    "attention's dropout": lambda y, net: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5),
}


@pytest.mark.parametrize(("kind", "mode"), cases(NOISE, MODES))
def test_other_draws_are_served_and_at_several_single_steps_refused(kind, mode):
    net = Wrapped(between(NOISE[kind]))
    assert_served(net, images(3 if mode == "m" else 1), mode)
    if mode == "s":
        with pytest.raises(NetworkError, match=r"draws anew at each step.*use step mode 'm'"):
            mean_output(attached(net, "rate", T, "s"), images(T), "s")


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_left_out_by_chance_is_served(mode):
    net = Wrapped(between(lambda y, net: y * (1 if torch.rand(()) < 0.5 else 2)))
    assert_served(net, images(3 if mode == "m" else 1), mode)


class Counts(nn.Module):
    """Scales by a number that rises with every forward."""

    def __init__(self, how):
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.how = how

    def forward(self, x):
        new = 0.9 * self.scale + 0.5
        if self.how == "replaced":
            self.scale = new
        else:
            (self.scale.data if self.how == ".data" else self.scale).copy_(new)
        return x * self.scale.clone()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("trace", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.trace = 0.5 * self.trace + x.mean()
        return x + self.trace


BUFFERS = {
    "in place": lambda: Counts("in place"),
    "replaced": lambda: Counts("replaced"),
    ".data": lambda: Counts(".data"),
    "with a graph": Remembers,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(5, 5)),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
}


def with_tail(kind):
    torch.manual_seed(0)
    net = Wrapped(lambda net, x: net.tail(net.body(x)))
    net.tail = BUFFERS[kind]().double()
    return net


@pytest.mark.parametrize(("kind", "mode"), cases(BUFFERS, MODES, known=[("instance norm", "s")]))
def test_a_buffer_that_changes_in_every_forward_changes_once_a_step(kind, mode):
    several = mode == "m" or kind == "instance norm"
    assert_served(with_tail(kind), images(3 if several else 1), mode)


@pytest.mark.parametrize(
    "kind", ["in place", "replaced", ".data", "with a graph", "spectral norm", "old spectral norm"]
)
def test_buffers_that_differ_at_each_single_step_are_refused_unless_they_are_held(kind):
    net = attached(with_tail(kind), "rate", 3, "s")
    with pytest.raises(NetworkError, match=r"at step [23] the network's forward .*use step mode 'm'"):
        outputs(net, images(3), "s")
    if "norm" in kind:
        functional.reset_net(net)
        net.tail.eval()
        assert mean_output(net, images(3), "s").requires_grad


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


@pytest.mark.parametrize(("mode", "dropout"), cases(MODES, [0.0, 0.3]))
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_within_one_step_is_served(mode, batch_first, dropout):
    x = torch.rand(T, 3, 4, 6, dtype=torch.float64) * 3
    assert_served(Attends(batch_first, dropout).double(), x if mode == "m" or not dropout else x[:1], mode)


def test_dropout_within_attention_is_refused_at_several_single_steps():
    net = attached(Attends(dropout=0.3).double(), "rate", T, "s")
    with pytest.raises(NetworkError, match=r"draws anew at each step .*use step mode 'm'"):
        outputs(net, torch.rand(T, 3, 4, 6, dtype=torch.float64), "s")


class Loops(nn.Module):
    """The tutorials' loop over time inside forward."""

    def __init__(self, resets=False):
        super().__init__()
        self.inner, self.resets = tiny_net(), resets

    def forward(self, x):
        if self.resets:
            functional.reset_net(self)
        return sum(self.inner(x) for _ in range(T)) / T


def test_a_loop_over_time_is_told_to_attach_the_inner_network():
    with pytest.raises(UnsupportedModuleError, match=r"attach the network inside the loop.*mode 's'"):
        rate_model_setting(Loops(), T, "s")(images(1)[0])


@pytest.mark.parametrize("resets", [False, True])
def test_the_inner_network_of_a_loop_trains_as_by_itself(resets):
    net, x = Loops(resets), images(1)[0]
    rate_model_setting(net.inner, T, "s")
    F.cross_entropy(net(x), labels()).backward()
    expected = train_step(attached(tiny_net(), "rate", T, "s"), x.expand(T, *x.shape), labels(), "s")
    assert_same_gradients(gradients(net.inner), expected.grads, 1e-12)


def counts(net, x):
    net.calls = getattr(net, "calls", 0) + 1
    return net.body(x * net.calls)


def test_numbers_that_a_forward_counts_are_those_of_bptt():
    net = Wrapped(counts)
    for _ in range(2):
        assert_served(net, images(3))
        net.calls = 1
    trained = attached(net, "rate", 3, "m")
    trained(images(3))
    assert trained.calls == 2


def test_a_number_that_differs_at_each_single_step_is_refused():
    with pytest.raises(NetworkError, match="step mode 's'"):
        outputs(attached(Wrapped(counts), "rate", 3, "s"), images(3), "s")


NOT_TIME = {
    "a token for each image": lambda y, net: y + net.token.expand(y.shape[-4], -1, -1, -1),
    "a token beside each image": lambda y, net: torch.cat(
        [y.flatten(0, -4), net.token.expand(y.shape[:-3].numel(), -1, -1, -1)], 1
    )[:, :4].view_as(y),
    "weights tiled": lambda y, net: F.conv2d(y.flatten(0, -4), net.token[..., :1, :1].repeat(4, 1, 1, 1)).view_as(y),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NOT_TIME)
def test_a_repetition_t_times_that_is_not_of_time_is_left_alone(kind, mode):
    """With as many images, or channels, as time steps."""
    net = Wrapped(between(NOT_TIME[kind]))
    net.token = nn.Parameter(torch.rand(1, 4, 6, 6, dtype=torch.float64))
    assert_served(net, images(T, T), mode)
