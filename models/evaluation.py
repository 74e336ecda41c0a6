"""How good a policy is: scored rollouts under one protocol, with intervals, and pictures that people look at.

```
 self_test      the expert, then its recorded actions again -> does this simulator measure what we think?
 evaluate       policy + protocol -> rollouts -> score (JSON) + video grid (mp4)
 action_error   policy + held-out episodes -> |a_pred - a| and its square per action component
 plot           score (+ action error) -> one png
```
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from data.episode import Episode
from data.errors import BadInput
from data.protocol import EvalProtocol
from data.schema import IMAGE, STATE
from data.sim.config import SimConfig
from data.sim.execution import EveryNth, TemporalEnsemble, execution
from data.sim.rollout import OraclePolicy, Policy, rollout
from data.sim.vector import Backend
from models.pictures import MAX_TILES, VIDEO_CAMERA, plot, video_grid
from models.seeds import derive

__all__ = [
    "Comparison",
    "EvaluationError",
    "Score",
    "SelfTest",
    "action_error",
    "evaluate",
    "paired_comparison",
    "plot",
    "score",
    "self_test",
    "video_grid",
    "wilson",
]

EXPERT_RATE = 0.95  # the scripted expert must succeed this often, or the scene is broken and no score means anything
REPLAY_HORIZON = 10  # actions per chunk of the self-test, when the protocol executes whole chunks


class EvaluationError(BadInput):
    """A score that would not mean what it says."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one policy did under one protocol. JSON-able; `seeds`, `succeeded` and `lengths` run in parallel."""

    scene: str
    policy: str  # digest of who acted
    protocol: str  # `EvalProtocol.hash`
    episodes: int
    successes: int
    success_rate: float
    interval: tuple[float, float]  # Wilson's, 95 %
    subgoals: dict[str, float]  # share of the episodes in which it was ever true after an action
    length: dict[str, float]  # steps: mean, p10, p50, p90
    seeds: tuple[int, ...]
    succeeded: tuple[bool, ...]
    lengths: tuple[int, ...]  # steps

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "Score":
        listed = {name: tuple(value[name]) for name in ("interval", "seeds", "succeeded", "lengths")}
        return cls(**{**value, **listed})


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a rate, 95 % by default; it holds at 0 and n successes too (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    center = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and n successes an end of the interval is the rate itself, which rounding must not miss
    low = 0.0 if successes == 0 else (center - half) / scale
    return low, 1.0 if successes == n else (center + half) / scale


def score(episodes: Iterable[Episode], protocol: EvalProtocol) -> Score:
    """Score `episodes`, which must be the protocol's, in its order. Keeps no episode, so they may be a rollout's.

    Raises `EvaluationError` when they are others, or several policies'.
    """
    seeds, succeeded, lengths, digests = [], [], [], set()
    reached: dict[str, int] = {}
    for episode in episodes:
        if episode.scene != protocol.scene:
            raise EvaluationError(f"an episode of {episode.scene} cannot be scored under a {protocol.scene} protocol")
        seeds.append(episode.seed)
        succeeded.append(episode.succeeded)
        lengths.append(len(episode))
        digests.add(episode.policy_digest)
        for name, flags in episode.subgoals.items():
            reached[name] = reached.get(name, 0) + bool(flags.any())
    if tuple(seeds) != protocol.seeds:
        raise EvaluationError(
            f"{len(seeds)} episodes are not those of the protocol's {len(protocol.seeds)} seeds, in order"
        )
    if len(digests) != 1:
        raise EvaluationError(
            f"episodes of {len(digests)} policies ({', '.join(sorted(digests)[:3])}) make no one score"
        )
    n, wins = len(seeds), sum(succeeded)
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90])
    return Score(
        scene=protocol.scene,
        policy=digests.pop(),
        protocol=protocol.hash,
        episodes=n,
        successes=wins,
        success_rate=wins / n,
        interval=wilson(wins, n),
        subgoals={name: count / n for name, count in reached.items()},
        length={"mean": float(np.mean(lengths)), "p10": float(p10), "p50": float(p50), "p90": float(p90)},
        seeds=tuple(seeds),
        succeeded=tuple(succeeded),
        lengths=tuple(lengths),
    )


