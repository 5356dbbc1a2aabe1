"""What a trained network does: gradients beside BPTT's, spikes over layers and time, operations, mistakes."""
