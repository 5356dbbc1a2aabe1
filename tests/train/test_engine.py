"""The training engine in this process: what a step computes, what an epoch measures, what evaluation leaves alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import util.train.engine
import util.train.meter
from model import MODELS
from model.layer import SpikingClassifier
from tests.experiment.script_helpers import METRICS, PAIRS, history, metrics, scalars, tiny
from util.train import checkpoint
from util.train.batches import data_loaders
from util.train.engine import Trainer
from util.train.evaluation import evaluate
from util.train.meter import FiringRates, Meter, neuron_layers
from util.train.method import Bptt, Method, Precision, Rate
from util.train.optim import OPTIMIZERS, SCHEDULERS, parameter_groups
from util.train.run_log import Logged, RunLog

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")
FULL = Precision("off", CPU)
T = 4
pairs = pytest.mark.parametrize(("method", "step_mode"), PAIRS)


def method_of(name: str, step_mode: str, time_step: int = T, scale_loss: bool = True) -> Method:
    return Rate(time_step, step_mode, rate_loss_scale=scale_loss) if name == "rate" else Bptt(time_step, step_mode)


def make_net(method: Method) -> SpikingClassifier:
    torch.manual_seed(0)
    net = tiny(num_classes=7, in_channel=2).double()
    method.attach(net)
    return net


def make_images(count: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 2, 6, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(images, torch.arange(count) % 7)


def make_trainer(
    method: Method, images: TensorDataset, batch: int = 4, epochs: int = 3, lr: float = 0.1, terms=(), **optimizer
) -> Trainer:
    net, terms = make_net(method), nn.ModuleList(terms)
    optimizer = torch.optim.SGD([*net.parameters(), *terms.parameters()], lr, **optimizer)
    loaders = data_loaders(images, images, batch, batch, 0, CPU, seed=3)
    schedule = SCHEDULERS["cosine"](optimizer, epochs)
    return Trainer(net, method, FULL, optimizer, schedule, *loaders, CPU, seed=3, terms=terms)


def changes(trainer: Trainer) -> list[torch.Tensor]:
    """What one epoch adds to each parameter."""
    before = [p.detach().clone() for p in trainer.net.parameters()]
    trainer.train_epoch("")
    return [p.detach() - b for p, b in zip(trainer.net.parameters(), before, strict=True)]


def states(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# A training step


def gradients(method: Method, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    net = make_net(method)
    method.backward(F.cross_entropy(method.forward(net, x), y))
    return [p.grad for p in net.parameters()]


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_the_rate_gradient_is_scaled_by_exactly_one_over_t(step_mode):
    x, y = make_images().tensors
    scaled = gradients(method_of("rate", step_mode, 4, True), x, y)
    plain = gradients(method_of("rate", step_mode, 4, False), x, y)
    assert all(g.abs().max() > 0 for g in plain[-2:])
    for a, b in zip(scaled, plain, strict=True):
        assert torch.equal(a, b / 4)  # a power of two: exact
    scaled, plain = (gradients(method_of("rate", step_mode, 3, on), x, y) for on in (True, False))
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b / 3, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_the_bptt_gradient_is_never_scaled(step_mode):
    x, y = make_images().tensors
    method = method_of("bptt", step_mode, 4, True)
    net = make_net(method)
    F.cross_entropy(method.forward(net, x), y).backward()
    for grad, p in zip(gradients(method, x, y), net.parameters(), strict=True):
        assert torch.equal(grad, p.grad)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_an_epoch_applies_the_loss_scale_and_reports_the_loss_without(step_mode):
    images = make_images()
    trainers = [make_trainer(method_of("rate", step_mode, 4, on), images, batch=10, lr=1.0) for on in (True, False)]
    scaled, plain = (changes(trainer) for trainer in trainers)
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b / 4, rtol=1e-6, atol=1e-12)

    x, y = images.tensors
    net, method = make_net(trainers[0].method), trainers[0].method
    loss = F.cross_entropy(method.forward(net, x), y).item()
    for on in (True, False):
        trainer = make_trainer(method_of("rate", step_mode, 4, on), images, batch=10)
        assert trainer.train_epoch("").loss == pytest.approx(loss, rel=1e-12)


def test_the_loss_scale_is_a_learning_rate_and_a_weight_decay():
    """With SGD: lr and wd with the scale 1/4 do what lr/4 and 4 wd do without it."""
    settings = {"momentum": 0.9}
    method = [method_of("rate", "m", 4, on) for on in (True, False)]
    scaled = make_trainer(method[0], make_images(), lr=0.4, weight_decay=0.01, **settings)
    plain = make_trainer(method[1], make_images(), lr=0.1, weight_decay=0.04, **settings)
    for a, b in zip(changes(scaled), changes(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pairs
def test_an_epoch_is_the_textbook_loop(method, step_mode):
    """To the last bit: no gradient left over from the batch before, no state of the neurons either."""
    settings = {"momentum": 0.9, "weight_decay": 5e-4}
    trainer = make_trainer(method_of(method, step_mode), make_images(), batch=4, **settings)
    twin = make_trainer(method_of(method, step_mode), make_images(), batch=4, **settings)
    meter = trainer.train_epoch("")

    net, losses = twin.net.train(), []
    twin.train_loader.sampler.start_at(1)
    for x, y in twin.train_loader:
        functional.reset_net(net)
        out = net(x.expand(T, *x.shape)) if step_mode == "m" else sum(net(x) for _ in range(T)) / T
        loss = F.cross_entropy(out, y)
        twin.optimizer.zero_grad()
        (loss / T if method == "rate" else loss).backward()
        twin.optimizer.step()
        losses += [loss.item()] * len(y)

    assert len(losses) == 10
    assert_same(trainer.net.state_dict(), twin.net.state_dict())
    assert meter.loss == pytest.approx(sum(losses) / 10, rel=1e-12)


def test_an_epoch_turns_training_mode_on_and_leaves_no_neuron_charged():
    trainer = make_trainer(method_of("bptt", "m"), make_images())
    trainer.net.eval()
    trainer.train_epoch("")
    assert all(module.training for module in trainer.net.modules())
    nodes = [module for module in trainer.net.modules() if isinstance(module, neuron.LIFNode)]
    assert [node.v for node in nodes] == [0.0, 0.0]


# What the network is shown


class Recorder(nn.Module):
    """Answers with the sum of what it is shown and keeps it."""

    step_mode = "s"

    def __init__(self):
        super().__init__()
        self.shown: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shown.append(x)
        x = x.mean(0) if x.dim() == 5 else x
        return x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("kind", ["images", "frames"])
def test_images_are_shown_at_every_step_and_frames_one_by_one(step_mode, kind):
    batch, size = 3, (2, 5, 6)
    x = torch.randn(batch, *size) if kind == "images" else torch.randn(batch, T, *size)
    steps = [x if kind == "images" else x[:, t] for t in range(T)]
    net = Recorder()
    out = method_of("bptt", step_mode).forward(net, x)
    if step_mode == "m":
        (shown,) = net.shown
        assert shown.shape == (T, batch, *size)
        net.shown = list(shown)
    assert len(net.shown) == T
    for shown, step in zip(net.shown, steps, strict=True):
        assert torch.equal(shown, step)
    torch.testing.assert_close(out, sum(step.flatten(1).sum(1, keepdim=True) for step in steps) / T)


@pairs
@pytest.mark.parametrize("training", [True, False])
def test_the_output_is_that_of_calling_the_network(method, step_mode, training):
    method = method_of(method, step_mode)
    frames = torch.randn(3, T, 2, 6, 6, dtype=torch.float64)
    net, twin = make_net(method).train(training), make_net(method).train(training)
    first = method.forward(net, frames)
    sequence = frames.transpose(0, 1)
    expected = twin(sequence) if step_mode == "m" else torch.stack([twin(step) for step in sequence]).mean(0)
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(method.forward(net, frames), first)  # the neurons start anew


# Optimizer and schedule


@pytest.mark.parametrize("name", MODELS)
def test_weights_alone_decay_and_every_parameter_is_updated_once(name):
    net = MODELS[name]()
    decayed = {f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    names = {id(p): name for name, p in net.named_parameters()}
    with_decay, without = parameter_groups(net, 0.01)
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.01, 0.0)
    assert {names[id(p)] for p in with_decay["params"]} == decayed
    assert {names[id(p)] for p in without["params"]} == set(names.values()) - decayed
    assert len(with_decay["params"]) + len(without["params"]) == len(names)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), layer.GroupNorm(2, 4)],
    ids=lambda norm: f"{type(norm).__module__.split('.')[0]} {type(norm).__name__}",
)
def test_no_normalisation_decays(norm):
    with_decay, without = parameter_groups(nn.Sequential(norm, nn.Linear(4, 4)), 0.01)
    assert [p.shape for p in with_decay["params"]] == [(4, 4)]
    assert len(without["params"]) == 3


def test_what_a_neuron_learns_does_not_decay():
    with_decay, without = parameter_groups(tiny(neuron="plif"), 0.01)
    assert sum(p.shape == () for p in without["params"]) == 2
    assert all(p.dim() > 1 for p in with_decay["params"])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_keeps_the_groups(optim):
    optimizer = OPTIMIZERS[optim](parameter_groups(tiny(), 0.01), 0.2)
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.01, 0.2), (0.0, 0.2)]
    if optim == "SGD":
        assert [(group["momentum"], group["nesterov"]) for group in optimizer.param_groups] == [(0.9, False)] * 2


def learning_rates(scheduler: str, epochs: int, lr: float) -> list[float]:
    """Of each epoch, and the one after the last."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)
    schedule = SCHEDULERS[scheduler](optimizer, epochs)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 300])