def evaluate(
    config: SimConfig,
    policy: Policy,
    protocol: EvalProtocol,
    *,
    num_envs: int = 2,
    backend: Backend = "auto",
    video: Path | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Score:
    """Roll `policy` out under `protocol` and score it; `video` is the mp4 to write, of the first 25 episodes.

    Raises `EvaluationError` when `config` is not what the protocol describes.
    """
    execute = {"replan": protocol.replan, "temporal_ensemble": protocol.temporal_ensemble}
    _refuse_other_config(config, protocol)
    shown: list[Episode] = []
    episodes = rollout(config, policy, protocol.seeds, num_envs=num_envs, backend=backend, on_step=on_step, **execute)
    result = score(_remember(episodes, shown if video else None), protocol)
    if video:
        video_grid(shown, video, fps=protocol.control_hz)
    return result


def _remember(episodes: Iterable[Episode], shown: list[Episode] | None) -> Iterator[Episode]:
    """Pass `episodes` on, keeping of the first ones what a video shows: one camera."""
    for episode in episodes:
        if shown is not None and len(shown) < MAX_TILES:
            shown.append(replace(episode, images={VIDEO_CAMERA: episode.images[VIDEO_CAMERA]}))
        yield episode


def _refuse_other_config(config: SimConfig, protocol: EvalProtocol) -> None:
    same = EvalProtocol.of(config, protocol.seeds, replan=protocol.replan, temporal_ensemble=protocol.temporal_ensemble)
    if same != protocol:
        name = next(name for name in protocol.to_json() if getattr(same, name) != getattr(protocol, name))
        raise EvaluationError(
            f"the simulator's {name} is {getattr(same, name)}, but the protocol says {getattr(protocol, name)}"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies on the same seeds: what a gate looks at."""

    episodes: int
    both: int  # succeeded on these
    only_a: int
    only_b: int
    neither: int
    difference: float  # success rate of b minus that of a
    p_value: float  # exact McNemar: how likely the discordant seeds split so unevenly if neither were better

    def to_json(self) -> dict:
        return asdict(self)


def paired_comparison(a: Score, b: Score) -> Comparison:
    """Compare two scores seed by seed (McNemar 1947, exact). Raises `EvaluationError` unless their protocols agree."""
    if a.protocol != b.protocol or a.seeds != b.seeds:
        one, other = a.protocol[:12], b.protocol[:12]
        raise EvaluationError(f"scores under protocols {one} and {other} do not compare; evaluate both under one")
    from scipy.stats import binomtest  # takes a second to import

    pairs = list(zip(a.succeeded, b.succeeded, strict=True))
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    discordant = only_a + only_b
    return Comparison(
        episodes=len(pairs),
        both=pairs.count((True, True)),
        only_a=only_a,
        only_b=only_b,
        neither=pairs.count((False, False)),
        difference=(only_b - only_a) / len(pairs),
        p_value=float(binomtest(only_b, discordant).pvalue) if discordant else 1.0,
    )


@dataclass(frozen=True, kw_only=True)
class ActionError:
    """How far a policy's actions are from the recorded ones, per component, in action units."""

    absolute: Float[np.ndarray, " a"]  # mean |a_pred - a|
    squared: Float[np.ndarray, " a"]  # mean (a_pred - a)²


def action_error(
    policy: Policy,
    episodes: Iterable[Episode],
    *,
    replan: int | None = None,
    temporal_ensemble: float | None = None,
    samples: int = 1,
) -> ActionError:
    """Means over the steps of held-out episodes, and over `samples` answers of a policy that draws them.

    Each recorded action is compared with the one that the policy would have executed at that step had it been asked as
    in a rollout, but from the recorded observations. A policy's own randomness is a function of (seed, step): the first
    sample is what it would have done in this episode, the others what it would have done under other seeds.
    """
    errors = []
    for episode in episodes:
        for k in range(samples):
            seed = derive("sample", episode.seed, k) if k else episode.seed
            strategy = execution(replan=replan, temporal_ensemble=temporal_ensemble)
            errors.append(_predicted(policy, episode, seed, strategy) - episode.action)
    if not errors:
        raise EvaluationError("no held-out episodes to measure the action error on; collect some with other seeds")
    error = np.concatenate(errors)
    return ActionError(absolute=np.abs(error).mean(axis=0), squared=(error**2).mean(axis=0))


def _predicted(
    policy: Policy, episode: Episode, seed: int, strategy: EveryNth | TemporalEnsemble
) -> Float[np.ndarray, "l a"]:
    """What would have been executed at each step of `episode`, were it of `seed`."""
    policy.reset(0, seed)
    actions = []
    for step in range(len(episode)):
        if strategy.wants_chunk:
            seen = {IMAGE + name: frames[step : step + 1] for name, frames in episode.images.items()}
            seen[STATE] = episode.state[step : step + 1].copy()  # a table's memory is read-only
            strategy.add(policy.act(seen, [episode.task], [seed], [step])[0])
        actions.append(strategy.next()[0].astype(np.float64))
    return np.stack(actions)


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """The expert's own score, and the promise that its recorded actions reproduce it."""

    episodes: int
    successes: int
    success_rate: float

    def to_json(self) -> dict:
        return asdict(self)


def self_test(
    config: SimConfig,
    protocol: EvalProtocol,
    seeds: Sequence[int],
    *,
    expert_rate: float = EXPERT_RATE,
    num_envs: int = 2,
    backend: Backend = "auto",
    on_step: Callable[[int], None] | None = None,
) -> SelfTest:
    """Before any score counts: the expert succeeds, and its recorded actions do the same again, to the last bit.

    The second pass goes the way a policy's evaluation goes: no expert in the loop, the protocol's chunks. A difference
    means that pictures, state or outcome depend on something besides (configuration, actions, seed).
    Raises `EvaluationError` with the numbers.
    """
    _refuse_other_config(config, protocol)
    run = {"num_envs": num_envs, "backend": backend, "on_step": on_step}
    first: dict[int, _Recording] = {}
    for episode in rollout(replace(config, expert=True), OraclePolicy(), seeds, **run):
        first[episode.seed] = _Recording.of(episode)
    wins = sum(recording.succeeded for recording in first.values())
    if not first or wins / len(first) < expert_rate:
        raise EvaluationError(
            f"the expert succeeds in {wins} of {len(first)} episodes of {config.scene}, fewer than "
            f"{expert_rate:.0%}: no score counts; mend the scene or its expert"
        )
    replay = _Replay({seed: recording.action for seed, recording in first.items()}, protocol.replan or REPLAY_HORIZON)
    execute = {"replan": protocol.replan, "temporal_ensemble": protocol.temporal_ensemble}
    for episode in rollout(replace(config, expert=False), replay, seeds, **run, **execute):
        if differing := first[episode.seed].differing(_Recording.of(episode)):
            raise EvaluationError(
                f"the expert's recorded actions do not reproduce its episode in {config.scene}: {differing} differs "
                f"with seed {episode.seed}; no score counts until the simulator is deterministic again"
            )
    return SelfTest(episodes=len(first), successes=wins, success_rate=wins / len(first))


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """What is kept of an episode to compare it with another: not its pictures, their digests."""

    succeeded: bool
    action: Float[np.ndarray, "l a"]
    digests: dict[str, str]

    @classmethod
    def of(cls, episode: Episode) -> "_Recording":
        arrays = {"success": episode.success, STATE: episode.state}
        arrays |= {IMAGE + name: frames for name, frames in episode.images.items()}
        digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
        return cls(succeeded=episode.succeeded, action=episode.action, digests=digests)

    def differing(self, other: "_Recording") -> str:
        """Names of what differs, "" if nothing does."""
        return ", ".join(name for name, digest in self.digests.items() if other.digests[name] != digest)


class _Replay:
    """Recorded actions as a policy with chunks of `horizon`; past the end of a recording the last one is repeated."""

    digest = "replay"

    def __init__(self, actions: dict[int, np.ndarray], horizon: int) -> None:
        self.actions = actions
        self.horizon = horizon

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(self, observation: dict, tasks: list[str], seeds: list[int], steps: list[int]) -> np.ndarray:
        def chunk(seed: int, step: int) -> np.ndarray:
            known = self.actions[seed]
            return known[np.minimum(np.arange(step, step + self.horizon), len(known) - 1)]

        return np.stack([chunk(seed, step) for seed, step in zip(seeds, steps, strict=True)])
