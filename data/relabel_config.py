"""How chunks get proposals; apart from `data.relabel`, so that `--help` need not wait for polars."""

from dataclasses import dataclass, field

from data.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Relabel:
    """Which policy proposes how many chunks, beside those that were executed."""

    source: str = ""  # folder of a checkpoint of ours, or of LeRobot's PI0 or PI05; empty = the night's own checkpoint
    samples: int = 4  # K, proposals per chunk
    seed: int = 0  # noise derives from (seed, collection, episode, step, sample)
    batch_size: int = 32  # chunks whose observations are read together; K times as many are denoised together
    steps: int | None = None  # denoising steps; none = the policy's own
    cameras: dict[str, str] = field(default_factory=dict)  # pi0's -> ours, "" = go without; equal names need no entry
    state: tuple[str, ...] = ()  # our state components in pi0's order; none = all as they are
    execute: bool = False  # also execute one proposal per episode in the simulator, for its true reward

    def __post_init__(self) -> None:
        if min(self.samples, self.batch_size) < 1 or (self.steps is not None and self.steps < 1):
            raise BadInput("relabel.samples, relabel.batch_size and relabel.steps must each be at least 1")