def test_cosine_goes_from_lr_to_zero_over_all_epochs(epochs):
    expected = [0.2 / 2 * (1 + math.cos(math.pi * k / epochs)) for k in range(epochs + 1)]
    assert learning_rates("cosine", epochs, 0.2) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 100])
def test_step_divides_by_ten_at_half_and_at_three_quarters(epochs):
    expected = [0.2 * 0.1 ** ((k >= epochs / 2) + (k >= epochs * 3 / 4)) for k in range(epochs)]
    assert learning_rates("step", epochs, 0.2)[:-1] == pytest.approx(expected)


def test_constant_stays():
    assert learning_rates("constant", 20, 0.2) == [0.2] * 21


# Measuring


OUT = torch.tensor([  # classes of each row from best to worst: 0 1 2 3 4 5 6 / 6 5 4 3 2 1 0
    [7.0, 6, 5, 4, 3, 2, 1],
    [7.0, 6, 5, 4, 3, 2, 1],
    [1.0, 2, 3, 4, 5, 6, 7],
    [1.0, 2, 3, 4, 5, 6, 7],
])  # fmt: skip


def test_meter_counts_by_hand():
    meter = Meter(CPU)
    meter.add(torch.tensor(2.0), OUT[:3], torch.tensor([0, 4, 1]))  # first, fifth, sixth
    meter.add(torch.tensor(6.0), OUT[3:], torch.tensor([6]))  # first
    assert meter.stop() is meter
    assert (meter.loss, meter.top1, meter.top5) == (3.0, 50.0, 75.0)
    assert meter.scalars() == {"loss": 3.0, "accuracy/top1": 50.0, "accuracy/top5": 75.0}


