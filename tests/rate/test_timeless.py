"""Arguments of a network that have no time dimension: conditions, diffusion steps, dicts that its forward fills."""

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from tests.rate.method_helpers import MODES, SETTING, assert_same_gradients, gradients, images, labels, tiny_net
from util.rate import rate_model_setting


class Conditioned(nn.Module):
    """Shifts its images by a function of a diffusion step [B] and of a condition [B, 4], and may show its rates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = tiny_net()
        self.by_step, self.by_condition = nn.Embedding(10, 2).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor, step: Tensor, condition: Tensor, shown: dict | None = None) -> Tensor:
        shift = self.by_step(step) + self.by_condition(condition)
        y = self.body[:3](x + shift[..., None, None])
        if shown is not None:
            shown["spikes"] = y
            shown.setdefault("all", []).append(y * 2)
        return self.body[3:](y)


NAMED = {"timeless": ["step", "condition", "shown"]}


def conditions(b: int, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.arange(b) % 3, torch.linspace(-1, 1, 4 * b, dtype=torch.float64).view(b, 4).requires_grad_(
        requires_grad
    )


def trained(method: str, time_step: int, mode: str, b: int, **options) -> tuple[Tensor, dict]:
    net, x = SETTING[method](Conditioned(), time_step, mode, **options), images(time_step, b)
    step, condition = conditions(b, requires_grad=True)
    out = torch.cat(
        [net(x, step, condition)] if mode == "m" else [net(frame, step, condition=condition) for frame in x]
    )
    F.cross_entropy(out.view(time_step, b, -1).mean(0), labels(b)).backward()
    return out.detach(), {**gradients(net), "condition": condition.grad}


@pytest.mark.parametrize(("steps", "windows"), [(1, 1), (4, 1), (4, 4)])
@pytest.mark.parametrize(("b", "named"), [(4, NAMED), (3, {})])
@pytest.mark.parametrize("mode", MODES)
def test_conditions_are_served_and_of_t_images_where_they_are_named(mode, b, named, steps, windows):
    """A condition [B, ...] of a batch of T samples is not taken for T steps."""
    bptt, rate = trained("bptt", steps, mode, b), trained("rate", steps, mode, b, **named, windows=windows)
    torch.testing.assert_close(rate[0], bptt[0].view_as(rate[0]), rtol=1e-12, atol=1e-12)
    compared = rate[1] if steps == windows else ["body.head.weight", "body.head.bias"]
    assert_same_gradients({n: rate[1][n] for n in compared}, {n: bptt[1][n] for n in compared}, 1e-9)
    assert all(rate[1][name].any() for name in ("by_step.weight", "by_condition.weight", "condition"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("named", "steps"), [({}, 1), (NAMED, 1), (NAMED, 3)])
def test_a_dict_that_forward_fills_has_the_gradients_of_outputs_and_may_come_full_if_named(named, steps, mode):
    found = []
    for method, options in (("bptt", {}), ("rate", {**named, "windows": steps})):
        net, shown, others = SETTING[method](Conditioned(), steps, mode, **options), {}, conditions(2)
        for _ in range(2 if named else 1):
            net.zero_grad()
            functional.reset_net(net)
            total, shown["all"] = 0, []
            for x in [images(steps, 2)] if mode == "m" else images(steps, 2):
                net(x, *others, shown)
                total = total + shown["spikes"].square().sum() + shown["all"][-1].sin().sum()
            total.backward()
        assert ((shown["spikes"] == 0) | (shown["spikes"] == 1)).all()
        found.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.grad.any()})
    assert_same_gradients(found[1], found[0], 1e-9)


class BatchFirst(Conditioned):
    def forward(self, x: Tensor, shown: dict) -> Tensor:
        return super().forward(x.transpose(0, 1), *conditions(x.shape[0]), shown)


def test_an_empty_dict_that_forward_fills_needs_no_name():
    net, shown = rate_model_setting(BatchFirst(), 4, time_dim=1), {}
    net(images(4, 2).transpose(0, 1), shown=shown)
    assert shown["spikes"].shape == (4, 2, 4, 6, 6)


def test_a_name_that_is_no_argument_is_refused():
    with pytest.raises(ValueError, match="forward has no argument 'diffusion', but 'x', 'step'"):
        rate_model_setting(Conditioned(), 4, timeless=["diffusion"])
