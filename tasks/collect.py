"""Collection: who acts, in which scenes, from which seeds; one artefact per batch of episodes.

```
night 1: seeds 0 .. 199      night 2: seeds 200 .. 399      a later night adds batches and touches none
         [0..19][20..39] ...          [200..219] ...        a kill costs at most the batch in the making
```
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.refs import Ref
from data.sim.registry import SCENES
from data.store import Build
from tasks.actors import as_checkpoint, code_of, who_acts
from tasks.progress import progress
from tasks.recipe import Recipe, jsonable, rebuild
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from data.episode import Episode
    from data.sim.config import SimConfig
    from data.sim.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Episodes that are committed together."""

    scene: str
    night: int  # counted from 1
    seeds: range
    turn: int = 0  # number within its night and scene

    @property
    def label(self) -> str:
        return f"{self.scene} seeds {self.seeds.start}-{self.seeds.stop - 1}"


def batches_of(recipe: Recipe) -> Iterator[Batch]:
    """Every batch of every night, oldest first."""
    plan = recipe.collect
    for night in range(1, plan.nights + 1):
        first = plan.first_seed + (night - 1) * plan.episodes
        for scene in recipe.scenes:
            for turn, start in enumerate(range(first, first + plan.episodes, plan.batch)):
                seeds = range(start, min(start + plan.batch, first + plan.episodes))
                yield Batch(scene=scene, night=night, seeds=seeds, turn=turn)


def collect_batches(recipe: Recipe) -> list[Ref]:
    """The recipe's rollouts, one LeRobot v3 dataset per batch."""
    return [_collect(recipe, batch) for batch in batches_of(recipe)]


def collect_own(recipe: Recipe, checkpoint: Ref) -> list[Ref]:
    """Tonight's rollouts of `checkpoint` itself, from which `improve` learns: its successes and its failures."""
    plan, night = recipe.improve, recipe.collect.nights
    assert plan is not None
    first = plan.first_seed + (night - 1) * plan.episodes
    last = first + plan.episodes
    acts = [checkpoint], as_checkpoint(recipe)
    return [
        _record(recipe, Batch(scene=scene, night=night, seeds=range(start, min(start + plan.batch, last))), *acts)
        for scene in recipe.scenes
        for start in range(first, last, plan.batch)
    ]


def _collect(recipe: Recipe, batch: Batch) -> Ref:
    return _record(recipe, batch, *who_acts(recipe, batch.night, batch.turn))


def _record(recipe: Recipe, batch: Batch, upstream: list[Ref], policy: dict[str, Any]) -> Ref:
    return ensure(
        "collect",
        {
            "sim": jsonable(replace(recipe.sim, scene=batch.scene)),
            "seeds": [batch.seeds.start, batch.seeds.stop],
            "policy": policy,
        },
        upstream,
        label=batch.label,
        parts=(SCENES.module(batch.scene), *code_of(upstream)),
        execution={"workers": recipe.workers},
    )


def record_batch(build: Build, work: Work) -> None:
    """The body of the `collect` stage: act, and write what happened."""
    from data.lerobot import write_episodes
    from data.sim.config import SimConfig
    from data.sim.rollout import rollout
    from data.validate import check_dataset

    config = rebuild(SimConfig, work.params["sim"])
    policy, config, replan = _policy(work, config)
    seeds = range(*work.params["seeds"])
    with progress(work.label, len(seeds), "episodes") as advance:
        episodes = rollout(config, policy, seeds, num_envs=work.execution["workers"], replan=replan)
        write_episodes(_counted(episodes, advance), config.schema(), build.out)
    check_dataset(build.out)


def _policy(work: Work, config: "SimConfig") -> "tuple[Policy, SimConfig, int | None]":
    from data.sim.policies import OraclePolicy, RandomPolicy

    who = work.params["policy"]
    if who["kind"] == "oracle":
        return OraclePolicy(who["noise"]), replace(config, expert=True), None
    if who["kind"] == "random":
        return RandomPolicy(), config, None
    # by name: rollouts of an oracle do not stand on the code of models
    acting = import_module("models.acting").acting_policy
    checkpoint = work.upstream("train")[0]
    return acting(checkpoint.dir, checkpoint.digest, config.schema()), config, who["replan"]


def _counted(episodes: "Iterator[Episode]", advance: Any) -> "Iterator[Episode]":
    successes = done = 0
    for episode in episodes:
        done, successes = done + 1, successes + episode.succeeded
        advance(1, note=f"{successes}/{done} succeeded")
        yield episode
