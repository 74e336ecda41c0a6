"""A policy checkpoint, or the encoder it acts by, and whatever it stands on that is not there yet."""

from typing import Any

from prefect import flow

from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches
from tasks.frames import frame_stores
from tasks.jepa import train_encoder
from tasks.nights import begin
from tasks.summary import summarize
from tasks.train import train_checkpoint


@flow(name="train", description=__doc__)
def train(recipe: str = "demo", overrides: list[str] | None = None) -> dict[str, Any]:
    night = load(recipe, overrides)
    with begin(night):
        batches = collect_batches(night) + adopt_datasets(night)
        frames = frame_stores(night, batches)
        chunks = chunk_tables(night, batches)
        dataset = aggregate_batches(night, batches)
        if night.only_represents:
            return summarize(night, dataset=dataset, encoder=train_encoder(night, dataset, frames, chunks))
        checkpoint = train_checkpoint(night, dataset, frames, chunks)
        return summarize(night, dataset=dataset, checkpoint=checkpoint)