def test_a_last_batch_that_is_smaller_weighs_less():
    whole, split = Meter(CPU), Meter(CPU)
    target = torch.tensor([0, 5, 6, 1])
    whole.add(F.cross_entropy(OUT, target), OUT, target)
    for part in (slice(0, 3), slice(3, 4)):
        split.add(F.cross_entropy(OUT[part], target[part]), OUT[part], target[part])
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (split.top1, split.top5) == (whole.top1, whole.top5) == (50.0, 50.0)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_the_best_five_hold_all(classes):
    meter = Meter(CPU)
    meter.add(torch.tensor(1.0), OUT[:, :classes], torch.full((4,), classes - 1))
    assert (meter.top1, meter.top5) == (50.0, 100.0)


def test_meter_sums_many_batches_without_losing_digits():
    meter = Meter(CPU)
    for _ in range(3000):
        meter.add(torch.tensor(0.1), OUT, torch.zeros(4, dtype=torch.long))
    assert meter.loss == pytest.approx(torch.tensor(0.1).item(), rel=1e-9)


def test_images_per_second_stops_with_the_meter(monkeypatch):
    clock = [10.0]
    monkeypatch.setattr(util.train.meter.time, "perf_counter", lambda: clock[0])
    meter = Meter(CPU)
    meter.add(torch.tensor(1.0), OUT, torch.zeros(4, dtype=torch.long))
    clock[0] = 12.0
    assert meter.images_per_second == 2.0
    meter.stop()
    clock[0] = 100.0
    assert meter.images_per_second == 2.0


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_without_float64_have_their_sums_on_the_cpu(kind):
    assert Meter(torch.device(kind)).state_dict()["sums"].dtype == torch.float64


# Firing rates


