"""The GPU kernel of IF and LIF neurons gives what the eager steps give. Without a GPU, by Triton's interpreter."""

import importlib
import sys

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from tests.rate.method_helpers import (
    MODES,
    assert_same_gradients,
    images,
    labels,
    lif_node,
    outputs,
    tiny_net,
    train_step,
)
from util.rate import compiled, neurons
from util.rate.dynamics import dynamics_of
from util.rate.eligibility import NeuronRecord, NeuronState, run_steps
from util.train.method import Precision
from util.util import rate_model_setting

triton = pytest.importorskip("triton")
if int(triton.__version__.partition(".")[0]) < 3:
    pytest.skip("the kernel is for Triton 3", allow_module_level=True)

RESETS = [(v_reset, detach) for v_reset in (None, 0.0, -0.3) for detach in (True, False)]
NEURONS = {
    "IF": lambda *rule: neuron.IFNode(1.0, rule[0], surrogate.Sigmoid(4.0), rule[1]),
    "the paper's LIF": lambda *rule: neuron.LIFNode(1.25, False, 1.0, rule[0], surrogate.Sigmoid(4.0), rule[1]),
    "LIF whose input decays": lambda *rule: neuron.LIFNode(1.7, True, 0.6, rule[0], surrogate.ATan(), rule[1]),
}
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # tolerance; bfloat16's sums are of float32


@pytest.fixture
def kernel(monkeypatch):
    if torch.get_default_device().type != "cuda":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.delitem(sys.modules, "util.rate.lif_kernel", raising=False)
    return importlib.import_module("util.rate.lif_kernel")


def run(function, dynamics, currents, steps_per_call: int):
    """All steps, so many a call: the record and the spikes."""
    record, spikes = NeuronRecord(NeuronState.start((0.0,))), []
    for part in currents.split(steps_per_call):
        record, s = function(dynamics, record, part)
        spikes.append(s)
    return record, torch.cat(spikes)


def currents(steps: int, dtype: torch.dtype) -> torch.Tensor:
    """[T, 2, 3, 5, 5], channels last: 150 elements, which is no multiple of a block."""
    x = torch.randn(steps * 2, 3, 5, 5, generator=torch.Generator().manual_seed(0), device="cpu")
    return (
        x.to(torch.get_default_device(), dtype).contiguous(memory_format=torch.channels_last).unflatten(0, (steps, 2))
    )


@pytest.mark.cover(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v_reset", "detach"), RESETS)
@pytest.mark.parametrize("kind", NEURONS)
def test_steps_at_once_and_one_by_one(kernel, kind, v_reset, detach, dtype):
    dynamics, x, tolerance = dynamics_of(NEURONS[kind](v_reset, detach)), currents(4, dtype), DTYPES[dtype]
    expected, expected_spikes = run(run_steps, dynamics, x.to(torch.promote_types(dtype, torch.float32)), 4)
    assert kernel.serves(dynamics, x)
    for steps_per_call in (4, 1):
        record, spikes = run(kernel.run_steps, dynamics, x, steps_per_call)
        assert spikes.dtype == dtype
        assert torch.equal(spikes, expected_spikes.to(dtype))
        ((slope,),), ((expected_slope,),) = record.state.memory_slopes, expected.state.memory_slopes
        for found, wanted in (
            (record.state.memory[0], expected.state.memory[0]),
            (slope, torch.as_tensor(expected_slope, dtype=slope.dtype)),
            (record.sums.spikes, expected.sums.spikes),
            (record.sums.slopes[0], expected.sums.slopes[0]),
        ):
            torch.testing.assert_close(found, wanted.expand_as(found), rtol=tolerance, atol=tolerance)


def test_steps_in_several_launches(kernel):
    dynamics, x = dynamics_of(NEURONS["the paper's LIF"](None, True)), currents(19, torch.float64)
    (expected, expected_spikes), (record, spikes) = (
        f(dynamics, NeuronRecord(NeuronState.start((0.0,))), x) for f in (run_steps, kernel.run_steps)
    )
    assert torch.equal(spikes, expected_spikes)
    assert spikes[0].stride() == x[0].stride()
    torch.testing.assert_close(record.sums, expected.sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "node", [neuron.ParametricLIFNode(), neuron.QIFNode(), neuron.IFNode(surrogate_function=surrogate.Erf())],
    ids=["learns tau", "no closed form", "another surrogate"],
)  # fmt: skip
def test_says_what_it_does_not_serve(kernel, node):
    assert not kernel.serves(dynamics_of(node), currents(2, torch.float32))


@pytest.fixture
def in_the_rules(kernel, monkeypatch):
    """With compiled=True the rules use it; what torch would compile runs as it is."""
    for place in (compiled, neurons):
        monkeypatch.setattr(
            place, "lif_kernel", lambda dynamics, x: kernel.run_steps if kernel.serves(dynamics, x) else None
        )
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)


@pytest.mark.parametrize("v_reset", [None, 0.0])
@pytest.mark.parametrize("mode", MODES)
def test_the_hooks_give_the_eager_gradients_with_it(in_the_rules, mode, v_reset):
    eager, found = (
        train_step(
            rate_model_setting(tiny_net(lambda: lif_node(v_reset=v_reset)), 4, mode, compiled=with_it),
            images(4), labels(), mode,
        )
        for with_it in (False, True)
    )  # fmt: skip
    assert_same_gradients(found.grads, eager.grads, 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast_currents_and_spikes_are_bfloat16_and_potentials_float32(in_the_rules, mode):
    net, device = tiny_net().float(), torch.get_default_device()
    rate_model_setting(net, 4, mode, compiled=True)
    precision, seen = Precision("bf16", device), []
    precision.attach(net)
    net.fire1.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype, module.v.dtype)))
    with precision.autocast():
        outputs(net, images(4).float(), mode)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32)}
