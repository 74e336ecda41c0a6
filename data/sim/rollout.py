"""A policy acts in the simulator: seeds in, episodes out, and each episode is a function of its seed alone.

```
 seeds     0 1 2 3 4 5                         every lane goes at its own pace and takes the next seed when it is free
 lane 0    |---- 0 ----|-- 2 --|---- 4 ---     a lane whose worker dies is replaced, and its seed is done again
 lane 1    |- 1 -|------- 3 -------|-- 5 --
 yielded         .     01    . 2   . 3         in the order of the seeds; early ones wait, boundedly many
```
What decides an episode: the configuration, the policy, the seed. What does not: how many lanes, which of them, who
else was asked, timing, dead workers.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import batched

import numpy as np

from data.episode import Episode
from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.execution import EveryNth, TemporalEnsemble, execution
from data.sim.lanes import Lane, WorkerLane, open_lanes, ready
from data.sim.policies import OraclePolicy, Policy, RandomPolicy
from data.sim.registry import SCENES
from data.sim.trial import Trial
from data.sim.vector import Backend, WorkerDied, resolve_backend

__all__ = ["OraclePolicy", "Policy", "RandomPolicy", "WorkerDied", "rollout"]

DEATHS_ALLOWED = 3  # of workers, over one and the same episode
STALL_S = 300.0  # seconds; a worker silent for so long hangs (a first frame on a slow CPU takes up to 15 s)
BURST = 10  # actions sent to a lane in one message at most; a message costs what 0.1 to 0.2 steps cost
AHEAD = 4  # episodes per lane that may be done or begun before an earlier seed's is


def rollout(
    config: SimConfig,
    policy: Policy,
    seeds: Sequence[int],
    *,
    num_envs: int = 2,
    replan: int | None = None,
    temporal_ensemble: float | None = None,
    backend: Backend = "auto",
    together: int = 1,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Episode]:
    """Yield one `Episode` per seed, in the order of `seeds`.

    replan: how many actions of a chunk are executed before the policy is asked again; None is the whole chunk.
    temporal_ensemble: ask at each step instead and average overlapping chunks with this m (`data.sim.execution`).
    together: how many lanes at most are put in one question. 1 keeps an episode a function of its seed to the last bit,
        because a network's kernels, and so its rounding, depend on the batch; more is for a GPU and many lanes.
    on_step: called with the number of environment steps just done, for progress bars.

    Memory: at most `AHEAD` finished episodes per lane are held. Workers end when the iterator is exhausted or closed.
    Raises `BadInput` for arguments that cannot be, and `WorkerDied` when one episode has cost `DEATHS_ALLOWED` workers.
    """
    if repeated := [seed for seed, times in Counter(seeds).items() if times > 1]:
        raise BadInput(f"seed {repeated[0]} is given more than once; an episode is a function of its seed")
    if negative := [seed for seed in seeds if seed < 0]:
        raise BadInput(f"seed {negative[0]} is negative; use seeds of at least 0")
    if num_envs < 1:
        raise BadInput(f"num_envs is {num_envs}; use at least 1")
    strategy = partial(execution, replan=replan, temporal_ensemble=temporal_ensemble)
    strategy()  # refuses what cannot be, before a worker starts
    run = _Run(
        config=config,
        policy=policy,
        seeds=list(seeds),
        max_steps=config.max_steps or SCENES.resolve(config.scene).max_steps,
        lanes_wanted=min(num_envs, len(seeds)),
        backend=resolve_backend(backend, num_envs),
        strategy=strategy,
        burst=1 if temporal_ensemble is not None else min(replan or BURST, BURST),
        together=together,
        on_step=on_step or (lambda steps: None),
    )
    return run.episodes()


@dataclass(kw_only=True)
class _Run:
    """The lanes, and which seed each is at."""

    config: SimConfig
    policy: Policy
    seeds: list[int]
    max_steps: int
    lanes_wanted: int
    backend: Backend
    strategy: Callable[[], EveryNth | TemporalEnsemble]
    burst: int  # actions per message to a lane, at most
    together: int
    on_step: Callable[[int], None]
    lanes: list[Lane] = field(default_factory=list)
    trials: dict[int, Trial] = field(default_factory=dict)  # by lane; a free lane has none
    deaths: Counter = field(default_factory=Counter)  # by seed

    def episodes(self) -> Iterator[Episode]:
        waiting = deque(enumerate(self.seeds))
        done: dict[int, Episode] = {}
        given = 0
        try:
            while given < len(self.seeds):
                self._begin_what_may(waiting, given)
                if given in done:  # the lanes are at work while the caller has the episode
                    yield done.pop(given)
                    given += 1
                    continue
                heard = self._hear()
                over = [self.trials.pop(lane) for lane, trial in heard.items() if trial.over]
                self._act([lane for lane in heard if lane in self.trials])
                self._begin_what_may(waiting, given)
                for trial in heard.values():
                    trial.keep()  # after all lanes have something to do
                done |= {trial.index: trial.episode(self.config.scene, self.policy.digest) for trial in over}
        finally:
            for lane in self.lanes:
                lane.close()

    def _begin_what_may(self, waiting: deque[tuple[int, int]], given: int) -> None:
        """Give free lanes the next seeds, unless too many episodes wait for an earlier one already."""
        if not self.lanes and waiting:
            self.lanes = open_lanes(self.config, self.lanes_wanted, self.backend, self.burst)
        for lane in range(len(self.lanes)):
            if lane not in self.trials and waiting and waiting[0][0] < given + AHEAD * len(self.lanes):
                self._begin(lane, *waiting.popleft())

    def _begin(self, lane: int, index: int, seed: int) -> None:
        execution = self.strategy()
        self.trials[lane] = Trial(index=index, seed=seed, execution=execution, max_steps=self.max_steps)
        self.policy.reset(lane, seed)
        self.lanes[lane].reset(seed)

    def _hear(self) -> dict[int, Trial]:
        """Wait for replies, and return the lanes that gave one, with what happens there."""
        busy = {self.lanes[lane]: lane for lane in self.trials}
        replied = ready(list(busy), STALL_S)
        if not replied:
            for lane in busy:
                assert isinstance(lane, WorkerLane)  # one in this process is always ready
                lane.kill()  # all of them hang; their deaths are heard next
        heard = {}
        for lane in (busy[lane] for lane in replied):
            try:
                replies = self.lanes[lane].take()
            except WorkerDied as death:
                self._redo(lane, death)
                continue
            if steps := self.trials[lane].hear(replies):
                self.on_step(steps)
            heard[lane] = self.trials[lane]
        return heard

    def _redo(self, lane: int, death: WorkerDied) -> None:
        trial = self.trials[lane]
        self.deaths[trial.seed] += 1
        if self.deaths[trial.seed] >= DEATHS_ALLOWED:
            raise WorkerDied(
                f"{death}, {DEATHS_ALLOWED} times in {self.config.scene} with seed {trial.seed}; a negative code is "
                "the signal: for -9 look at memory, for -11 at the graphics driver"
            )
        self.lanes[lane].close()
        self.lanes[lane] = open_lanes(self.config, 1, "async", self.burst)[0]
        self._begin(lane, trial.index, trial.seed)

    def _act(self, lanes: list[int]) -> None:
        """Send each lane its next actions: first those that have some, so that they move while the policy thinks."""
        asking = [lane for lane in lanes if self.trials[lane].execution.wants_chunk]
        for lane in set(lanes) - set(asking):
            self._send(lane)
        for few in batched(asking, self.together):
            for lane, chunk in zip(few, self._ask([self.trials[lane] for lane in few]), strict=True):
                self.trials[lane].execution.add(chunk)
                self._send(lane)

    def _send(self, lane: int) -> None:
        trial = self.trials[lane]
        actions = np.clip(trial.execution.next(self.burst), -1, 1, dtype=np.float32)
        trial.under_way = actions  # recorded as executed
        self.lanes[lane].step(actions)

    def _ask(self, trials: list[Trial]) -> np.ndarray:
        """Chunks [n, H, A] from the policy. Raises `BadInput` for an answer that is no action."""
        questions = [t.question() for t in trials]
        observation = {name: _stack([q[name] for q in questions]) for name in questions[0]}
        steps = [len(t.actions) for t in trials]
        chunks = self.policy.act(observation, [t.at_reset["task"] for t in trials], [t.seed for t in trials], steps)
        dims = len(self.config.schema().action)
        if chunks.ndim != 3 or chunks.shape[::2] != (len(trials), dims) or not chunks.shape[1]:
            raise BadInput(f"policy {self.policy.digest} answered {chunks.shape}, not (n={len(trials)}, H, A={dims})")
        if not np.isfinite(chunks).all():
            bad = next(t for t, chunk in zip(trials, chunks, strict=True) if not np.isfinite(chunk).all())
            where = f"{self.config.scene}, seed {bad.seed}, step {len(bad.actions)}"
            raise BadInput(
                f"policy {self.policy.digest} gave a NaN or infinite action in {where}; its training diverged"
            )
        return chunks


def _stack(values: list[np.ndarray]) -> np.ndarray:
    """`np.stack`, without a copy when there is only one."""
    return values[0][None] if len(values) == 1 else np.stack(values)