@pairs
def test_firing_rates_are_the_mean_of_all_spikes(method, step_mode):
    """Over all images, steps and neurons of a layer; the truth is counted in a BPTT twin, spike by spike."""
    batches = [make_images(10).tensors[0][part] for part in (slice(0, 4), slice(4, 8), slice(8, 10))]
    net, twin = make_net(method_of(method, step_mode)), make_net(method_of("bptt", step_mode))
    spikes: dict[str, list[torch.Tensor]] = {}

    def keep(name: str):
        return lambda module, args, out: spikes.setdefault(name, []).append(out.detach().flatten())

    for name, module in twin.named_modules():
        if isinstance(module, neuron.LIFNode):
            module.register_forward_hook(keep(name))
    for x in batches:
        method_of("bptt", step_mode).forward(twin, x)
    expected = {name: torch.cat(of_layer).mean().item() for name, of_layer in spikes.items()}

    with FiringRates(net) as rates:
        for x in batches:
            method_of(method, step_mode).forward(net, x).sum().backward()
    assert rates.by_layer() == pytest.approx(expected, rel=1e-9)
    assert rates.state_dict()["neurons"] == {name: torch.cat(of_layer).numel() for name, of_layer in spikes.items()}
    assert len(expected) == 2
    assert all(0.01 < rate < 0.99 for rate in expected.values())


@pairs
def test_firing_rates_come_from_training_batches_alone(method, step_mode):
    method, (x, y) = method_of(method, step_mode), make_images().tensors
    net = make_net(method)
    with FiringRates(net) as rates:
        method.forward(net, x)
    with FiringRates(net) as with_evaluation:
        method.forward(net, x)
        evaluate(net, method, FULL, [(3 * x, y)], CPU)
    assert with_evaluation.by_layer() == rates.by_layer()


@pytest.mark.parametrize("failing", [False, True])
def test_no_hook_stays_behind(failing):
    net = make_net(method_of("rate", "m"))
    before = {name: dict(module._forward_hooks) for name, module in net.named_modules()}
    with pytest.raises(KeyError) if failing else FiringRates(net):
        with FiringRates(net):
            assert any(module._forward_hooks for module in net.modules())
            if failing:
                raise KeyError
    assert {name: dict(module._forward_hooks) for name, module in net.named_modules()} == before


def test_firing_rates_change_no_number():
    trainers = [make_trainer(method_of("rate", "s"), make_images()) for _ in range(2)]
    trainers[0].train_epoch("")
    with FiringRates(trainers[1].net):
        trainers[1].train_epoch("")
    assert_same(trainers[0].net.state_dict(), trainers[1].net.state_dict())


# Evaluation


@pairs
def test_evaluation_uses_running_statistics(method, step_mode):
    """Image by image it gives what it gives in one batch, and what the network in eval mode gives by hand."""
    images = make_images()
    trainer = make_trainer(method_of(method, step_mode), images)
    trainer.train_epoch("")
    results = [evaluate(trainer.net, trainer.method, FULL, DataLoader(images, size), CPU) for size in (1, 4, 10)]
    x, y = images.tensors
    net = trainer.net.eval()
    functional.reset_net(net)
    with torch.no_grad():
        out = net(torch.stack([x] * T)) if step_mode == "m" else sum(net(x) for _ in range(T)) / T
    for result in results:
        assert result.loss == pytest.approx(F.cross_entropy(out, y).item(), rel=1e-9)
        assert result.top1 == pytest.approx(100 * (out.argmax(1) == y).double().mean().item())


class GradModes(nn.Module):
    """Notes whether autograd is on and whether the network trains."""

    step_mode = "s"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2 * 6 * 6, 7).double()
        self.seen = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add((torch.is_grad_enabled(), self.training))
        return self.layer(x.flatten(1))


def test_evaluation_builds_no_graph_and_restores_the_grad_mode():
    net = GradModes()
    result = evaluate(net, method_of("bptt", "s"), FULL, DataLoader(make_images(), 4), CPU)
    assert net.seen == {(False, False)}
    assert torch.is_grad_enabled()
    assert result.loss > 0


@pairs
def test_evaluation_changes_nothing_of_the_training(method, step_mode):
    trainers = [make_trainer(method_of(method, step_mode), make_images(), momentum=0.9) for _ in range(2)]
    for _ in range(2):
        for trainer in trainers:
            trainer.train_epoch("")
            trainer.step = 0
        before, random = states(trainers[0].net), torch.get_rng_state()
        evaluate(trainers[0].net, trainers[0].method, FULL, trainers[0].val_loader, CPU)
        assert_same(trainers[0].net.state_dict(), before)
        assert torch.equal(torch.get_rng_state(), random)
    assert_same(trainers[0].net.state_dict(), trainers[1].net.state_dict())


