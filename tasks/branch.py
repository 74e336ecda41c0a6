"""Proposals executed: new rollouts that leave recorded ones at some step, with the rewards they really earned."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from data.refs import Ref
from data.relabel_config import Relabel
from data.sim.registry import SCENES
from data.store import Build
from tasks.progress import progress
from tasks.recipe import jsonable, rebuild
from tasks.relabel import PROPOSALS, the_proposer, who_proposes
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from data.episode import Episode
    from data.sim.config import SimConfig

BRANCHES = "branches.json"  # per episode: its seed, the step at which it leaves the recorded one, which sample it takes


def execute_proposals(
    config: Relabel,
    sims: "Sequence[SimConfig]",
    batches: Sequence[Ref],
    proposals: Sequence[Ref],
    *,
    checkpoint: Ref | None,
    replan: int | None,
    workers: int,
) -> list[Ref]:
    """One proposal of each collected episode, executed: as many LeRobot datasets as `batches`, to be used like them.

    sims: what recorded each batch. proposals: of `relabel_chunks`. replan: how many actions of a chunk the policy
    executes once the proposal is over.
    """
    params, parts, upstream, execution = who_proposes(config, checkpoint)
    return [
        ensure(
            "branch",
            {**params, "sim": jsonable(sim), "replan": replan},
            [batch, proposed, *upstream],
            label=f"batch {i}",
            parts=(SCENES.module(sim.scene), *parts),
            execution={**execution, "workers": workers},
        )
        for i, (sim, batch, proposed) in enumerate(zip(sims, batches, proposals, strict=True))
    ]


def record_branches(build: Build, work: Work) -> None:
    """The body of the `branch` stage."""
    from data.lerobot import open_dataset, write_episodes
    from data.relabel import read_proposals
    from data.sim.branch import draw_branches, execute_branches
    from data.sim.config import SimConfig
    from data.validate import check_dataset
    from models.proposer import ProposerPolicy

    sim, dataset = rebuild(SimConfig, work.params["sim"]), open_dataset(work.inputs.parents[0].dir)
    proposals = read_proposals(work.upstream("relabel")[0].dir / PROPOSALS)
    config, proposer = the_proposer(work, sim.schema())
    branches = draw_branches(dataset, proposals, config.seed)
    with progress(work.label, len(branches), "episodes") as advance:
        episodes = execute_branches(
            sim,
            branches,
            ProposerPolicy(proposer),
            replan=work.params["replan"],
            num_envs=work.execution["workers"],
        )
        write_episodes(_told(episodes, advance), sim.schema(), build.out)
    left = [{"seed": b.seed, "step": len(b.prefix), "sample": b.sample} for b in branches]
    (build.out / BRANCHES).write_text(json.dumps(left, indent=1))
    check_dataset(build.out)


def _told(episodes: "Iterator[Episode]", advance: Callable[..., None]) -> "Iterator[Episode]":
    successes = 0
    for done, episode in enumerate(episodes, 1):
        successes += episode.succeeded
        advance(1, note=f"{successes}/{done} succeeded")
        yield episode
