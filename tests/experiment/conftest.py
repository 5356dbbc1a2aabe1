"""What the tests of bad input share: data sets and runs, good and bad, made once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiment import bad_inputs


@pytest.fixture(scope="module")
def surroundings() -> Iterator[None]:
    with bad_inputs.surroundings():
        yield


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """See `bad_inputs.prepare`."""
    root = tmp_path_factory.mktemp("prepared")
    with bad_inputs.surroundings():
        bad_inputs.prepare(root)
    return root
