"""The settings of conftest.py hold in the process that runs a test, be it one of pytest-xdist's."""

import os

import pytest
import torch

pytestmark = pytest.mark.quick


def test_one_thread_a_process():
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
