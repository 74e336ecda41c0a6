"""Recipes side by side: success on the same unseen seeds, how sure the difference to the best is, what each costs."""

from typing import Any

from prefect import flow

from data.errors import BadInput
from data.refs import Ref
from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.compare import compare as paired
from tasks.compare import read_comparison
from tasks.dataset import aggregate_batches
from tasks.evaluate import evaluate_checkpoint, read_score
from tasks.frames import frame_stores
from tasks.nights import begin
from tasks.profile import profile
from tasks.recipe import Recipe
from tasks.train import train_checkpoint


@flow(name="compare", description=__doc__)
def compare(recipes: list[str], overrides: list[str] | None = None) -> dict[str, Any]:
    """Train and evaluate each recipe on what they all share, and return one row for each, the best first.

    Raises `BadInput` when they do not share the rollouts, the chunks, the training budget or the protocol: then the
    rows would differ by more than the policy.
    """
    nights = [load(name, overrides) for name in recipes]
    _refuse_unlike(nights)
    with begin(nights[0]) as current:
        current.night = {"name": "compare " + " ".join(recipes)}
        made = [_evaluated(night) for night in nights]
        best = max((score for _, _, score in made), key=lambda score: _result(score)["success_rate"])
        pairs = [None if score is best else paired(score, best) for _, _, score in made]
        if current.dry:
            return {}
        rows = [
            _row(night, checkpoint, score, pair)
            for night, (_, checkpoint, score), pair in zip(nights, made, pairs, strict=True)
        ]
        dataset = made[0][0]
        summary = {
            "recipes": recipes,
            "dataset": dataset.path,
            "dataset_digest": dataset.digest,
            "steps": nights[0].fit.steps,
            "batch_size": nights[0].fit.batch_size,
            "rows": sorted(rows, key=lambda row: -row["success"]),
            "tasks_run": sum(not o.cached for o in current.outcomes),
            "tasks_cached": sum(o.cached for o in current.outcomes),
        }
        if current.run is not None:
            current.run.log(0, {f"{row['recipe']}.success_rate": row["success"] for row in rows})
            current.run.finish()
            summary["run"] = current.run.page
        return summary


def _evaluated(night: Recipe) -> tuple[Ref, Ref, Ref]:
    """Training set, checkpoint and score."""
    batches = collect_batches(night) + adopt_datasets(night)
    frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
    dataset = aggregate_batches(night, batches)
    checkpoint = train_checkpoint(night, dataset, frames, chunks)
    return dataset, checkpoint, evaluate_checkpoint(night, checkpoint, dataset)


def _result(score: Ref) -> dict[str, Any]:
    """The score itself; of one that is only foreseen (--explain), nothing is known."""
    return read_score(score)["score"] if score.digest else {"success_rate": 0.0}


def _row(night: Recipe, checkpoint: Ref, score: Ref, pair: Ref | None) -> dict[str, Any]:
    result = _result(score)
    return {
        "recipe": night.name,
        "policy": night.policy.parts,
        "success": result["success_rate"],
        "interval": result["interval"],
        "episodes": result["episodes"],
        "protocol": result["protocol"],
        "checkpoint": checkpoint.path,
        "checkpoint_digest": checkpoint.digest,
        **({"p_value": read_comparison(pair)["p_value"]} if pair else {}),
        **profile(checkpoint, night.fit).to_json(),
    }


def _refuse_unlike(nights: list[Recipe]) -> None:
    first = nights[0]
    for night in nights[1:]:
        for part in ("sim", "collect", "dataset", "chunks", "evaluate"):
            if getattr(night, part) != getattr(first, part):
                raise BadInput(f"{first.name} and {night.name} differ in {part}, not only in the policy; override it")
        if (night.fit.steps, night.fit.batch_size) != (first.fit.steps, first.fit.batch_size):
            raise BadInput(f"{first.name} and {night.name} differ in budget; override fit.steps and fit.batch_size")
