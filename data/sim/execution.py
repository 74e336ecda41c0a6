"""From chunks of predicted actions to the action of this step: what a policy's answers are used for, and how long.

```
 step            0    1    2    3    4          chunks of H = 3, named after the step they were asked at
 every 3rd       a0   a0   a0   a3   a3         open loop for 3 steps, then a new question
 every 1st       a0   a1   a2   a3   a4         only the first action of each chunk is used
 ensemble        a0   01   012  123  234        asked at each step; all chunks that reach this step are averaged
```
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from data.errors import BadInput

ACT_DECAY = 0.01  # temporal ensembling's m in ACT's published code


@dataclass(kw_only=True)
class EveryNth:
    """Execute the first `every` actions of a chunk (None: all of it), then ask again."""

    every: int | None
    _left: deque[np.ndarray] = field(default_factory=deque)

    @property
    def wants_chunk(self) -> bool:
        return not self._left

    def add(self, chunk: np.ndarray) -> None:
        """`chunk` [H, A] was predicted from the observation of the coming step."""
        self._left.extend(chunk[: self.every])

    def next(self, most: int = 1) -> np.ndarray:
        """The actions [k, A] of the coming k steps, at most `most`."""
        return np.stack([self._left.popleft() for _ in range(min(most, len(self._left)))])


@dataclass(kw_only=True)
class TemporalEnsemble:
    """Average what all chunks so far say about this step, the i-th oldest weighted exp(-m i) (ACT, Zhao et al. 2023).

    Older predictions weigh more, the opposite of an exponential moving average.
    """

    m: float = ACT_DECAY
    _chunks: deque[np.ndarray] = field(default_factory=deque)  # oldest first, each cut to begin at this step

    wants_chunk = True

    def add(self, chunk: np.ndarray) -> None:
        self._chunks.append(chunk)

    def next(self, most: int = 1) -> np.ndarray:
        """The action of this step, [1, A]."""
        here = np.stack([chunk[0] for chunk in self._chunks]).astype(np.float64)
        self._chunks = deque(chunk[1:] for chunk in self._chunks if len(chunk) > 1)
        weights = np.exp(-self.m * np.arange(len(here)))
        return np.average(here, axis=0, weights=weights)[None].astype(np.float32)


def execution(*, replan: int | None = None, temporal_ensemble: float | None = None) -> EveryNth | TemporalEnsemble:
    """The strategy for one episode: `replan` actions of each chunk, or ensembling with that m. Raises `BadInput`."""
    if replan is not None and replan < 1:
        raise BadInput(f"replan is {replan}; a policy is asked again after at least 1 action")
    if temporal_ensemble is None:
        return EveryNth(every=replan)
    if replan not in (None, 1):
        raise BadInput(f"replan is {replan} with temporal ensembling, which asks at every step; leave replan out")
    return TemporalEnsemble(m=temporal_ensemble)
