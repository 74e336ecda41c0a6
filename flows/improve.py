"""One cycle of improvement: a policy's own rollouts in, a better policy out, and how sure we are that it is better.

```
 demonstrations -> cloned -> its own rollouts --+--> proposals -> critic -> offline RL --+--> 200 paired unseen seeds
              \\___________________________________+-----------------> cloning, continued --+
```
"""

from dataclasses import dataclass
from typing import Any

from data.refs import Ref
from tasks.actors import starting_point
from tasks.adopt import adopt_datasets
from tasks.branch import execute_proposals
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches, collect_own
from tasks.compare import compare
from tasks.critic import train_critic
from tasks.dataset import aggregate_batches
from tasks.evaluate import evaluate_checkpoint
from tasks.frames import frame_stores
from tasks.nights import complete, nights_until
from tasks.promote import promote_checkpoint
from tasks.recipe import Recipe
from tasks.relabel import relabel_chunks
from tasks.summary import of_improvement, summarize
from tasks.train import continue_cloning, improve_checkpoint, train_checkpoint


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """What one cycle made."""

    dataset: Ref
    parent: Ref  # the policy it began with
    critic: Ref
    improved: Ref
    continued: Ref  # what it must beat
    score: Ref
    control: Ref
    comparison: Ref

    def summary(self, night: Recipe, version: dict[str, Any] | None = None) -> dict[str, Any]:
        refs = {name: getattr(self, name) for name in ("parent", "critic", "improved", "continued", "control")}
        found = of_improvement(**refs, comparison=self.comparison)
        return summarize(
            night,
            dataset=self.dataset,
            checkpoint=self.improved,
            score=self.score,
            version=version,
            improvement=found,
        )


def improve(night: Recipe) -> dict[str, Any]:
    """The whole cycle of a recipe that has an `improve`, and the improved policy registered."""
    made = cycle(night)
    version = promote_checkpoint(night, made.improved, made.dataset, made.score)
    complete(night)
    return made.summary(night, version)


def cycle(night: Recipe) -> Cycle:
    """Up to the comparison; registers nothing."""
    assert night.improve is not None
    demonstrations = collect_batches(night) + adopt_datasets(night)
    parent, rollouts = _own_rollouts(night)
    batches = demonstrations + rollouts
    frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
    proposals = relabel_chunks(night.improve.relabel, batches, frames, chunks, checkpoint=parent)
    dataset = aggregate_batches(night, batches, failures=True)
    critic = train_critic(night, dataset, frames, chunks, proposals)
    improved = improve_checkpoint(night, parent, dataset, frames, chunks, critic, proposals)
    continued = continue_cloning(night, parent, dataset, frames, chunks)
    score = evaluate_checkpoint(night, improved, dataset, critic)
    control = evaluate_checkpoint(night, continued, dataset)
    return Cycle(
        dataset=dataset,
        parent=parent,
        critic=critic,
        improved=improved,
        continued=continued,
        score=score,
        control=control,
        comparison=compare(control, score),
    )


def _own_rollouts(night: Recipe) -> tuple[Ref, list[Ref]]:
    """Tonight's policy to improve, and what it and those of earlier nights did on their own."""
    rollouts: list[Ref] = []
    for earlier in nights_until(night):
        parent = _parent(earlier)
        own = collect_own(earlier, parent)
        rollouts += own + _executed(earlier, parent, own)
    return parent, rollouts


def _parent(night: Recipe) -> Ref:
    """The policy to improve: the one that `improve.start` names, or a clone of the demonstrations."""
    if (started := starting_point(night)) is not None:
        return started
    demonstrations = collect_batches(night) + adopt_datasets(night)
    frames, chunks = frame_stores(night, demonstrations), chunk_tables(night, demonstrations)
    return train_checkpoint(night, aggregate_batches(night, demonstrations), frames, chunks)


def _executed(night: Recipe, parent: Ref, rollouts: list[Ref]) -> list[Ref]:
    """Proposals that the simulator has tried, if the recipe asks for them: more rollouts, with rewards of their own."""
    assert night.improve is not None
    if not night.improve.relabel.execute:
        return []
    frames, chunks = frame_stores(night, rollouts), chunk_tables(night, rollouts)
    proposals = relabel_chunks(night.improve.relabel, rollouts, frames, chunks, checkpoint=parent)
    return execute_proposals(
        night.improve.relabel,
        [night.sim] * len(rollouts),
        rollouts,
        proposals,
        checkpoint=parent,
        replan=night.evaluate.replan,
        workers=night.workers,
    )
