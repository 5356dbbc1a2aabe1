"""Numbers that are not finite: found in the loss and in every gradient, and kept off the weights."""

import copy
import math
import signal

import pytest
import torch
import torch.nn.functional as F

from tests.experiment.script_helpers import load, only_run, run_here, tiny_networks
from tests.train.test_engine import CPU, make_images, make_trainer, method_of
from util.train.guard import Guard, NotFiniteError
from util.train.method import Precision
from util.train.optim import OPTIMIZERS, load_optimizer
from util.train.signals import StoppedError

STEPS = 3  # of an epoch: 10 images in batches of 4
BAD = [math.nan, math.inf, -math.inf]


def trainer_with(value: float, parameter: str | None, step: int, **optimizer):
    """Whose loss, or the gradient of ``parameter``, is ``value`` times what it should be in that step."""
    trainer = make_trainer(method_of("bptt", "m"), make_images(), momentum=0.9, **optimizer)

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * value if trainer.step + 1 == step else tensor

    if parameter is None:
        forward = trainer.net.forward
        trainer.net.forward = lambda x, **how: poisoned(forward(x, **how))
    else:
        dict(trainer.net.named_parameters())[parameter].register_hook(poisoned)
    return trainer


def learned(trainer) -> list[torch.Tensor]:
    """Weights and momenta."""
    momenta = [state["momentum_buffer"] for state in trainer.optimizer.state.values()]
    return [value.detach().clone() for value in [*trainer.net.parameters(), *momenta]]


def after(steps: int, **optimizer) -> list[torch.Tensor]:
    """What is learned by so many steps of the first epoch with good numbers."""
    trainer = make_trainer(method_of("bptt", "m"), make_images(), momentum=0.9, **optimizer)
    trainer.stop.check = lambda: stop_after(steps, trainer)
    with pytest.raises(StoppedError):
        trainer.train_epoch()
    return learned(trainer)


def stop_after(steps: int, trainer) -> None:
    if trainer.step == steps:
        raise StoppedError(signal.SIGTERM)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("parameter", [None, "features.0.weight", "features.4.bias", "classifier.bias"])
def test_a_bad_number_is_named_and_changes_no_weight(value, parameter):
    trainer = trainer_with(value, parameter, step=2)
    with pytest.raises(NotFiniteError) as caught:
        trainer.train_epoch()
    what = "the training loss is nan" if parameter is None else f"the gradient of {parameter} is not finite"
    assert str(caught.value) == f"{what} at step 2"
    assert all(map(torch.equal, learned(trainer), after(1)))


def test_large_numbers_are_finite():
    """Their squares are not: the sum that a norm takes would overflow."""
    trainer = trainer_with(1e200, "classifier.bias", step=2)
    trainer.train_epoch()
    assert trainer.step == STEPS


def fused() -> dict[str, bool]:
    """The optimizer of a GPU on this CPU, where PyTorch has it."""
    try:
        p = torch.nn.Parameter(torch.ones(1))
        p.grad = torch.ones(1)
        torch.optim.SGD([p], 0.1, fused=True).step()
    except (RuntimeError, NotImplementedError):
        pytest.skip("this PyTorch has no fused SGD for the CPU")
    return {"fused": True}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("parameter", [None, "features.0.weight", "classifier.bias"])
def test_with_a_fused_optimizer_the_flag_is_read_late_and_the_weights_are_from_before_all_the_same(value, parameter):
    """No later step moves them, though its own numbers are good."""
    trainer = trainer_with(value, parameter, step=2, **fused())
    what = "the training loss is nan" if parameter is None else "the gradient of a parameter is not finite"
    with pytest.raises(NotFiniteError, match=f"^{what} at step 2$"):
        trainer.train_epoch()
    assert trainer.step == STEPS
    assert all(map(torch.equal, learned(trainer), after(1, **fused())))


