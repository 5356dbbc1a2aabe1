"""Arguments of a network that have no time dimension: conditions, diffusion steps, dicts that its forward fills."""

import pytest
import torch
from torch import Tensor, nn

from tests.rate.method_helpers import MODES, assert_same_gradients, gradients, images, labels, tiny_net
from util.rate import bptt_model_setting, rate_model_setting


class Conditioned(nn.Module):
    """Shifts its images by a function of a diffusion step [B] and of a condition [B, 4], and may show its rates."""

    def __init__(self):
        super().__init__()
        self.body = tiny_net()
        self.by_step, self.by_condition = nn.Embedding(10, 2).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, step: Tensor, condition: Tensor, shown: dict | None = None) -> Tensor:
        shift = self.by_step(step) + self.by_condition(condition)
        y = self.body[:3](x + shift[..., None, None])
        if shown is not None:
            shown["spikes"] = y
        return self.body[3:](y)


NAMED = {"timeless": ["step", "condition", "shown"]}


def trained(setting, time_step: int, mode: str, **options) -> tuple[Tensor, dict]:
    torch.manual_seed(0)
    net, x = setting(Conditioned(), time_step, mode, **options), images(time_step, 4)
    step, condition = torch.tensor([1, 5, 5, 9]), torch.rand(4, 4, dtype=torch.float64)
    outs = (
        [net(x, step, condition=condition)] if mode == "m" else [net(frame, step, condition=condition) for frame in x]
    )
    out = outs[0].mean(0) if mode == "m" else sum(outs) / time_step
    torch.nn.functional.cross_entropy(out, labels(4)).backward()
    return out.detach(), gradients(net)


@pytest.mark.parametrize("mode", MODES)
def test_at_one_step_every_gradient_is_bptt_s(mode):
    bptt, rate = trained(bptt_model_setting, 1, mode), trained(rate_model_setting, 1, mode, **NAMED)
    assert_same_gradients(rate[1], bptt[1], 1e-9)
    assert all(rate[1][name].any() for name in ("by_step.weight", "by_condition.weight"))


@pytest.mark.parametrize("mode", MODES)
def test_also_where_the_batch_is_as_long_as_the_time(mode):
    """A condition [B, ...] of a batch of T samples is not taken for T steps."""
    bptt, rate = trained(bptt_model_setting, 4, mode), trained(rate_model_setting, 4, mode, **NAMED)
    torch.testing.assert_close(rate[0], bptt[0], rtol=1e-12, atol=1e-12)
    last = ["body.head.weight", "body.head.bias"]
    assert_same_gradients({name: rate[1][name] for name in last}, {name: bptt[1][name] for name in last}, 1e-9)
    assert all(rate[1][name].any() for name in ("by_step.weight", "by_condition.weight"))


def test_a_condition_may_need_a_gradient():
    net, found = Conditioned(), []
    for setting, options in ((bptt_model_setting, {}), (rate_model_setting, NAMED)):
        condition = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        setting(net, 1, "m", **options)(
            images(1), torch.zeros(3, dtype=torch.long), condition
        ).square().sum().backward()
        found.append({"condition": condition.grad})
        bptt_model_setting(net, 1, "m").body.apply(lambda module: getattr(module, "reset", lambda: None)())
    assert_same_gradients(found[1], found[0], 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_a_dict_that_forward_fills_is_filled_with_spikes_and_may_come_full(mode):
    net, shown = rate_model_setting(Conditioned(), 2, mode, **NAMED), {}
    others = torch.zeros(3, dtype=torch.long), torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(2):
        net.body.apply(lambda module: getattr(module, "reset", lambda: None)())
        for x in [images(2)] if mode == "m" else images(2):
            net(x, *others, shown=shown)
        assert shown["spikes"].shape == ((2, 3, 4, 6, 6) if mode == "m" else (3, 4, 6, 6))
        assert ((shown["spikes"] == 0) | (shown["spikes"] == 1)).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("named", [[], ["shown"]], ids=["unnamed", "named"])
def test_what_forward_put_into_a_dict_or_list_has_the_gradients_of_an_output(named, mode):
    found = []
    for setting, options in ((bptt_model_setting, {}), (rate_model_setting, {"timeless": named})):
        net, shown = setting(ShowsAgain(), 1, mode, **options), {"all": []}
        net(images(1) if mode == "m" else images(1)[0], shown=shown)
        (shown["spikes"].square().sum() + shown["all"][0].sin().sum()).backward()
        found.append(gradients(net))
    assert_same_gradients(found[1], found[0], 1e-9)


class BatchFirst(Conditioned):
    def forward(self, x: Tensor, shown: dict | None = None) -> Tensor:
        zeros = torch.zeros(x.shape[0], dtype=torch.long), torch.zeros(x.shape[0], 4, dtype=torch.float64)
        return super().forward(x.transpose(0, 1), *zeros, shown)


class ShowsAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = tiny_net()

    def forward(self, x: Tensor, shown: dict) -> Tensor:
        shown["spikes"] = self.body(x)
        shown["all"].append(shown["spikes"] * 2)
        return shown["spikes"]


def test_an_empty_dict_that_forward_fills_needs_no_name():
    net, shown = rate_model_setting(BatchFirst(), 4, time_dim=1), {}
    net(images(4, 2).transpose(0, 1), shown=shown)
    assert shown["spikes"].shape == (4, 2, 4, 6, 6)


def test_what_has_no_time_and_is_not_named_is_told_the_remedy():
    net = rate_model_setting(Conditioned(), 4)
    with pytest.raises(ValueError, match=r"shape \[3\], not \[T = 4, \.\.\.\].*timeless"):
        net(images(4), torch.zeros(3, dtype=torch.long), torch.zeros(3, 4))


def test_a_name_that_is_no_argument_is_refused():
    with pytest.raises(ValueError, match="forward has no argument 'diffusion', but 'x', 'step'"):
        rate_model_setting(Conditioned(), 4, timeless=["diffusion"])
