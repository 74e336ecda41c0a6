"""One episode while it happens: what a lane replied so far, what the policy is asked, and the `Episode` in the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data.episode import Episode
from data.schema import IMAGE, STATE
from data.sim.execution import EveryNth, TemporalEnsemble
from data.sim.lanes import Outcome, Replies
from data.sim.policies import EXPERT

MOST_ROOM = 1000  # rows: memory that is not written to costs nothing, but an endless episode must not ask for it all


class _Rows:
    """Rows that come by and by, in an array that doubles when it is full: nothing to stack at the end."""

    def __init__(self, like: np.ndarray, room: int) -> None:
        self._array = np.empty((room, *like.shape), like.dtype)
        self._count = 0

    def extend(self, rows: Sequence[np.ndarray]) -> None:
        while self._count + len(rows) > len(self._array):
            self._array = np.concatenate([self._array, np.empty_like(self._array)])
        for i, row in enumerate(rows, self._count):
            self._array[i] = row
        self._count += len(rows)

    def first(self, count: int) -> np.ndarray:
        return self._array[:count]


@dataclass(kw_only=True)
class Trial:
    """One episode while it happens.

    ```
     seen      o0     o1     o2  ...   what a history of frames, their alignment and padding at reset are drawn from
     actions      a0     a1      ...
     outcomes     r0     r1      ...
    ```
    """

    max_steps: int  # of the environment: how much room to begin with
    index: int  # place of its seed among the seeds
    seed: int
    execution: EveryNth | TemporalEnsemble
    at_reset: dict = field(default_factory=dict)  # the environment's info before the first action
    latest: dict = field(default_factory=dict)  # and after the last
    fresh: dict[str, Sequence[np.ndarray]] = field(default_factory=dict)  # seen since the last command
    seen: dict[str, _Rows] = field(default_factory=dict)  # all of it
    under_way: np.ndarray | None = None  # actions [k, a] that the lane was told
    actions: list[np.ndarray] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def hear(self, replies: Replies) -> int:
        """Take in the reply to `reset`, or those to the actions under way; the number of steps done."""
        self.fresh = replies.observation
        self.latest = replies.outcomes[-1].info
        if self.under_way is None:
            self.at_reset = self.latest
            return 0
        done = len(replies.outcomes)  # fewer than were told, if the episode ended
        self.actions.extend(self.under_way[:done])
        self.outcomes.extend(replies.outcomes)
        return done

    def question(self) -> dict[str, np.ndarray]:
        """What the policy is shown."""
        expert = {EXPERT: self.latest[EXPERT]} if EXPERT in self.latest else {}
        return {name: rows[-1] for name, rows in self.fresh.items()} | expert

    def keep(self) -> None:
        """Copy what was heard last, before the lane overwrites it: that is, before the reply to its next command."""
        for name, rows in self.fresh.items():
            if name not in self.seen:
                self.seen[name] = _Rows(rows[0], room=min(self.max_steps, MOST_ROOM) + 1)
            self.seen[name].extend(rows)

    @property
    def over(self) -> bool:
        return bool(self.outcomes) and self.outcomes[-1].over

    def episode(self, scene: str, policy_digest: str) -> Episode:
        length = len(self.outcomes)

        def flags(values: Iterable[bool]) -> np.ndarray:
            return np.fromiter(values, bool, length)

        infos = [outcome.info for outcome in self.outcomes]
        cameras = [name for name in self.seen if name.startswith(IMAGE)]
        return Episode(
            scene=scene,
            seed=self.seed,
            task=self.at_reset["task"],
            policy_digest=policy_digest,
            randomization=self.at_reset["randomization"],
            images={name.removeprefix(IMAGE): self.seen[name].first(length) for name in cameras},
            state=self.seen[STATE].first(length),
            action=np.stack(self.actions),
            reward=np.array([outcome.reward for outcome in self.outcomes], np.float32),
            success=flags(info["success"] for info in infos),
            terminated=flags(outcome.terminated for outcome in self.outcomes),
            truncated=flags(outcome.truncated for outcome in self.outcomes),
            subgoals={name: flags(info["subgoals"][name] for info in infos) for name in self.at_reset["subgoals"]},
            subgoals_at_reset=self.at_reset["subgoals"],
        )
