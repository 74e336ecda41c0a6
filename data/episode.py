"""One rollout in memory, as a simulator produces it and as `data.lerobot` writes and reads it.

```
 t             0        1        2             L = 3
 observation   o0       o1       o2            (o3, seen after the last action, is not kept)
 action        a0       a1       a2            executed between o_t and o_{t+1}
 reward        r0       r1       r2            what a_t earned:      next.reward
 subgoals      g0       g1       g2            true after a_t        (at_reset: before a0)
 success       s0       s1       s2            true after a_t:       next.success
 terminated    0        0        1             the task ended at a_t (success or failure)
 truncated     0        0        0             only the clock ended it
```
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, UInt8


@dataclass(frozen=True, kw_only=True)
class Episode:
    """`l` steps of one scene. Every array is row t = step t, see the drawing above."""

    scene: str  # registry name, e.g. "pick_cube"
    seed: int  # what reset(seed=...) was given: scene layout and randomisation follow from it
    task: str  # the instruction, in words
    policy_digest: str  # who acted: a checkpoint's digest, or "oracle:<digest>" or "random"
    randomization: dict[str, float | int | bool | str] = field(default_factory=dict)  # what the seed drew
    images: dict[str, UInt8[np.ndarray, "l height width 3"]]  # camera name -> pictures seen before a_t
    state: Float32[np.ndarray, "l s"]
    action: Float32[np.ndarray, "l a"]  # as executed
    reward: Float32[np.ndarray, " l"]
    success: Bool[np.ndarray, " l"]
    terminated: Bool[np.ndarray, " l"]
    truncated: Bool[np.ndarray, " l"]
    subgoals: dict[str, Bool[np.ndarray, " l"]]
    subgoals_at_reset: dict[str, bool]

    def __len__(self) -> int:
        return len(self.action)

    @property
    def succeeded(self) -> bool:
        return bool(self.success.any())