def test_with_a_fused_optimizer_good_numbers_train_as_ever():
    trainer, plain = (make_trainer(method_of("bptt", "m"), make_images(), **how) for how in (fused(), {}))
    for one in (trainer, plain):
        one.train_epoch()
    for a, b in zip(trainer.net.parameters(), plain.net.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_flag_is_read_before_anything_is_saved(tmp_path):
    trainer = trainer_with(math.nan, None, step=1, **fused())
    saved = []

    def save() -> None:
        trainer.save(tmp_path, {})
        saved.append(trainer.step)

    trainer.save_every = 1
    with pytest.raises(NotFiniteError, match="at step 1"):
        trainer.train_epoch(save=save)
    assert saved == []
    assert list(tmp_path.iterdir()) == []


def test_the_flag_of_a_fused_optimizer_is_read_after_so_many_steps():
    net = torch.nn.Linear(2, 2)
    guard = Guard(net, torch.optim.SGD(net.parameters(), 0.1, **fused()), CPU)
    for step in range(1, Guard.UNREAD):
        guard.watch(torch.tensor(math.nan if step >= 7 else 1.0), step)
    with pytest.raises(NotFiniteError, match=r"at step 7$"):
        guard.watch(torch.tensor(1.0), Guard.UNREAD)


def test_a_gradient_scaler_deals_with_gradients_but_not_with_a_loss():
    net = torch.nn.Linear(2, 2)
    guard = Guard(net, torch.optim.SGD(net.parameters(), 0.1), CPU, torch.amp.GradScaler("cpu"))
    net.weight.grad = torch.full((2, 2), math.inf)
    guard.watch(torch.tensor(1.0), 1)
    with pytest.raises(NotFiniteError, match="the training loss is inf at step 2"):
        guard.watch(torch.tensor(math.inf), 2)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("was_fused", [True, False])
def test_whether_an_optimizer_is_fused_is_the_devices_choice_and_not_the_checkpoints(optim, was_fused):
    """A run continued on a CPU after a GPU, or the other way round."""
    net = torch.nn.Linear(2, 2)
    F.mse_loss(net(torch.ones(1, 2)), torch.ones(1, 2)).backward()
    optimizer = OPTIMIZERS[optim]([*net.parameters()], 0.1)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["fused"] = was_fused
    load_optimizer(optimizer, state)
    assert [group["fused"] for group in optimizer.param_groups] == [None]
    optimizer.step()


@pytest.mark.parametrize("more", [["--save_every", "1"], ["--train_batch_size", "1437"]], ids=["steps", "epochs"])
def test_an_update_that_overflows_is_not_saved(tmp_path, capfd, more):
    """Loss and gradients are finite; the weights after it are not."""
    flags = ["--T", "1", "--num_epoch", "9", "--lr", "1e6", "--wd", "1e6", "--scheduler", "constant", *more]
    with tiny_networks("resnet18"):
        assert run_here(*flags, "--log_path", tmp_path) == 2
    assert " is not finite " in capfd.readouterr().err
    for name in ("last.pth", "previous.pth"):
        path = only_run(tmp_path) / name
        assert not path.exists() or all(x.isfinite().all() for x in load(path)["model"].values())


@pytest.fixture
def _unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_unwritten_memory_is_nan")
def test_after_a_skipped_first_step_fused_sgd_takes_the_first_step_of_a_fresh_one():
    """A gradient scaler's first steps are skipped as a rule; torch would leave the momenta unwritten."""
    skipping, fresh = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = OPTIMIZERS["SGD"]([{"params": [skipping], "weight_decay": 0.01}], 0.1, **fused())
    optimizer.found_inf, skipping.grad = torch.tensor(1.0), torch.full((3,), math.inf)
    optimizer.step()
    assert torch.equal(skipping, fresh)
    del optimizer.found_inf
    plain = OPTIMIZERS["SGD"]([{"params": [fresh], "weight_decay": 0.01}], 0.1)
    for gradient in (torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 0.5, 3.0])):
        skipping.grad = fresh.grad = gradient
        for one in (optimizer, plain):
            one.step()
        torch.testing.assert_close(skipping, fresh)


def test_gradients_that_overflow_at_every_loss_scale_end_the_run():
    trainer = trainer_with(math.inf, "classifier.bias", step=1)
    trainer.precision = Precision("off", CPU)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-15)
    trainer.__post_init__()
    dict(trainer.net.named_parameters())["classifier.bias"].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NotFiniteError, match=r"overflow in fp16 even with the loss scaled by .*--amp bf16"):
        trainer.train_epoch()
    assert trainer.step < STEPS
