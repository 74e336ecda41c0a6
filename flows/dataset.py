"""Rollouts, and from them what training reads: frame stores, chunk tables, the training set."""

from typing import Any

from prefect import flow

from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches
from tasks.frames import frame_stores
from tasks.nights import begin
from tasks.summary import summarize


@flow(name="dataset", description=__doc__)
def dataset(recipe: str = "demo", overrides: list[str] | None = None) -> dict[str, Any]:
    night = load(recipe, overrides)
    with begin(night):
        batches = collect_batches(night) + adopt_datasets(night)
        frame_stores(night, batches)
        chunk_tables(night, batches)
        whole = aggregate_batches(night, batches)
        return summarize(night, dataset=whole)