# All epochs


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A trainer after three epochs, and its run directory."""
    directory = tmp_path_factory.mktemp("run")
    trainer = make_trainer(method_of("rate", "m"), make_images(), epochs=3)
    with RunLog(directory) as log:
        trainer.fit(3, log, {"T": T})
    return trainer, directory


def test_the_learning_rate_of_an_epoch_is_the_published_one(fitted):
    trainer, _ = fitted
    expected = [0.1 / 2 * (1 + math.cos(math.pi * k / 3)) for k in range(3)]
    assert [row["lr"] for row in trainer.history] == pytest.approx(expected)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_the_history_is_what_was_written(fitted):
    trainer, directory = fitted
    assert [list(row) for row in trainer.history] == [METRICS] * 3
    assert metrics(directory) == trainer.history
    assert [step for step, _ in scalars(directory)["train/loss"]] == [1, 2, 3]


def test_the_reported_test_loss_is_that_of_the_saved_weights(fitted):
    trainer, directory = fitted
    for file, row in ((checkpoint.LAST, trainer.history[-1]), (checkpoint.BEST, trainer.best)):
        net = make_net(trainer.method)
        saved = checkpoint.load(directory / file)
        net.load_state_dict(saved["model"])
        assert history(saved)[-1] == row
        assert evaluate(net, trainer.method, FULL, trainer.val_loader, CPU).loss == row["val_loss"]


def test_the_best_epoch_is_the_first_of_equals():
    trainer = make_trainer(method_of("bptt", "m"), make_images())
    accuracies = enumerate([10.0, 30.0, 20.0, 30.0], 1)
    trainer.logged = [Logged({"epoch": k, "val_acc": accuracy}, {}, 0.0) for k, accuracy in accuracies]
    assert trainer.best["epoch"] == 2


def test_what_earlier_versions_kept_beside_it_is_not_read(fitted):
    trainer, _ = fitted
    other = make_trainer(trainer.method, make_images(), epochs=3)
    other.load_state_dict({**trainer.state_dict(), "epoch": 7, "history": []})
    assert other.logged == trainer.logged


def test_a_trainer_continues_from_its_state(fitted, tmp_path):
    """Its copy after one epoch, given to a new trainer, makes the same second and third."""
    trainer, _ = fitted
    first, second = (make_trainer(trainer.method, make_images(), epochs=3) for _ in range(2))
    for directory in ("first", "second"):
        (tmp_path / directory).mkdir()
    with RunLog(tmp_path / "first") as log:
        first.fit(1, log, {})
    content = copy.deepcopy(first.state_dict())
    checkpoint.load_state(second, content, tmp_path)
    assert not content  # which would hold the tensors a second time
    with RunLog(tmp_path / "second", second.logged) as log:
        second.fit(3, log, {})
    assert_same(second.net.state_dict(), trainer.net.state_dict())
    assert [row["lr"] for row in second.history] == [row["lr"] for row in trainer.history]


class Bar:
    """What `Meter.show` uses of a progress bar."""

    def __init__(self, disable: bool):
        self.disable, self.texts = disable, []

    def set_postfix_str(self, text: str) -> None:
        self.texts.append(text)


def test_the_progress_bar_shows_loss_accuracy_and_speed_at_most_twice_a_second(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("util.train.meter.time.perf_counter", lambda: clock[0])
    meter, bar = Meter(CPU), Bar(disable=False)
    meter.add(torch.tensor(0.5), torch.eye(3), torch.tensor([0, 1, 0]))
    for clock[0] in (0.2, 0.6, 0.7, 1.2):
        meter.show(bar)
    assert bar.texts == ["loss 0.5000, acc 66.67 %, 5 images/s", "loss 0.5000, acc 66.67 %, 2 images/s"]


def test_without_a_terminal_nothing_is_read_for_the_progress_bar():
    meter, bar = Meter(CPU), Bar(disable=True)
    meter.show(bar)
    assert bar.texts == []


# A test that tells nothing


@pytest.mark.parametrize(
    ("few", "hint"), [(50, "3 steps are few for the running statistics of BatchNorm"), (1, "try another --lr")]
)
def test_a_network_silent_in_the_test_alone_and_a_single_prediction_are_warned_of(monkeypatch, caplog, few, hint):
    monkeypatch.setattr(util.train.engine, "RUNNING_STEPS", few)
    trainer = make_trainer(method_of("rate", "m"), make_images())
    neurons = ", ".join(neuron_layers(trainer.net))
    for module in trainer.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(1e6)
    trainer.run_epoch()
    (said,) = caplog.messages
    assert said.startswith(f"epoch 1: no neuron of these layers fired in the test, though in training: {neurons}; ")
    assert "all test predictions are '" in said
    assert hint in said


def test_a_network_that_tells_images_apart_is_not_warned_of(caplog):
    make_trainer(method_of("rate", "m"), make_images(40), batch=4).run_epoch()
    assert caplog.messages == []
