"""The kill test in a small form."""

import pytest

from tests.processes import finish, start_python


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--script", "cifar", "--num_epoch", "2"],
        ["--script", "dvs", "--num_epoch", "2", "--step_mode", "s", "--no-rate_flag", "--num_workers", "0"],
    ],
    ids=" ".join,
)
def test_a_run_killed_at_random_moments_ends_like_the_uninterrupted_one(flags):
    """Real processes, four SIGKILLs; `python tests/experiment/kill_test.py --kills 50` is the long form."""
    status, out, err = finish(start_python("tests/experiment/kill_test.py", "--kills", "4", "--tiny", *flags))
    assert status == 0, out + err
    assert "weights bit by bit equal: True" in out
