"""Steps that are replayed: what surrounds the CUDA graph. A stand-in for the recorder repeats the function instead."""

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tests.experiment.script_helpers import PAIRS
from tests.train.test_engine import CPU, assert_same, make_images, make_trainer, method_of, states
from util.train import engine
from util.train.graphed import Graphed


class Repeats:
    """As `Recorder` without a GPU: a replay writes its results where the recording has put them."""

    def __init__(self):
        self.recorded, self.parameters, self.kept = 0, [], []  # ``kept``: what a recording leaves as it was

    def beside(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        before = [x.detach().clone() for x in self.kept]
        results, places = self._run(function)
        for x, value in zip(self.kept, before, strict=True):
            x.data.copy_(value)

        def replay():
            old = [p.grad for p in self.parameters]
            _, values = self._run(function)
            for place, value in zip(places, values, strict=True):
                place.copy_(value)
            for p, grad in zip(self.parameters, old, strict=True):
                p.grad = grad

        return replay, results

    def _run(self, function):
        """Its results, and the tensors that it writes: those in the results and gradients."""
        for p in self.parameters:
            p.grad = None
        results = function()
        return results, [*tensors(results), *(p.grad for p in self.parameters if p.grad is not None)]


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


@pytest.mark.parametrize(("method", "step_mode"), PAIRS)
def test_an_epoch_of_replayed_steps_is_an_epoch_of_steps(monkeypatch, method, step_mode):
    found = []
    for recorder in (None, Repeats()):
        monkeypatch.setattr(engine.Recorder, "of", lambda device, recorder=recorder: recorder)
        trainer = make_trainer(method_of(method, step_mode), make_images(23))  # batches of 4, and one of 3
        trainer.cuda_graph = True
        trainer.__post_init__()
        if recorder:
            recorder.parameters = list(trainer.net.parameters())
            recorder.kept = list(trainer.net.buffers())
        for _ in range(2):
            trainer.run_epoch()
        found.append((states(trainer.net), [epoch.scalars for epoch in trainer.logged]))
    assert recorder.recorded == 2  # training and testing, of whole batches
    assert_same(found[0][0], found[1][0])
    assert any("firing_rate" in tag for tag in found[1][1][0])  # which hooks count, that no replay runs
    for plain, replayed in zip(found[0][1], found[1][1], strict=True):
        of_speed = {"train/speed/images_per_second"}
        assert {k: v for k, v in plain.items() if k not in of_speed} == {
            k: v for k, v in replayed.items() if k not in of_speed
        }


def test_each_shape_is_recorded_by_itself():
    calls, recorder = [], Repeats()
    double = Graphed(lambda x: calls.append(len(x)) or 2 * x, CPU, recorder)
    for size in [2, 3, 2, 2, 3, 2, 2]:
        assert torch.equal(double(torch.full((size,), float(size))), torch.full((size,), 2.0 * size))
    assert recorder.recorded == 1


def test_what_cannot_be_recorded_goes_on_with_a_warning(caplog):
    class Fails(Repeats):
        def record(self, function):
            function()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    layer = nn.Linear(2, 1)

    def learn(x):
        layer(x).sum().backward()

    step = Graphed(learn, CPU, Fails(), layer.parameters())
    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            layer.zero_grad()
            step(torch.ones(3, 2))
            assert layer.bias.grad.item() == 3
    (record,) = caplog.records
    assert record.getMessage() == (
        "no CUDA graph (operation not permitted when stream is capturing): running without it"
    )
