"""torch.compile(net) of an attached network: its gradients, whatever the compiler makes of the hooks."""

import pytest
import torch

from tests.rate.method_helpers import MODES, assert_same_gradients, attached, images, labels, tiny_net, train_step


@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_network_has_the_gradients_of_the_hooks(mode):
    """By the tracer, without code generation; two batches, of which the second runs what the first has traced."""
    net, twin = (attached(tiny_net(), "rate", 3, mode) for _ in range(2))
    compiled = torch.compile(net, backend="eager")
    for seed in (1, 2):
        x, y = images(3, seed=seed), labels()
        expected, actual = train_step(twin, x, y, mode), train_step(compiled, x, y, mode)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in actual.grads.items()}
        assert_same_gradients(grads, expected.grads, 1e-10)
