"""`check_network` under its earlier name."""

from .rate.check import check_network, compare_gradients

__all__ = ["check_network", "compare_gradients"]
