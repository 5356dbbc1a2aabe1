"""How far a loop has come is said."""

import pytest
import torch

from util.train import progress
from util.train.meter import Meter


@pytest.mark.parametrize("terminal", [False, True])
def test_where_there_is_no_terminal_a_line_says_how_far_with_which_loss_and_the_time_left(
    monkeypatch, caplog, capfd, terminal
):
    now = iter(range(0, 1000, 60))  # a minute a step
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    meter = Meter(torch.device("cpu"))
    loader = [torch.zeros(()) for _ in range(9)]
    with caplog.at_level("INFO"), progress.progress(loader, "epoch 2/3, test", meter, done=1) as batches:
        for _ in batches:
            meter.add(torch.tensor(0.5), torch.zeros(1, 2), torch.zeros(1))
    lines = [f"epoch 2/3, test: {step} of 9 steps, loss 0.5000, {left} left" for step, left in
             ((2, "14:00"), (7, "02:20"))]  # fmt: skip
    assert caplog.messages == ([] if terminal else lines)
    assert ("epoch 2/3, test:" in capfd.readouterr().err) == terminal
