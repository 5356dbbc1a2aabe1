"""Settings of all tests."""

import os
import signal

import pytest

# One thread each, here, in pytest-xdist's workers and in the scripts that tests start: tensors are small, and threads
# that wait for one another on a busy machine cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `pytest -m quick`, what a change needs first: the mathematics on small networks, and the engine.
QUICK = {
    *("test_conftest", "test_architecture", "test_eligibility", "test_gradients", "test_layers", "test_static"),
    *("test_engine", "test_options"),
}


@pytest.fixture(scope="session", autouse=True)
def _files_checked_are_remembered_for_the_tests_alone(tmp_path_factory):
    from util.dataset import checksums

    checksums.memory_root = lambda: memory
    memory = tmp_path_factory.mktemp("checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests of the method make their networks and batches (tests/rate)")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in what tests start
    if device := config.getoption("--device"):
        import torch

        from tests.on_device import DrawnOnTheCPU

        torch.set_default_device(device)
        DrawnOnTheCPU().__enter__()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.module.__name__.rpartition(".")[2]
        if module in QUICK and "arch" not in item.fixturenames:  # the project's own networks are not small
            item.add_marker(pytest.mark.quick)
