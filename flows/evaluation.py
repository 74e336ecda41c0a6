"""Success on unseen seeds; like a night, but nothing is registered."""

from typing import Any

from prefect import flow

from flows.improve import cycle
from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches
from tasks.evaluate import evaluate_checkpoint
from tasks.frames import frame_stores
from tasks.nights import begin
from tasks.summary import summarize
from tasks.train import train_checkpoint


@flow(name="evaluate", description=__doc__)
def evaluate(recipe: str = "demo", overrides: list[str] | None = None) -> dict[str, Any]:
    night = load(recipe, overrides)
    with begin(night):
        if night.improve:
            return cycle(night).summary(night)
        batches = collect_batches(night) + adopt_datasets(night)
        frames = frame_stores(night, batches)
        chunks = chunk_tables(night, batches)
        dataset = aggregate_batches(night, batches)
        checkpoint = train_checkpoint(night, dataset, frames, chunks)
        score = evaluate_checkpoint(night, checkpoint, dataset)
        return summarize(night, dataset=dataset, checkpoint=checkpoint, score=score)
