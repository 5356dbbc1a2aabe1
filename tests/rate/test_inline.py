"""What a forward does between its modules that depends on the number of steps, or on chance: served, or refused."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
from torch import nn

from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    attached,
    gradients,
    images,
    labels,
    lif_node,
    mean_output,
    randomise_batch_norms,
    tiny_net,
    train_step,
)
from util.rate import UnsupportedModuleError, rate_model_setting

T = 4


class Wrapped(nn.Module):
    """A network whose forward is ``function(self, x)``."""

    def __init__(self, function, body=None, time_step=T):
        super().__init__()
        self.body, self.function, self.T = body or tiny_net(), function, time_step

    def forward(self, x):
        return self.function(self, x)


def seeded_grads(net, method, x, mode, time_step=None):
    torch.manual_seed(5)
    return train_step(attached(net, method, time_step or len(x), mode), x, labels(x.shape[1]), mode)


REPEATS = {
    "unsqueeze, repeat": lambda net, x: net.body(x.unsqueeze(0).repeat(net.T, 1, 1, 1, 1)),
    "expand": lambda net, x: net.body(x.expand(net.T, *x.shape)),
    "unsqueeze, expand": lambda net, x: net.body(x.unsqueeze(0).expand(net.T, -1, -1, -1, -1)),
    "stack": lambda net, x: net.body(torch.stack([x] * net.T)),
    "stack of views": lambda net, x: net.body(torch.cat([x.unsqueeze(0) for _ in range(net.T)])),
    "repeat_interleave": lambda net, x: net.body(x.unsqueeze(0).repeat_interleave(net.T, 0)),
    "expand_as": lambda net, x: net.body(x.unsqueeze(0).expand_as(x.new_empty(net.T, *x.shape))),
    "folded": lambda net, x: net.body(x.repeat(net.T, 1, 1, 1).unflatten(0, (-1, len(x)))),
    "batch first": lambda net, x: net.body(x.unsqueeze(1).repeat(1, net.T, 1, 1, 1).transpose(0, 1)),
    "worked on in place": lambda net, x: net.body(x.unsqueeze(0).repeat(net.T, 1, 1, 1, 1).mul_(2).div_(2)),
    "where there are four dimensions": lambda net, x: net.body(
        x.unsqueeze(0).repeat(net.T, 1, 1, 1, 1) if x.dim() == 4 else x
    ),
}


@pytest.mark.parametrize("b", [3, T])  # a batch of T images looks like one image over time
@pytest.mark.parametrize("kind", REPEATS)
def test_a_forward_that_repeats_its_image_trains_as_the_network_behind_it(kind, b):
    x, y = images(1, b)[0], labels(b)
    plain = attached(tiny_net(), "rate", T, "m")
    F.cross_entropy(plain(x.expand(T, *x.shape)).mean(0), y).backward()
    net = attached(Wrapped(REPEATS[kind]), "rate", T, "m")
    out = net(x)
    assert out.shape[0] == T
    F.cross_entropy(out.mean(0), y).backward()
    assert_same_gradients(gradients(net.body), gradients(plain), 1e-12)


class StemInFront(nn.Module):
    """As in SEW-ResNet: the first convolution sees the image once, and its result is repeated."""

    def __init__(self, time_step):
        super().__init__()
        torch.manual_seed(0)
        self.T, self.conv, self.bn = time_step, nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.fire, self.conv2 = lif_node(), layer.SeqToANNContainer(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.fire2, self.head = lif_node(), nn.Linear(16, 5)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y.unsqueeze_(0)
        y = self.fire(y.repeat(self.T, 1, 1, 1, 1))
        return self.head(self.fire2(self.conv2(y)).flatten(2).mean(0))


@pytest.mark.parametrize("b", [2, 3])
def test_layers_in_front_of_the_repetition_get_bptt_s_gradients_at_one_step(b):
    net, x, found = randomise_batch_norms(StemInFront(1)).double(), images(1, b)[0], []
    for method in ("bptt", "rate"):
        trained = attached(net, method, 1, "m")
        F.cross_entropy(trained(x), labels(b)).backward()
        found.append(gradients(trained))
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("b", [2, T])
def test_layers_in_front_of_the_repetition_do_not_cost_a_gradient(b):
    net, x = randomise_batch_norms(StemInFront(T)).double(), images(1, b)[0]
    by_hand = copy.deepcopy(net)
    by_hand.forward = lambda x: by_hand.head(
        by_hand.fire2(by_hand.conv2(by_hand.fire(by_hand.bn(by_hand.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))))
        .flatten(2)
        .mean(0)
    )
    F.cross_entropy(rate_model_setting(by_hand, T)(x.expand(T, *x.shape)), labels(b)).backward()
    F.cross_entropy(rate_model_setting(net, T)(x), labels(b)).backward()
    assert_same_gradients(gradients(net), gradients(by_hand), 1e-9)


def test_an_input_without_time_that_is_not_repeated_is_refused():
    net = rate_model_setting(Wrapped(lambda net, x: net.body(x)), T, "m")
    with pytest.raises(ValueError, match=r"gets an input of shape \[3, 2, 6, 6\], not \[T = 4, ...\]"):
        net(images(1)[0])


def test_attention_over_time_behind_the_repetition_is_refused():
    def mixes(net, x):
        y = net.body[:3](x.unsqueeze(0).repeat(net.T, 1, 1, 1, 1))
        return net.body[3:](y.cumsum(0))

    net = rate_model_setting(Wrapped(mixes), T, "m")
    with pytest.raises(UnsupportedModuleError, match=r"'body.conv2'.*mixes time steps"):
        net(images(1)[0])


SUMS = {
    "sum / T": (lambda net, x: net.body(x).sum(0) / net.T, lambda net, x: net.body(x).mean(0)),
    "sum": (lambda net, x: net.body(x).sum(dim=0), lambda net, x: net.body(x).mean(0) * net.T),
    "log-softmax of the sum": (
        lambda net, x: torch.sum(net.body(x), 0).log_softmax(-1),
        lambda net, x: (net.body(x).mean(0) * net.T).log_softmax(-1),
    ),
    "sum / length": (lambda net, x: net.body(x).sum(0) / len(x), lambda net, x: net.body(x).mean(0)),
}


@pytest.mark.parametrize("kind", SUMS)
def test_a_sum_over_time_has_the_gradient_of_the_mean_times_t(kind):
    sums, means = (seeded_grads(Wrapped(function), "rate", images(T), "m") for function in SUMS[kind])
    torch.testing.assert_close(sums.output, means.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(sums.grads, means.grads, 1e-12)


def drop_path(x, p=0.4):  # as timm's
    return x * x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - p).div_(1 - p)


RANDOM = {
    "F.dropout": lambda net, x: net.body[3:](F.dropout(net.body[:3](x), 0.4, net.training)),
    "F.dropout in place": lambda net, x: net.body[3:](F.dropout(net.body[:3](x) * 1, 0.4, net.training, True)),
    "F.dropout beside a module": lambda net, x: net.body[3:](
        F.dropout(net.drop(net.body[:3](F.dropout(x, 0.2, net.training))), 0.4, net.training)
    ),
    "a layer left out by chance": lambda net, x: net.body[3:](net.body[:3](x) * (1 if torch.rand(()) < 0.5 else 2)),
    "drop path": lambda net, x: net.body[3:](drop_path(net.body[:3](x))),
    "noise": lambda net, x: net.body(x + 0.1 * torch.randn_like(x)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", RANDOM)
def test_draws_of_the_forward_are_repeated_in_the_rate_pass(kind, mode):
    net = Wrapped(RANDOM[kind])
    net.drop = nn.Dropout(0.3)
    bptt, rate = (seeded_grads(net, method, images(1), mode) for method in ("bptt", "rate"))
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(rate.grads, bptt.grads, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_functional_dropout_is_dropout_as_a_module(mode):
    found = []
    for drop in (lambda net, y: net.drop(y), lambda net, y: F.dropout(y, 0.4, net.training)):
        net = Wrapped(lambda net, x, drop=drop: net.body[3:](drop(net, net.body[:3](x))))
        net.drop = nn.Dropout(0.4)
        found.append(seeded_grads(net, "rate", images(T), mode))
    torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found[1].grads, found[0].grads, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_drop_path_is_the_mean_of_its_masks(mode):
    """Beside it, a mask of the same numbers that a dropout module draws for [T or B, 1, 1, 1, ...]."""

    def by_module(net, x):
        y = net.body[:3](x)
        return net.body[3:](y * net.drop(y.new_ones((len(y),) + (1,) * (y.dim() - 1))))

    found = []
    for function in (RANDOM["drop path"], by_module):
        net = Wrapped(function)
        net.drop = nn.Dropout(0.4)
        found.append(seeded_grads(net, "rate", images(T), mode))
    torch.testing.assert_close(found[1].output, found[0].output, rtol=1e-12, atol=1e-12)
    assert_same_gradients(found[1].grads, found[0].grads, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_draws_of_which_there_is_no_mean_are_refused(mode):
    net = attached(Wrapped(lambda net, x: net.body(x + torch.rand_like(x))), "rate", T, mode)
    with pytest.raises(UnsupportedModuleError, match=r"rand_like, which draws other numbers .* F\.dropout"):
        mean_output(net, images(T), mode)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_that_begins_with_training_is_seen_then(mode):
    net = attached(Wrapped(RANDOM["F.dropout"]), "rate", 1, mode)
    functional.reset_net(net.eval())
    mean_output(net, images(1), mode).sum().backward()
    expected = seeded_grads(Wrapped(RANDOM["F.dropout"]), "bptt", images(1), mode)
    torch.manual_seed(5)
    assert_same_gradients(train_step(net.train(), images(1), labels(), mode).grads, expected.grads, 1e-9)


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


def spectral_norm():
    return nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))


def old_spectral_norm():
    return nn.utils.spectral_norm(nn.Linear(5, 5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Counts("in place"),
        lambda: Counts("replaced"),
        lambda: Counts(".data"),
        spectral_norm,
        old_spectral_norm,
        lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    ],
    ids=["in place", "replaced", "data", "spectral norm", "old spectral norm", "instance norm"],
)
def test_a_buffer_that_changes_in_every_forward_changes_once_a_step(make, mode):
    torch.manual_seed(0)
    net = Wrapped(lambda net, x: net.tail(net.body(x)))
    net.tail = make().double()
    for time_step in (1, 3):
        if mode == "s" and time_step > 1 and not isinstance(net.tail, nn.InstanceNorm1d):
            continue  # refused, below
        bptt, rate = (seeded_grads(net, method, images(time_step), mode) for method in ("bptt", "rate"))
        torch.testing.assert_close(rate.buffers, bptt.buffers, rtol=1e-12, atol=1e-12)
        if time_step == 1:
            assert_same_gradients(rate.grads, bptt.grads, 1e-9)


@pytest.mark.parametrize("make", [lambda: Counts("in place"), spectral_norm, old_spectral_norm])
def test_what_a_step_makes_of_other_steps_buffers_is_refused_in_single_step_mode_unless_they_are_held(make):
    net = Wrapped(lambda net, x: net.tail(net.body(x)))
    net.tail = make().double()
    net = attached(net, "rate", 3, "s")
    with pytest.raises(UnsupportedModuleError, match=r"'tail.*depends on its buffers.* step mode 'm'"):
        mean_output(net, images(3), "s")
    if not isinstance(net.tail, Counts):
        functional.reset_net(net)
        net.tail.eval()
        assert mean_output(net, images(3), "s").requires_grad


@pytest.mark.parametrize("mode", MODES)
def test_a_buffer_that_carries_a_graph_is_refused(mode):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("trace", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.trace = 0.5 * self.trace + x.mean()
            return x + self.trace

    net = Wrapped(lambda net, x: net.tail(net.body(x)))
    net.tail = Remembers()
    net = attached(net, "rate", 1, mode)
    with pytest.raises(UnsupportedModuleError, match=r"buffer 'trace'.*torch\.no_grad"):
        mean_output(net, images(1), mode)


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_attention_within_one_step_is_exact_at_one_step_and_right_in_value(mode, batch_first, training):
    net = Attends(batch_first).double().train(training)
    x = torch.rand(T, 3, 4, 6, dtype=torch.float64) * 3
    bptt, rate = (seeded_grads(net, method, x[:1], mode) for method in ("bptt", "rate"))
    if training:  # SpikingJelly 0.0.0.0.14's neurons have no gradient in eval()
        assert_same_gradients(rate.grads, bptt.grads, 1e-9)
    bptt, rate = (seeded_grads(net, method, x, mode) for method in ("bptt", "rate"))
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_within_attention_is_exact_at_one_step_and_refused_at_more(mode):
    net = Attends(dropout=0.3).double()
    x = torch.rand(T, 3, 4, 6, dtype=torch.float64) * 3
    bptt, rate = (seeded_grads(net, method, x[:1], mode) for method in ("bptt", "rate"))
    assert_same_gradients(rate.grads, bptt.grads, 1e-9)
    with pytest.raises(UnsupportedModuleError, match="multi_head_attention_forward, which draws"):
        mean_output(attached(net, "rate", T, mode), x, mode)


def test_multi_head_attention_over_time_is_refused():
    class OverTime(Attends):
        def forward(self, x):  # [T, B, 6]
            y = self.fire(self.first(x))
            return self.head(self.fire2(self.attend(y, y, y)[0]))

    net = rate_model_setting(OverTime(batch_first=False).double(), T, "m")
    with pytest.raises(UnsupportedModuleError, match=r"'fire2'.*mixes time steps"):
        net(torch.rand(T, 3, 6, dtype=torch.float64) * 3)


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
def test_a_loop_over_time_is_told_to_attach_the_inner_network(resets):
    net, x = Loops(resets), images(1)[0]
    with pytest.raises((UnsupportedModuleError, ValueError), match=r"attach the network inside the loop.*mode 's'"):
        rate_model_setting(net, T, "s")(x)
    with pytest.raises((UnsupportedModuleError, ValueError), match=r"attach the network inside the loop.*mode 's'"):
        rate_model_setting(net, T, "m")(x)


@pytest.mark.parametrize("resets", [False, True])
def test_the_inner_network_of_a_loop_trains_as_by_itself(resets):
    net, x = Loops(resets), images(1)[0]
    rate_model_setting(net.inner, T, "s")
    F.cross_entropy(net(x), labels()).backward()
    expected = train_step(attached(tiny_net(), "rate", T, "s"), x.expand(T, *x.shape), labels(), "s")
    assert_same_gradients(gradients(net.inner), expected.grads, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_that_a_forward_counts_are_those_of_bptt(mode):
    def forward(net, x):
        net.calls = getattr(net, "calls", 0) + 1
        return net.body(x * net.calls)

    found = []
    for method in ("bptt", "rate"):
        net = attached(Wrapped(forward), method, 1, mode)
        train_step(net, images(1), labels(), mode)
        found.append((train_step(net, images(1), labels(), mode).grads, net.calls))
    assert found[1][1] == found[0][1] == 2
    assert_same_gradients(found[1][0], found[0][0], 1e-9)


def switched(net, x, total=False):
    y = net.body(F.dropout(x, net.p, net.training))
    return y.sum(0) if total or net.total else y.mean(0)


@pytest.mark.parametrize("switch", ["argument", "attribute", "rate"])
def test_a_forward_is_looked_at_again_when_a_switch_has_changed(switch):
    """Attributes and arguments that are no tensors; what it then does is what a network that always did it does."""

    def after(first, then):
        net, x = Wrapped(switched), images(T)
        net.forward = lambda x, total=False: switched(net, x, total)
        rate_model_setting(net, T)
        for state in (first, then):
            net.total, net.p = state == "attribute", 0.4 if state == "rate" else 0.0
            net.zero_grad()
            functional.reset_net(net)
            torch.manual_seed(0)
            F.cross_entropy(net(x, total=state == "argument"), labels()).backward()
        return gradients(net)

    assert_same_gradients(after("none", switch), after(switch, switch), 1e-12)


def test_what_a_forward_counts_is_no_reason_to_look_again():
    def counts(net, x):
        net.calls = getattr(net, "calls", 0) + 1
        return net.body(x)

    net = rate_model_setting(Wrapped(counts), T)
    for _ in range(4):
        functional.reset_net(net)
        net(images(T))
    (looks,) = net.forward.__self__.looks.seen.values()
    assert len(looks) <= 2  # without the attribute, and with it


@pytest.mark.parametrize("mode", MODES)
def test_draws_that_begin_later_and_that_no_switch_tells_of_are_an_error_with_the_remedy(mode):
    rate = [0.0]
    net = attached(Wrapped(lambda net, x: net.body(F.dropout(x, rate[0]))), "rate", T, mode)
    mean_output(net, images(T), mode).sum().backward()
    functional.reset_net(net)
    rate[0] = 0.5
    with pytest.raises(UnsupportedModuleError, match=r"drew none when it was first run.*rate_model_setting again"):
        mean_output(net, images(T), mode)


@pytest.mark.parametrize("mode", MODES)
def test_another_thread_that_draws_random_numbers_is_no_reason_to_refuse(mode):
    def beside_another(net, x):
        if len(threads) < 3:
            threads.append(threading.Thread(target=torch.rand, args=(1,)))
            threads[-1].start()
            threads[-1].join()
        return net.body(x)

    threads = []
    net = attached(Wrapped(beside_another), "rate", T, mode)
    mean_output(net, images(T), mode).sum().backward()
    assert len(threads) == 3


CHOICES = {
    "max": lambda y: y.max(0)[0],
    "amax": lambda y: y.amax(dim=0),
    "median": lambda y: torch.median(y, 0)[0],
    "sort": lambda y: y.sort(0)[0][-1],
    "logsumexp": lambda y: y.permute(1, 2, 0).logsumexp(-1),
}


@pytest.mark.parametrize("b", [3, T])
@pytest.mark.parametrize("kind", CHOICES)
def test_a_choice_over_time_is_refused(kind, b):
    net = rate_model_setting(Wrapped(lambda net, x: CHOICES[kind](net.body(x))), T)
    with pytest.raises(UnsupportedModuleError, match=rf"takes {kind} over time.*all steps, their mean or their sum"):
        net(images(T, b))


def test_a_choice_within_a_step_or_between_two_tensors_is_served():
    def chooses(net, x):
        y = net.body(x / x.abs().amax((-1, -2), keepdim=True))
        return torch.max(y, torch.zeros(())) + y.max(-1, keepdim=True)[0]

    for time_step in (1, T):
        bptt, rate = (seeded_grads(Wrapped(chooses), method, images(time_step, T), "m") for method in ("bptt", "rate"))
        torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
        if time_step == 1:
            assert_same_gradients(rate.grads, bptt.grads, 1e-9)


@pytest.mark.parametrize("b", [3, T])
def test_a_sum_over_time_may_be_over_another_dimension_than_the_first(b):
    found = []
    for function in (lambda y: y.sum(0), lambda y: y.transpose(0, 1).sum(1), lambda y: y.permute(1, 2, 0).sum(-1)):
        net = Wrapped(lambda net, x, function=function: function(net.body(x)) / net.T)
        found.append(seeded_grads(net, "rate", images(T, b), "m").grads)
    assert_same_gradients(found[1], found[0], 1e-12)
    assert_same_gradients(found[2], found[0], 1e-12)


NOT_TIME = {
    "a token for each image": lambda net, y: y + net.token.expand(y.shape[-4], -1, -1, -1),
    "a token beside each image": lambda net, y: torch.cat(
        [y.flatten(0, -4), net.token.expand(y.shape[:-3].numel(), -1, -1, -1)], 1
    )[:, :4].view_as(y),
    "weights tiled": lambda net, y: F.conv2d(y.flatten(0, -4), net.token[..., :1, :1].repeat(4, 1, 1, 1)).view_as(y),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", NOT_TIME)
def test_a_repetition_t_times_that_is_not_of_time_is_left_alone(kind, mode):
    """With as many images, or channels, as time steps."""
    net = Wrapped(lambda net, x: net.body[3:](NOT_TIME[kind](net, net.body[:3](x))))
    net.token = nn.Parameter(torch.rand(1, 4, 6, 6, dtype=torch.float64))
    bptt, rate = (seeded_grads(net, method, images(1, T), mode) for method in ("bptt", "rate"))
    assert_same_gradients(rate.grads, bptt.grads, 1e-9)
    bptt, rate = (seeded_grads(net, method, images(T, T), mode) for method in ("bptt", "rate"))
    torch.testing.assert_close(rate.output, bptt.output, rtol=1e-12, atol=1e-12)
