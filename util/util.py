"""Rate-based backpropagation for SpikingJelly networks: the names that a user needs. The method lives in `util.rate`.

rate_model_setting(net, time_step=4, step_mode="m")     # your training loop stays as it is
...
bptt_model_setting(net, time_step=4, step_mode="m")     # back to backpropagation through time
"""

from .rate import (
    UnsupportedModuleError,
    bptt_model_setting,
    check_network,
    detach,
    problems,
    rate_model_setting,
    rate_of,
    rule_for,
    sync_batch_norm,
)

__all__ = [
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
