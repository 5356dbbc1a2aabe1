"""Rate-based backpropagation: the method, installed as the package `rate_backprop`."""

from .attach import bptt_model_setting, detach, rate_model_setting
from .check import check_network
from .problem import Problem, UnsupportedModuleError
from .registry import rule_for
from .rule import Rule
from .support import problems
from .sync_norm import sync_batch_norm

__all__ = [
    "Problem",
    "Rule",
    "UnsupportedModuleError",
    "bptt_model_setting",
    "check_network",
    "detach",
    "problems",
    "rate_model_setting",
    "rule_for",
    "sync_batch_norm",
]
