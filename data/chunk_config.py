"""How steps become chunks; apart from `data.chunks`, so that `--help` need not wait for polars."""

from dataclasses import dataclass

from data.errors import BadInput
from data.registry import did_you_mean

REWARD_MODES = ("indicator", "discounted", "count")


@dataclass(frozen=True, kw_only=True)
class ChunkConfig:
    """How steps become chunks."""

    horizon: int = 10  # H, actions per decision
    gamma: float = 0.99  # discount per step, in (0, 1]
    reward_mode: str = "indicator"  # "indicator": any event pays 1; "discounted": Σ γ^k event; "count": Σ event
    stride: int = 1  # steps between the starts of two chunks

    def __post_init__(self) -> None:
        if self.reward_mode not in REWARD_MODES:
            raise BadInput(f"unknown reward_mode {self.reward_mode!r}{did_you_mean(self.reward_mode, REWARD_MODES)}")
        if self.horizon < 1 or self.stride < 1:
            raise BadInput(f"horizon {self.horizon} and stride {self.stride} are counts of steps; give 1 or more")
        if not 0 < self.gamma <= 1:
            raise BadInput(f"gamma {self.gamma} is no discount; give a number in (0, 1]")
