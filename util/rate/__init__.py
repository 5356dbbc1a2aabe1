"""Rate-based backpropagation: the method, installed as the package `rate_backprop`."""

from .attach import UnsupportedModuleError, bptt_model_setting, detach, rate_model_setting
from .check import check_network

__all__ = ["UnsupportedModuleError", "bptt_model_setting", "check_network", "detach", "rate_model_setting"]
