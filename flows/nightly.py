"""The night: rollouts in, a registered policy out."""

from typing import Any

from prefect import flow

from flows.improve import improve
from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches
from tasks.evaluate import evaluate_checkpoint
from tasks.frames import frame_stores
from tasks.nights import begin, complete, next_night
from tasks.promote import promote_checkpoint
from tasks.summary import summarize
from tasks.train import train_checkpoint


@flow(name="nightly", description=__doc__)
def nightly(recipe: str = "demo", overrides: list[str] | None = None, another_night: bool = False) -> dict[str, Any]:
    """Collect, build, train, evaluate, register; what is intact is not done again.

    another_night: collect one night more than were completed, as the schedule does.
    """
    night = load(recipe, overrides)
    night = next_night(night) if another_night else night
    with begin(night):
        if night.improve:
            return improve(night)
        batches = collect_batches(night) + adopt_datasets(night)
        frames = frame_stores(night, batches)
        chunks = chunk_tables(night, batches)
        dataset = aggregate_batches(night, batches)
        checkpoint = train_checkpoint(night, dataset, frames, chunks)
        score = evaluate_checkpoint(night, checkpoint, dataset)
        version = promote_checkpoint(night, checkpoint, dataset, score)
        complete(night)
        return summarize(night, dataset=dataset, checkpoint=checkpoint, score=score, version=version)
