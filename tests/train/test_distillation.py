"""Self-distillation through rates: its loss and gradients by hand, what it costs, and that a run of it continues."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import vggsnn_small
from model.branch import branch
from tests.train.test_engine import FULL, assert_same, make_images, make_net, make_trainer, method_of, states
from util.rate.saved import saved_for_backward
from util.train.loss import ce
from util.train.method import Method, OneForward, Rate
from util.train.run_log import RunLog
from util.train.terms import Distillation, distillation

WAYS = [("bptt", "m"), ("bptt", "s"), ("rate", "m"), ("rate", "s")]


def set_up(how: Method) -> tuple[nn.Module, Distillation]:
    torch.manual_seed(0)
    net = vggsnn_small(num_classes=7)
    term = Distillation(net, 7, ce, ce=0.8, kl=0.3)
    net.double(), term.double()
    how.attach(net)
    term.attach(net)
    return net, term


def learn(how: Method, x: Tensor, y: Tensor) -> tuple[nn.Module, Distillation]:
    net, term = set_up(how)
    how.learn(OneForward(net, how, term), x, lambda out: ce(out, y) + term(out, y, None), FULL)
    return net, term


def frames(steps: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return 3 * torch.randn(6, steps, 2, 16, 16, generator=generator, dtype=torch.float64), torch.arange(6)


# The loss


def by_hand(logits: list[Tensor], target: Tensor, tau: float) -> Tensor:
    """Sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(target.tolist()):
        right = [z[i] for z in logits if z[i].argmax() == label]
        if right:
            teacher = (sum(right) / len(right) / tau).softmax(0).detach()
            total = total + sum((teacher * (teacher / (z[i] / tau).softmax(0)).log()).sum() for z in logits)
    return tau**2 * total / len(target)


def test_the_teacher_of_a_sample_is_the_mean_of_those_that_are_right():
    logits = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    target = torch.arange(20) % 4
    right = sum((z.argmax(1) == target).int() for z in logits)
    assert set(right.tolist()) >= {0, 1, 2}
    torch.testing.assert_close(distillation(logits, target), by_hand(logits, target, 3.0))


def test_where_none_is_right_nothing_is_distilled():
    z = torch.tensor([[1.0, 2.0], [5.0, 2.0]], requires_grad=True)
    term = distillation([z, 2 * z], torch.tensor([0, 1]))
    term.backward()
    assert (term.item(), z.grad.tolist()) == (0, [[0, 0], [0, 0]])


# Gradients


def block(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    def norm(y: Tensor, at: str) -> Tensor:
        return F.batch_norm(y, None, None, p[f"{name}.{at}.weight"], p[f"{name}.{at}.bias"], training=True)

    y, channels = x, x.shape[1]
    for i, stride in ((0, 2), (4, 1)):
        y = F.conv2d(y, p[f"{name}.body.{i}.weight"], stride=stride, padding=1, groups=channels)
        y = norm(F.conv2d(y, p[f"{name}.body.{i + 1}.weight"]), f"body.{i + 2}").relu()
    return (y + norm(F.conv2d(x, p[f"{name}.shortcut.0.weight"], stride=2), "shortcut.1")).relu()


@pytest.mark.parametrize(("name", "step_mode"), WAYS)
def test_at_one_step_gradients_are_those_of_the_formulas(name, step_mode):
    x, y = frames(1)
    net, term = learn(method_of(name, step_mode, 1), x, y)
    plain, its_term = set_up(method_of("bptt", "s", 1))
    p = dict(its_term.named_parameters())
    features, h, logits = plain.features, x[:, 0], []
    for i, (begin, end, blocks) in enumerate([(0, 5, 4), (5, 9, 3)]):
        h = b = features[begin:end](h)
        for j in range(blocks):
            b = block(b, p, f"branches.{i}.{j}")
        head = f"branches.{i}.{blocks + 2}"
        logits.append(F.linear(b.mean((2, 3)), p[f"{head}.weight"], p[f"{head}.bias"]))
    out = plain.classifier(features[9:](h))
    loss = F.cross_entropy(out, y) + 0.8 * sum(F.cross_entropy(z, y) for z in logits)
    (loss + 0.3 * by_hand([out, *logits], y, 3.0)).backward()
    expected, found = (dict(nn.ModuleList(pair).named_parameters()) for pair in ((plain, its_term), (net, term)))
    for key, parameter in expected.items():
        torch.testing.assert_close(found[key].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_branches_see_the_mean_over_time_whatever_the_method(step_mode):
    x, y = frames(4)
    terms = []
    for how in (method_of("bptt", step_mode), method_of("rate", step_mode), Rate(4, step_mode, windows=2)):
        net, term = set_up(how)
        terms.append(term(how.outputs(net, x), y, None).item())
    assert terms[1:] == pytest.approx([terms[0]] * 2, rel=1e-10)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_what_is_kept_for_backward_does_not_grow_with_t(step_mode):
    kept = {}
    for steps in (2, 8):
        how, (x, y) = method_of("rate", step_mode, steps), frames(1)
        net, term = set_up(how)
        with saved_for_backward(net) as count:
            loss = term(how.outputs(net, x[:, 0]), y, None)
            kept[steps] = count()
        loss.backward()
    of_outputs = 8 * 6 * (7 + 1152)  # bytes of the outputs of a step, and in step mode s of what the classifier sees
    assert kept[8] - kept[2] <= 6 * of_outputs


@pytest.mark.parametrize("size", [1, 5, 8])
def test_a_branch_serves_any_size(size):
    net = branch(128, 10)
    assert net(torch.randn(2, 128, size, size)).shape == (2, 10)
    assert [block.body[5].out_channels for block in net[:2]] == [256, 512]
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d))


# A run


def test_branches_are_trained_and_continued_and_not_exported(tmp_path):
    def make():
        how = method_of("rate", "m")
        torch.manual_seed(5)
        term = Distillation(make_net(how), 7, ce, 1.0, 0.3).double()
        trainer = make_trainer(how, make_images(), epochs=2, terms=[term])
        term.attach(trainer.net)
        return trainer

    whole, first, second = make(), make(), make()
    start = [p.clone() for p in whole.terms.parameters()]
    whole.run_epoch(), whole.run_epoch()
    first.run_epoch()
    with RunLog(tmp_path) as log:
        first._keep(2, log, {}, lambda: first.save(tmp_path, {}))
    saved, weights = (torch.load(tmp_path / name, weights_only=True) for name in ("last.pth", "model_weights.pth"))
    assert all("branch" in name for name in saved["terms"])
    assert weights["model"].keys() == saved["model"].keys() == first.net.state_dict().keys()
    second.load_state_dict(saved)
    second.run_epoch()
    assert not any(torch.equal(a, b) for a, b in zip(whole.terms.parameters(), start, strict=True))
    assert_same(states(whole.model), states(second.model))
