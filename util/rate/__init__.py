"""Rate-based backpropagation: the method, installed as the package `rate_backprop`."""

from .attach import bptt_model_setting, detach, rate_model_setting
from .check import check_network
from .problem import Problem, UnsupportedModuleError
from .rated import rate_of
from .rule import Rule, rule_for
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
    "rate_of",
    "rule_for",
    "sync_batch_norm",
]
