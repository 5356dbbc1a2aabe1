"""Oracle 6 and robust use: what attaching leaves as it was, what it survives, and what it refuses by name."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import encoding, functional, layer, neuron, rnn, surrogate
from torch import Tensor, nn

from tests.rate.method_helpers import (
    MODES,
    Step,
    assert_same_gradients,
    assert_same_tensors,
    attached,
    gradients,
    images,
    labels,
    lif_node,
    mean_output,
    net_with,
    outputs,
    potentials,
    state_of,
    tiny_net,
    train_step,
)
from util.util import UnsupportedModuleError, bptt_model_setting, detach, rate_model_setting


def traces(net: nn.Module) -> dict:
    """All that attaching could leave on a network's modules: attributes, step modes, classes, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        name: (
            type(module),
            set(vars(module)),
            getattr(module, "step_mode", None),
            module.training,
            [len(vars(module)[hook]) for hook in hooks],
            dict(vars(module).get("_memories", {})),
        )
        for name, module in net.named_modules()
    }


def assert_same_step(found: Step, expected: Step, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found.output, expected.output, rtol=tolerance, atol=tolerance)
    assert_same_gradients(found.grads, expected.grads, tolerance)
    assert_same_tensors(found.buffers, expected.buffers)


class Stumbles(nn.Module):
    """Identity that raises at a chosen call."""

    left = None  # calls until then

    def forward(self, x: Tensor) -> Tensor:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise ArithmeticError("stumbled")
        return x


