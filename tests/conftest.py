"""Settings of all tests, and which of them run: see the markers in pyproject.toml."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest

# One thread each, here, in pytest-xdist's workers and in the scripts that tests start: tensors are small, and threads
# that wait for one another on a busy machine cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest begin first, in this order: what begins last must be short.
LONGEST = (
    *("test_kill", "test_gpu", "test_script", "test_fingerprints", "test_events", "test_distributed", "test_zoo"),
    *("test_interrupts", "test_alike", "test_fuzz", "test_bad_input", "test_dvs_script", "test_networks"),
    *("test_inline", "test_compiled", "test_speed_options", "test_data", "test_analysis", "test_states"),
)

left_out = pytest.StashKey[int]()


@pytest.fixture(scope="session", autouse=True)
def _files_checked_are_remembered_for_the_tests_alone(tmp_path_factory):
    from util.dataset import checksums

    checksums.memory_root = lambda: memory
    memory = tmp_path_factory.mktemp("checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests of the method make their networks and batches (tests/rate)")


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, here and in what tests start
    config.stash[left_out] = 0
    if without_slow(config):
        with suppress(ImportError):
            from hypothesis import settings

            settings.register_profile("plain", max_examples=10)  # of 100 in CI
            settings.load_profile("plain")
    if device := config.getoption("--device"):
        import torch

        from tests.on_device import DrawnOnTheCPU

        torch.set_default_device(device)
        DrawnOnTheCPU().__enter__()


def without_slow(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "not slow"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if mark := item.get_closest_marker("cover"):
            functions.setdefault((item.nodeid.partition("[")[0], *mark.args), []).append(item)
    for (_, n), cases in functions.items():
        for item in beyond_a_cover(cases, n):
            item.add_marker(pytest.mark.slow)
    config.stash[left_out] = without_slow(config) and sum(item.get_closest_marker("slow") is not None for item in items)
    order = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(Path(item.nodeid.partition("::")[0]).stem, len(order)))


def beyond_a_cover(cases: list[pytest.Item], n: int) -> Iterable[pytest.Item]:
    """The cases that bring no new combination of ``n`` parameters, when those that bring most are taken first."""
    named = {item: [(name, repr(value)) for name, value in item.callspec.params.items()] for item in cases}
    brings = {item: set(combinations(sorted(values), n)) for item, values in named.items()}
    while brings:
        best = max(brings, key=lambda item: len(brings[item]))
        if not (new := brings.pop(best)):
            return [best, *brings]
        brings = {item: rest - new for item, rest in brings.items()}
    return []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[left_out] = getattr(node, "workeroutput", {}).get("left_out", 0)  # each has collected them all


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[left_out]:
        terminalreporter.write_line(f"{config.stash[left_out]} slow tests were left out: pytest -m '' runs all")
