"""What recipes of today add to a training step: warm-up, smoothed and mixed labels, clipping, averages, weights."""

import copy
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tests.experiment.script_helpers import history, same, tiny
from tests.train.test_engine import CPU, assert_same, changes, make_images, make_trainer, method_of
from util.train import checkpoint
from util.train.batches import Batches
from util.train.engine import Trainer
from util.train.evaluation import evaluate
from util.train.loss import ce
from util.train.method import Precision
from util.train.optim import SCHEDULERS, load_scheduler, make_scheduler
from util.train.recipe import averaged, mixing
from util.train.run_log import RunLog

# Warm-up


def learning_rates(scheduler, optimizer, epochs: int) -> list[float]:
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def one_parameter(lr: float = 0.2) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


def test_the_learning_rate_rises_and_then_follows_its_schedule(recwarn):
    optimizer = one_parameter()
    found = learning_rates(make_scheduler("cosine", optimizer, 6, 2), optimizer, 6)
    falling = [0.2 / 2 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert found == pytest.approx([0.002, 0.101, *falling], rel=1e-9)
    assert not recwarn.list


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("done", [1, 2, 3, 5])
def test_a_schedule_with_warm_up_continues_exactly(name, done):
    optimizer = one_parameter()
    scheduler = make_scheduler(name, optimizer, 6, 2)
    learning_rates(scheduler, optimizer, done)
    after = one_parameter()
    continued = make_scheduler(name, after, 6, 2)
    after.load_state_dict(optimizer.state_dict())
    load_scheduler(continued, copy.deepcopy(scheduler.state_dict()))
    assert learning_rates(continued, after, 6 - done) == learning_rates(scheduler, optimizer, 6 - done)


def test_a_schedule_without_warm_up_is_not_taken_for_one_with():
    without, warm = (make_scheduler("cosine", one_parameter(), 6, warmup) for warmup in (0, 2))
    with pytest.raises((KeyError, TypeError)):
        load_scheduler(warm, without.state_dict())


# Labels and batches


def test_smoothed_labels_are_torch_s_and_the_test_loss_is_of_the_labels_themselves():
    images = make_images()
    trainer, plain = (make_trainer(method_of("bptt", "m"), images, batch=10) for _ in range(2))
    trainer.criterion = partial(ce, label_smoothing=0.3)
    x, y = images.tensors
    out = plain.method.forward(plain.net.train(), x)
    assert trainer.train_epoch("").loss == pytest.approx(F.cross_entropy(out, y, label_smoothing=0.3).item(), rel=1e-12)
    found = evaluate(trainer.net, trainer.method, trainer.precision, [(x, y)], CPU).loss
    assert found == pytest.approx(F.cross_entropy(trainer.method.forward(trainer.net, x), y).item(), rel=1e-12)


SAMPLES = 6
SHAPES = {"images": (SAMPLES, 2, 8, 8), "frames": (SAMPLES, 3, 2, 8, 8)}


def numbered(kind: str) -> torch.Tensor:
    """Sample i is filled with the number i + 1."""
    return (1.0 + torch.arange(SAMPLES)).view(-1, *(1,) * (len(SHAPES[kind]) - 1)).expand(SHAPES[kind]).clone()


@pytest.mark.parametrize("kind", SHAPES)
def test_mixup_takes_the_same_shares_of_pixels_at_all_steps_and_of_labels(kind):
    y = torch.arange(SAMPLES)
    x, shares = mixing(0.5, 0.0, 7)(numbered(kind), y)
    assert type(x) is torch.Tensor
    assert shares.shape == (SAMPLES, 7)
    torch.testing.assert_close(shares.sum(1), torch.ones(SAMPLES))
    assert 0 < shares[0, 0] < 1
    mixed = shares[:, :SAMPLES] @ (1.0 + torch.arange(SAMPLES))
    torch.testing.assert_close(x, mixed.view(-1, *(1,) * (x.dim() - 1)).expand_as(x))


@pytest.mark.parametrize("kind", SHAPES)
def test_cutmix_pastes_the_same_rectangle_at_all_steps_and_shares_labels_by_its_size(kind):
    torch.manual_seed(1)
    y, before = torch.arange(SAMPLES), numbered(kind)
    x, shares = mixing(0.0, 1.0, SAMPLES)(before, y)
    kept = (x == before).flatten(1, -3)  # [B, planes, H, W]
    assert (kept == kept[:, :1]).all()
    assert 0 < kept[0, 0].float().mean() < 1
    torch.testing.assert_close(kept.float().mean((1, 2, 3)), shares[y, y])
    torch.testing.assert_close(shares.sum(1), torch.ones(SAMPLES))


def test_with_both_alphas_a_batch_is_mixed_in_one_of_the_two_ways():
    mix, kinds = mixing(0.5, 1.0, SAMPLES), set()
    for _ in range(20):
        x, _ = mix(numbered("images"), torch.arange(SAMPLES))
        kinds.add(bool((x == x.round()).all()))  # pasted, or averaged
    assert kinds == {False, True}
    assert mixing(0.0, 0.0, SAMPLES) is None


def test_what_is_mixed_depends_on_seed_epoch_and_step_alone():
    batches = Batches(TensorDataset(numbered("frames"), torch.arange(SAMPLES)), mixing(0.5, 1.0, SAMPLES))
    found = []
    for key in ((0, 1, 0), (0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)):
        torch.manual_seed(len(found))
        found.append(batches[key, [range(SAMPLES)], list(range(SAMPLES))])
    assert same(found[0], found[1])
    assert not any(same(found[0], other) for other in found[2:])


def test_a_mixed_batch_has_the_loss_of_its_shares_and_the_accuracy_of_the_larger_ones():
    images = make_images()
    plain, other, mixed = (make_trainer(method_of("rate", "m"), images, batch=10) for _ in range(3))
    other.train_loader.dataset.mix = lambda x, y: (x, y.roll(1))
    mixed.train_loader.dataset.mix = lambda x, y: (x, 0.6 * one_hot(y) + 0.4 * one_hot(y.roll(1)))
    plain, other, mixed = (trainer.train_epoch("") for trainer in (plain, other, mixed))
    assert mixed.loss == pytest.approx(0.6 * plain.loss + 0.4 * other.loss, rel=1e-9)
    assert (mixed.top1, mixed.top5) == (plain.top1, plain.top5)


def one_hot(y: torch.Tensor) -> torch.Tensor:
    return F.one_hot(y, 7).double()


# Clipping


def scaled_precision() -> Precision:
    """float32 with a gradient scaler, as fp16 has one."""
    precision = Precision("off", CPU)
    precision.scaler = torch.amp.GradScaler("cpu")
    return precision


@pytest.mark.parametrize("precision", [Precision("off", CPU), scaled_precision()], ids=["plain", "scaled"])
def test_an_optimizer_gets_gradients_of_at_most_that_norm(precision):
    """With a gradient scaler too: their norm is taken after unscaling."""
    steps = {}
    for norm in (None, 1e-3, 1e6):
        trainer = make_trainer(method_of("rate", "m"), make_images(), batch=10, lr=1.0)
        trainer.precision, trainer.clip_grad_norm = precision, norm
        steps[norm] = torch.cat([change.flatten() for change in changes(trainer)])
    assert steps[None].norm() > 1e-2
    assert steps[1e-3].norm().item() == pytest.approx(1e-3, rel=1e-3)  # torch adds 1e-6 to the norm that it divides by
    torch.testing.assert_close(F.normalize(steps[1e-3], dim=0), F.normalize(steps[None], dim=0))
    assert torch.equal(steps[1e6], steps[None])


# An average of the weights


def average_too(trainer: Trainer, decay: float) -> Trainer:
    net = tiny(num_classes=7, in_channel=2).double()
    net.load_state_dict(trainer.net.state_dict())
    trainer.ema = averaged(net, decay)
    trainer.method.attach(trainer.ema.module)
    return trainer


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> tuple[Trainer, Path]:
    """A trainer with an average after two epochs, and its run directory."""
    directory = tmp_path_factory.mktemp("run")
    trainer = average_too(make_trainer(method_of("rate", "m"), make_images()), 0.5)
    with RunLog(directory) as log:
        trainer.fit(2, log, {})
    return trainer, directory


@pytest.mark.parametrize("method", ["bptt", "rate"])
def test_the_average_is_of_the_weights_and_statistics_after_each_step(method):
    trainer, expected = average_too(make_trainer(method_of(method, "s"), make_images()), 0.75), {}

    def follow(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for name, value in trainer.net.state_dict().items():
            old = expected.get(name, value)
            expected[name] = 0.75 * old + 0.25 * value if value.is_floating_point() else value

    trainer.optimizer.register_step_post_hook(follow)
    trainer.train_epoch("")
    found = trainer.ema.module.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
            assert not torch.equal(value, trainer.net.state_dict()[name]), name


def test_the_average_is_what_is_tested_and_saved(fitted):
    trainer, directory = fitted
    last, best = (checkpoint.load(directory / name) for name in (checkpoint.LAST, checkpoint.BEST))
    assert_same(last["model"], trainer.ema.module.state_dict())
    assert_same(last["trained"], trainer.net.state_dict())
    assert not same(last["model"], last["trained"])
    for saved in (last, best):
        net = average_too(make_trainer(trainer.method, make_images()), 0.5).ema.module
        net.load_state_dict(saved["model"])
        found = evaluate(net, trainer.method, trainer.precision, trainer.val_loader, CPU)
        assert found.loss == history(saved)[-1]["val_loss"]


def test_to_keep_an_average_changes_no_weight(fitted):
    plain = make_trainer(method_of("rate", "m"), make_images())
    plain.train_epoch("")
    averaging = average_too(make_trainer(method_of("rate", "m"), make_images()), 0.5)
    averaging.train_epoch("")
    assert_same(averaging.net.state_dict(), plain.net.state_dict())