class TestGradMode:
    """Autograd's grad mode is what it was, after any forward, also one that raised."""

    @pytest.mark.parametrize("enabled", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_is_kept_by_a_forward(self, mode, enabled):
        net = attached(tiny_net(), "rate", 2, mode)
        with torch.set_grad_enabled(enabled):
            outputs(net, images(2), mode)
            assert torch.is_grad_enabled() is enabled

    @pytest.mark.parametrize(("mode", "good_calls"), [("m", 0), ("s", 0), ("s", 1)])
    def test_is_kept_by_a_forward_that_raises_and_the_next_step_is_right(self, mode, good_calls):
        net = net_with(Stumbles())
        expected = train_step(attached(net, "rate", 2, mode), images(2), labels(), mode)
        rate = attached(net, "rate", 2, mode)
        buffers = state_of(rate.named_buffers())
        rate.extra.left = good_calls
        with pytest.raises(ArithmeticError, match="stumbled"):
            outputs(rate, images(2, seed=7), mode)
        assert torch.is_grad_enabled()
        rate.extra.left = None
        rate.load_state_dict(buffers, strict=False)  # the half forward has moved running statistics, as BPTT's would
        assert_same_step(train_step(rate, images(2), labels(), mode), expected)

    def test_a_step_that_raises_ends_the_window_also_without_a_reset(self):
        """The next T calls are a window of their own, which goes on from the neurons' potentials."""
        rate = attached(net_with(Stumbles()), "rate", 3, "s")
        rate.extra.left = 1
        with pytest.raises(ArithmeticError):
            outputs(rate, images(3, seed=7), "s")
        rate.extra.left = None
        functional.detach_net(rate)
        other = attached(net_with(Stumbles()), "rate", 3, "s")
        for fire in ("fire1", "fire2"):
            getattr(other, fire).v = getattr(rate, fire).v.clone()
        for net in (rate, other):
            F.cross_entropy(mean_output(net, images(3), "s"), labels()).backward()
        assert_same_gradients(gradients(rate), gradients(other), 1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_without_gradients_is_kept_by_a_forward_that_raises(self, mode):
        rate = attached(net_with(Stumbles()), "rate", 2, mode)
        rate.extra.left = 0
        with torch.no_grad():
            with pytest.raises(ArithmeticError):
                outputs(rate, images(2), mode)
            assert not torch.is_grad_enabled()


class TestDetach:
    """Detaching gives back the very same network."""

    @pytest.mark.parametrize("take_off", [detach, lambda net: bptt_model_setting(net, 2, "s")], ids=["detach", "bptt"])
    @pytest.mark.parametrize("mode", MODES)
    def test_leaves_no_trace(self, mode, take_off):
        net = tiny_net()
        before = traces(net)
        rate_model_setting(net, 2, mode)
        train_step(net, images(2), labels(), mode)
        functional.reset_net(net)
        take_off(net)
        assert traces(net) == before

    @pytest.mark.parametrize("mode", MODES)
    def test_in_the_middle_of_a_window_leaves_no_trace(self, mode):
        net = tiny_net()
        before = traces(net)
        rate_model_setting(net, 4, mode)
        outputs(net, images(4)[: 4 if mode == "m" else 2], mode)
        detach(net)
        functional.reset_net(net)
        assert traces(net) == before

    def test_gives_back_mixed_step_modes(self):
        net = tiny_net()
        net.conv1.step_mode = net.fire2.step_mode = "m"
        before = traces(net)
        detach(rate_model_setting(net, 2, "s"))
        assert traces(net) == before

    @pytest.mark.parametrize("mode", MODES)
    def test_trains_as_if_never_attached(self, mode):
        net = tiny_net()
        expected = train_step(attached(net, "bptt", 3, mode), images(3), labels(), mode)
        rate = attached(net, "rate", 3, mode)
        with torch.no_grad():
            outputs(rate.eval(), images(3), mode)
        rate.train()
        functional.set_step_mode(detach(rate), mode)
        assert_same_step(train_step(rate, images(3), labels(), mode), expected)

    def test_of_a_network_that_was_never_attached_changes_nothing(self):
        net = tiny_net()
        before = traces(net)
        assert detach(net) is net
        assert traces(net) == before

    @pytest.mark.parametrize(("child", "method"), [("conv1", "forward"), ("fire1", "reset"), (None, "forward")])
    def test_gives_back_methods_that_the_user_had_replaced(self, child, method):
        net = tiny_net()
        module = getattr(net, child) if child else net
        mine = getattr(type(module), method).__get__(module)
        setattr(module, method, mine)
        detach(rate_model_setting(net, 2, "m"))
        assert vars(module).get(method) is mine

    def test_after_attaching_a_part_and_then_the_network_leaves_no_trace(self):
        inner = tiny_net()
        net = nn.Sequential(OrderedDict(features=inner, head=layer.Linear(5, 5).double()))
        before = traces(net)
        rate_model_setting(inner, 2, "m")
        detach(rate_model_setting(net, 2, "m"))
        assert traces(net) == before

    def test_attaching_a_part_of_an_attached_network_is_refused(self):
        inner = tiny_net()
        net = nn.Sequential(OrderedDict(features=inner, head=layer.Linear(5, 5).double()))
        before = traces(net)
        rate_model_setting(net, 2, "m")
        with pytest.raises(ValueError, match="'fire1' is part of a network with hooks of its own"):
            rate_model_setting(inner, 2, "m")
        detach(net)
        assert traces(net) == before


class TestStateDict:
    @pytest.mark.parametrize("mode", MODES)
    def test_keys_and_values_are_not_changed_by_attaching(self, mode):
        net = tiny_net()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        after = rate_model_setting(net, 2, mode).state_dict()
        assert list(after) == list(before)
        assert_same_tensors(dict(after), before)
        train_step(net, images(2), labels(), mode)
        assert list(net.state_dict()) == list(before)

    @pytest.mark.parametrize("mode", MODES)
    def test_of_an_attached_network_loads_into_any_other(self, mode, tmp_path):
        net = attached(tiny_net(), "rate", 2, mode)
        train_step(net, images(2), labels(), mode)
        torch.save(net.state_dict(), tmp_path / "weights.pth")
        expected = train_step(net, images(2), labels(), mode)
        loaded = torch.load(tmp_path / "weights.pth", weights_only=True)
        for method in ("rate", "bptt"):
            other = attached(tiny_net(seed=5), method, 2, mode)
            other.load_state_dict(loaded, strict=True)
            with torch.no_grad():
                functional.reset_net(other)
                out = mean_output(other, images(2), mode)
            torch.testing.assert_close(out, expected.output, rtol=1e-12, atol=1e-12)


class TestAttach:
    def test_returns_the_network_itself(self):
        net = tiny_net()
        assert rate_model_setting(net, 2, "m") is net
        assert bptt_model_setting(net, 2, "m") is net

    @pytest.mark.parametrize("first", [(2, "m"), (2, "s"), (3, "m"), (3, "s")])
    @pytest.mark.parametrize("mode", MODES)
    def test_twice_is_the_last_one_alone(self, mode, first):
        net, x = tiny_net(), images(3)
        before = traces(net)
        expected = train_step(attached(net, "rate", 3, mode), x, labels(), mode)
        twice = rate_model_setting(rate_model_setting(copy.deepcopy(net), *first), 3, mode)
        assert_same_step(train_step(twice, x, labels(), mode), expected)
        functional.reset_net(detach(twice))
        assert traces(twice) == before

    @pytest.mark.parametrize("mode", MODES)
    def test_twice_in_the_middle_of_a_window_starts_a_new_one(self, mode):
        net, x = attached(tiny_net(), "rate", 3, "s"), images(3)
        expected = train_step(attached(net, "rate", 3, mode), x, labels(), mode)
        rate = attached(net, "rate", 3, "s")
        with torch.no_grad():
            buffers = state_of(rate.named_buffers())
        rate(x[0])
        rate_model_setting(rate, 3, mode)
        rate.load_state_dict(buffers, strict=False)
        assert_same_step(train_step(rate, x, labels(), mode), expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_to_a_submodule_leaves_the_rest_to_plain_autograd(self, mode):
        """Features attached, a head with weights of its own behind them: at T = 1 all gradients are BPTT's."""
        steps = []
        for method in ("bptt", "rate"):
            net = nn.Sequential(OrderedDict(features=tiny_net(), act=nn.Tanh(), head=nn.Linear(5, 5))).double()
            torch.manual_seed(4)
            nn.init.normal_(net.head.weight)
            nn.init.zeros_(net.head.bias)
            before = {name: t for name, t in traces(net).items() if not name.startswith("features")}
            (bptt_model_setting if method == "bptt" else rate_model_setting)(net.features, 1, mode)
            assert {name: t for name, t in traces(net).items() if not name.startswith("features")} == before
            steps.append(train_step(net, images(1), labels(), mode))
        assert_same_step(steps[1], steps[0], 1e-9)

    @pytest.mark.parametrize("mode", MODES)
    def test_to_a_submodule_behind_learnable_layers(self, mode):
        """The attached part's input needs a gradient; at T = 1 it is BPTT's."""
        steps = []
        for method in ("bptt", "rate"):
            torch.manual_seed(4)
            net = nn.Sequential(OrderedDict(front=layer.Conv2d(2, 2, 1), back=tiny_net())).double()
            functional.set_step_mode(net, mode)
            (bptt_model_setting if method == "bptt" else rate_model_setting)(net.back, 1, mode)
            steps.append(train_step(net, images(1), labels(), mode))
        assert_same_step(steps[1], steps[0], 1e-9)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_deep_copy_trains_on_its_own(self, mode):
        net, x = attached(tiny_net(), "rate", 2, mode), images(2)
        expected = train_step(attached(tiny_net(), "rate", 2, mode), x, labels(), mode)
        copied = copy.deepcopy(net)
        net.zero_grad(set_to_none=True)
        weights = state_of(net.state_dict().items())
        assert_same_step(train_step(copied, x, labels(), mode), expected)
        assert all(p.grad is None for p in net.parameters())
        assert not potentials(net)
        assert_same_tensors(state_of(net.state_dict().items()), weights)
        assert_same_step(train_step(net, x, labels(), mode), expected)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_deep_copy_is_detached_on_its_own(self, mode):
        plain = tiny_net()
        net = rate_model_setting(copy.deepcopy(plain), 2, mode)
        copied = detach(copy.deepcopy(net))
        assert traces(copied) == traces(plain)
        assert traces(net) != traces(plain)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_pickled_network_trains_as_the_one_it_was_made_of(self, mode):
        net = attached(tiny_net(), "rate", 2, mode)
        loaded = pickle.loads(pickle.dumps(net))
        expected = train_step(net, images(2), labels(), mode)
        assert_same_step(train_step(loaded, images(2), labels(), mode), expected)
        functional.reset_net(loaded)
        assert traces(detach(loaded)) == traces(tiny_net())

    @pytest.mark.parametrize("mode", MODES)
    def test_follows_a_later_change_of_dtype(self, mode):
        net = attached(tiny_net().float(), "rate", 2, mode)
        expected = train_step(attached(net.double(), "rate", 2, mode), images(2), labels(), mode)
        assert_same_step(train_step(net, images(2), labels(), mode), expected)

    @pytest.mark.parametrize(
        ("time_step", "step_mode"), [(0, "m"), (-1, "s"), (2.0, "m"), ("2", "m"), (None, "m"), (2, "x"), (2, None)]
    )
    @pytest.mark.parametrize("setting", [rate_model_setting, bptt_model_setting])
    def test_settings_out_of_range_are_refused_and_change_nothing(self, setting, time_step, step_mode):
        net = rate_model_setting(tiny_net(), 2, "m")
        before = traces(net)
        with pytest.raises(ValueError, match=r"time_step|step_mode"):
            setting(net, time_step, step_mode)
        assert traces(net) == before

    @pytest.mark.parametrize("setting", [rate_model_setting, bptt_model_setting])
    def test_what_is_no_network_is_named(self, setting):
        with pytest.raises(TypeError, match=r"net must be a network .*, not 'net'"):
            setting("net", 2)


class TestUse:
    """Training loops as people write them."""

    @pytest.mark.parametrize("mode", MODES)
    def test_a_forward_without_backward_changes_no_later_gradient(self, mode):
        net, x = tiny_net(), images(2)
        expected = train_step(attached(net, "rate", 2, mode), x, labels(), mode)
        rate = attached(net, "rate", 2, mode)
        buffers = state_of(rate.named_buffers())
        outputs(rate, images(2, seed=9), mode)
        rate.load_state_dict(buffers, strict=False)
        assert_same_step(train_step(rate, x, labels(), mode), expected)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("mode", MODES)
    def test_evaluation_without_gradients_is_that_of_the_plain_network(self, mode, training):
        net, x = tiny_net(), images(3)
        found = []
        for method in ("bptt", "rate"):
            evaluated = attached(net, method, 3, mode).train(training)
            with torch.no_grad():
                out = outputs(evaluated, x, mode)
            assert not out.requires_grad
            found.append((out, state_of(evaluated.named_buffers()), potentials(evaluated)))
        torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-12, atol=1e-12)
        assert_same_tensors(found[1][1], found[0][1])
        assert_same_tensors(found[1][2], found[0][2])

    def test_evaluation_of_another_number_of_steps_than_t(self):
        """Without gradients the network runs as ever: T binds training alone."""
        net = attached(tiny_net(), "rate", 3, "m")
        with torch.no_grad():
            assert net(images(5)).shape == (5, 3, 5)

    def test_evaluation_in_the_middle_of_a_window_leaves_what_it_leaves_with_bptt(self):
        found = []
        for method in ("bptt", "rate"):
            net, x = attached(tiny_net(), method, 3, "s"), images(3)
            outs = [net(x[0])]
            with torch.no_grad():
                net(x[2])
            outs += [net(x[1]), net(x[2])]
            found.append((torch.stack(outs).detach(), state_of(net.named_buffers()), potentials(net)))
        torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_in_eval_mode_with_gradients_statistics_are_constants(self, mode):
        """net.eval() with gradients equals training with each BatchNorm alone in eval mode."""
        net, x = tiny_net(), images(2)
        for bn in (net.bn1, net.bn2):
            bn.running_mean.uniform_(-0.2, 0.2)
            bn.running_var.uniform_(0.5, 1.5)
        frozen = attached(net, "rate", 2, mode)
        frozen.bn1.eval()
        frozen.bn2.eval()
        expected = train_step(frozen, x, labels(), mode)
        assert_same_step(train_step(attached(net, "rate", 2, mode).eval(), x, labels(), mode), expected)
        assert_same_tensors(expected.buffers, state_of(net.named_buffers()))

    @pytest.mark.parametrize("mode", MODES)
    def test_the_batch_size_may_change_between_batches(self, mode):
        net = attached(tiny_net(), "rate", 2, mode)
        for b in (3, 5, 2):
            expected = train_step(attached(tiny_net(), "rate", 2, mode), images(2, b), labels(b), mode)
            assert_same_gradients(train_step(net, images(2, b), labels(b), mode).grads, expected.grads, 1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_a_missing_reset_with_another_batch_size_is_named(self, mode):
        net = attached(tiny_net(), "rate", 2, mode)
        outputs(net, images(2, 3), mode)
        with pytest.raises(RuntimeError, match=r"'fire1'.*reset_net"):
            outputs(net, images(2, 4), mode)
        train_step(net, images(2, 4), labels(4), mode)  # which begins with a reset

    @pytest.mark.parametrize(("first", "second"), [(3, 4), (3, 1), (1, 3)])
    def test_another_batch_size_in_the_middle_of_a_window_is_named(self, first, second):
        net = attached(tiny_net(), "rate", 2, "s")
        net(images(1, first)[0])
        with pytest.raises(RuntimeError, match="reset_net"):
            net(images(1, second)[0])

    def test_arguments_of_another_structure_end_the_window(self):
        net, x = attached(tiny_net(), "rate", 2, "s"), images(2)
        net(x[0])
        with pytest.raises(RuntimeError, match="arguments are not those of the first step"):
            net(input=x[1])
        functional.detach_net(net)
        F.cross_entropy(mean_output(net, x, "s"), labels()).backward()

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients_of_several_batches_add_up(self, mode):
        batches = [(images(2, seed=s), labels()) for s in (1, 2)]
        net = attached(tiny_net(), "rate", 2, mode)
        separate = [train_step(net, *batch, mode).grads for batch in batches]
        net.zero_grad(set_to_none=True)
        for x, y in batches:
            functional.reset_net(net)
            F.cross_entropy(mean_output(net, x, mode), y).backward()
        total = {name: separate[0][name] + separate[1][name] for name in separate[0]}
        assert_same_gradients(gradients(net), total, 1e-12)

    @pytest.mark.parametrize("mode", MODES)
    def test_one_backward_of_two_batches_losses(self, mode):
        """Both graphs are alive at once."""
        net, losses, separate = attached(tiny_net(), "rate", 2, mode), [], []
        for seed in (1, 2):
            separate.append(train_step(net, images(2, seed=seed), labels(), mode).grads)
        net.zero_grad(set_to_none=True)
        for seed in (1, 2):
            functional.reset_net(net)
            losses.append(F.cross_entropy(mean_output(net, images(2, seed=seed), mode), labels()))
        sum(losses).backward()
        total = {name: separate[0][name] + separate[1][name] for name in separate[0]}
        assert_same_gradients(gradients(net), total, 1e-12)

    def test_a_reset_in_the_middle_of_a_window_starts_a_new_one(self):
        net, x = tiny_net(), images(3)
        expected = train_step(attached(net, "rate", 3, "s"), x, labels(), "s")
        rate = attached(net, "rate", 3, "s")
        buffers = state_of(rate.named_buffers())
        rate(images(1, seed=8)[0])
        rate(images(1, seed=9)[0])
        rate.load_state_dict(buffers, strict=False)
        assert_same_step(train_step(rate, x, labels(), "s"), expected)  # begins with a reset

    def test_outputs_of_a_window_that_a_reset_ended_have_no_gradient_to_give(self):
        net = attached(tiny_net(), "rate", 2, "s")
        lost = net(images(1)[0])
        functional.reset_net(net)
        outputs(net, images(2), "s")
        with pytest.raises(RuntimeError, match="1 of 2 steps"):
            lost.sum().backward()

    @pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
    def test_another_number_of_steps_than_t_is_refused_with_both_numbers(self, steps):
        net = attached(tiny_net(), "rate", 4, "m")
        with pytest.raises(ValueError, match=rf"(?s)\b{steps}\b.*\b4\b"):
            net(images(steps))

    def test_a_backward_before_the_last_step_is_refused(self):
        net, x = attached(tiny_net(), "rate", 3, "s"), images(3)
        out = net(x[0]) + net(x[1])
        with pytest.raises(RuntimeError, match="2 of 3 steps"):
            out.sum().backward()

    @pytest.mark.parametrize("mode", MODES)
    def test_a_second_backward_is_refused(self, mode):
        out = outputs(attached(tiny_net(), "rate", 2, mode), images(2), mode).sum()
        out.backward()
        with pytest.raises(RuntimeError, match="second time"):
            out.backward()

    @pytest.mark.parametrize("mode", MODES)
    def test_autocast_to_bfloat16(self, mode):
        """Values are BPTT's, bit by bit; gradients at T = 1 differ by rounding to 8 bits; parameters stay float32."""
        net = tiny_net().float()
        net.conv1.bias = None  # its gradient, in front of a BatchNorm, is nothing but rounding
        for time_step in (1, 4):
            found = []
            for method in ("bptt", "rate"):
                trained = attached(net, method, time_step, mode)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = mean_output(trained, images(time_step).float(), mode)
                    assert out.dtype == torch.bfloat16
                    F.cross_entropy(out, labels()).backward()
                found.append((out.detach(), gradients(trained)))
            if NEW or time_step == 1:  # SpikingJelly 0.0.0.0.14 fuses the operations of a step and rounds less often
                assert torch.equal(found[0][0], found[1][0])
            assert {g.dtype for g in found[1][1].values()} == {torch.float32}
            if time_step == 1:
                assert_same_gradients(found[1][1], found[0][1], 2e-2)

    @pytest.mark.parametrize("mode", MODES)
    def test_inputs_by_keyword(self, mode):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = tiny_net()

            def forward(self, frames: Tensor, flip: bool = False) -> Tensor:
                return self.body(frames.flip(-1) if flip else frames)

        expected = train_step(attached(tiny_net(), "rate", 2, mode), images(2).flip(-1), labels(), mode)
        net, x = attached(Named(), "rate", 2, mode), images(2)
        outs = net(frames=x, flip=True) if mode == "m" else torch.stack([net(frames=step, flip=True) for step in x])
        F.cross_entropy(outs.mean(0), labels()).backward()
        assert_same_gradients({n[5:]: g for n, g in gradients(net).items()}, expected.grads, 1e-12)


NEW = hasattr(neuron, "SimpleBaseNode")  # SpikingJelly after 0.0.0.0.14


class First(nn.Module):
    """The first of a module's outputs."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


def behind(module: nn.Module) -> nn.Module:
    """`tiny_net`, the module on its 5 outputs, and a layer."""
    return nn.Sequential(OrderedDict(body=tiny_net(), extra=First(module), head=layer.Linear(5, 5))).double()


# Networks for T = 3 with a module that mixes steps, draws, or is a neuron for which there is no rule.
WITHOUT_A_RULE: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: behind(nn.LSTM(5, 5)),
    "SpikingLSTM": lambda: behind(rnn.SpikingLSTM(5, 5, 1)),
    "SynapseFilter": lambda: net_with(layer.SynapseFilter(tau=2.0, learnable=True)),
    "ElementWiseRecurrentContainer": lambda: net_with(layer.ElementWiseRecurrentContainer(lif_node(), torch.add)),
    "LinearRecurrentContainer": lambda: behind(layer.LinearRecurrentContainer(lif_node(), 5, 5)),
    "ThresholdDependentBatchNorm2d": lambda: net_with(layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 4)),
    "TemporalEffectiveBatchNorm2d": lambda: net_with(layer.TemporalEffectiveBatchNorm2d(3, 4)),
    "NeuNorm": lambda: net_with(layer.NeuNorm(4, 6, 6)),
    "MultiStepContainer": lambda: net_with(layer.MultiStepContainer(nn.Conv3d(3, 3, 1))),
    "StepModeContainer": lambda: net_with(layer.StepModeContainer(True, *(["m"] if NEW else []), nn.Conv2d(4, 4, 1))),
    "TemporalWiseAttention": lambda: net_with(layer.TemporalWiseAttention(3, 2)),
    "DropConnectLinear": lambda: behind(layer.DropConnectLinear(5, 5)),
    "Delay": lambda: net_with(layer.Delay(1)),
    "PoissonEncoder": lambda: net_with(encoding.PoissonEncoder()),
    "AlphaDropout": lambda: net_with(nn.AlphaDropout()),
    "GatedLIFNode": lambda: net_with(neuron.GatedLIFNode(T=3)),
    "PSN": lambda: net_with(neuron.PSN(3)),
    "MaskedPSN": lambda: net_with(neuron.MaskedPSN(2, 3)),
    "SlidingPSN": lambda: net_with(neuron.SlidingPSN(2)),
    "MPBNLIFNode": lambda: net_with(neuron.MPBNLIFNode(out_channels=4)),
}


def without_a_rule(kind: str) -> nn.Module:
    """Skips what the installed SpikingJelly does not have, or has in a way that fails by itself."""
    try:
        net = WITHOUT_A_RULE[kind]()
        outputs(attached(net, "bptt", 3, "m"), images(3), "m")
    except (AttributeError, NotImplementedError, TypeError) as error:
        pytest.skip(f"this SpikingJelly: {error}")
    return net


class TestWithoutARule:
    """Step mode 'm': as with BPTT. Step mode 's': refused, with the remedy."""

    @pytest.mark.parametrize("kind", WITHOUT_A_RULE)
    def test_in_step_mode_m_it_runs_as_with_bptt(self, kind):
        net, found = without_a_rule(kind), []
        for setting in (bptt_model_setting, partial(rate_model_setting, windows=3)):
            torch.manual_seed(3)
            found.append(train_step(setting(copy.deepcopy(net), 3, "m"), images(3), labels(), "m"))
        assert torch.equal(found[1].output, found[0].output)
        assert_same_step(found[1], found[0], 1e-9)

    @pytest.mark.parametrize(
        "kind", ["SynapseFilter", "ElementWiseRecurrentContainer", "DropConnectLinear", "Delay", "NeuNorm", "PSN"]
    )
    def test_in_step_mode_s_it_is_refused_by_name_and_the_network_left_untouched(self, kind):
        net = without_a_rule(kind)
        before = traces(net)
        with pytest.raises(
            UnsupportedModuleError, match=rf"'extra\S*' \({kind}\): it keeps a state .*; use step mode 'm'"
        ):
            rate_model_setting(net, 2, "s")
        assert traces(net) == before

    @pytest.mark.parametrize("kind", ["PoissonEncoder", "AlphaDropout"])
    def test_in_step_mode_s_what_draws_at_each_step_is_refused(self, kind):
        with pytest.raises(ValueError, match=r"draws anew at each step .* use step mode 'm'"):
            outputs(attached(WITHOUT_A_RULE[kind](), "rate", 3, "s"), images(3), "s")

    def test_a_refused_network_still_trains_with_bptt(self):
        net = net_with(layer.SynapseFilter(tau=2.0))
        expected = train_step(attached(net, "bptt", 2, "s"), images(2), labels(), "s")
        with pytest.raises(UnsupportedModuleError, match="'extra'"):
            rate_model_setting(net, 2, "s")
        assert_same_step(train_step(bptt_model_setting(net, 2, "s"), images(2), labels(), "s"), expected)


class TestNeurons:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_network_without_neurons(self, mode):
        net = nn.Sequential(layer.Conv2d(2, 4, 3), layer.BatchNorm2d(4), nn.ReLU())
        before = traces(net)
        with pytest.raises(ValueError, match=r"Sequential.*no spiking neurons"):
            rate_model_setting(net, 2, mode)
        assert traces(net) == before

    @pytest.mark.parametrize("mode", MODES)
    def test_a_neuron_alone_is_a_network(self, mode):
        node = rate_model_setting(neuron.IFNode(surrogate_function=surrogate.ATan()), 2, mode)
        x = images(2)
        if mode == "s":
            x = x[:1].expand_as(x)
        static = x[0].clone().requires_grad_()
        out = node(static.expand_as(x)) if mode == "m" else node(static) + node(static)
        out.sum().backward()
        assert static.grad.abs().max() > 0
