"""What a frozen encoder knows: how many directions z uses, and what can be read off it by one linear map.

```
 training episodes   z, y --ridge--> W          y: the state that was given, or what only a simulator knows
 held-out episodes   z --W--> ŷ   R² = 1 - Σ(y - ŷ)² / Σ(y - mean of y)²      per component
```
A JEPA's own loss cannot say this: its target moves with it, and is easiest to hit where all observations look alike.
An encoder that nobody trained passes on much by chance, so a probe is read beside that of one with random weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64

from data.loader import ChunkSource
from models.encoder import Encoder
from models.layers.vicreg import effective_rank
from models.types import Observation

BATCH = 256  # observations per question
RIDGE = 1e-3  # penalty on the map, as a share of the rows


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was found."""

    rank: float  # effective rank of z on the held-out rows; at most its width
    r2: tuple[float, ...]  # of each probed component on the held-out rows

    @property
    def score(self) -> float:
        """What encoders are chosen by."""
        return float(np.mean(self.r2))


@torch.inference_mode()
def encode(
    encoder: Encoder, source: ChunkSource, on_rows: Callable[[int], None] = lambda n: None
) -> Float32[np.ndarray, "n d"]:
    """z of the observation that each chunk of `source` begins with, in its order."""
    encoder, rows = encoder.eval(), []
    for first in range(0, len(source), BATCH):
        index = np.arange(first, min(first + BATCH, len(source)))
        columns = source.gather(index, source.buffers(len(index)))
        seen = Observation.of(columns, columns["task"]).to(encoder.device)
        rows.append(encoder(seen).float().cpu())
        on_rows(len(index))
    return torch.cat(rows).numpy()


def probe(
    z: Float[np.ndarray, "n d"],
    y: Float[np.ndarray, "n k"],
    held_out_z: Float[np.ndarray, "m d"],
    held_out_y: Float[np.ndarray, "m k"],
) -> Probe:
    """Fit on the first two, score on the last two, which are of other episodes."""
    read = ridge(z, y)
    rank = effective_rank(torch.as_tensor(held_out_z)).item()
    return Probe(rank=rank, r2=tuple(r_squared(held_out_y, read(held_out_z)).tolist()))


def ridge(
    z: Float[np.ndarray, "n d"], y: Float[np.ndarray, "n k"]
) -> Callable[[Float[np.ndarray, "m d"]], Float64[np.ndarray, "m k"]]:
    """The linear map from z to y, by least squares with a penalty. z counts in deviations of its features."""
    x, y = z.astype(np.float64), y.astype(np.float64)
    center, width, offset = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8), y.mean(axis=0)
    x = (x - center) / width
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ (y - offset))
    return lambda other: (other.astype(np.float64) - center) / width @ weights + offset


def r_squared(y: Float[np.ndarray, "m k"], predicted: Float[np.ndarray, "m k"]) -> Float64[np.ndarray, " k"]:
    """Share of each component's variance that is explained; below 0 where its mean would do better."""
    missed = ((y.astype(np.float64) - predicted) ** 2).sum(axis=0)
    there = ((y - y.mean(axis=0, dtype=np.float64)) ** 2).sum(axis=0)
    return 1 - missed / np.maximum(there, 1e-12)
