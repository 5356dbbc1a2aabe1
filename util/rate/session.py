"""How a network was attached."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """See `attach.rate_model_setting`."""

    time_step: int
    step_mode: str
    time_dim: int = 0
    compiled: bool = False
    static_input: bool = False
    timeless: tuple[str, ...] = ()
    windows: int = 1
