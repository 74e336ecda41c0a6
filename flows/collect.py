"""Rollouts of a recipe, in committed batches."""

from typing import Any

from prefect import flow

from flows.recipes import load
from tasks.collect import collect_batches
from tasks.nights import begin
from tasks.summary import summarize


@flow(name="collect", description=__doc__)
def collect(recipe: str = "demo", overrides: list[str] | None = None) -> dict[str, Any]:
    night = load(recipe, overrides)
    with begin(night):
        batches = collect_batches(night)
        return summarize(night, batches=batches)
