"""DVC's side: `dvc.yaml` written from the stage table, and `flywheel stage`, which its commands run.

DVC decides what may be stale and keeps versions in git's history; the work itself is found or made in the store, as
for every other front, and copied to where DVC expects it.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from data.errors import BadInput
from data.paths import root, store_dir
from data.refs import Ref
from data.registry import did_you_mean
from data.store import MANIFEST
from tasks.stages import STAGES

PARAMS = "params.yaml"


def dvc_yaml() -> str:
    """The text of dvc.yaml: one DVC stage per row of the stage table."""
    stages: dict[str, Any] = {}
    for name, row in STAGES.items():
        upstream = [f"store/dvc/{u}" for u in row.upstream if not _leads_back(name, u)]
        stages[name] = {
            "desc": row.about,
            "cmd": f"flywheel stage {name} ${{recipe}}",
            "deps": ["data", "models", "tasks", "flows/recipes", *upstream],
            "params": ["recipe", "overrides"],
            "outs": [f"store/dvc/{name}"],
        }
    head = "# Written by `python -m flows.dvc_front` from the stage table in tasks/stages.py.\n"
    return head + yaml.safe_dump({"stages": stages}, sort_keys=False, width=120)


def _leads_back(stage: str, upstream: str) -> bool:
    """Whether this edge closes a circle: a checkpoint collects rollouts, which train the next one."""
    names = list(STAGES)
    return names.index(upstream) >= names.index(stage)


def run_stage(name: str, recipe: str) -> None:
    """Do one stage of `recipe`, with the overrides in params.yaml, and lay its artefacts under store/dvc/NAME."""
    if name not in STAGES:
        raise BadInput(f"unknown stage {name!r}{did_you_mean(name, STAGES)}")
    refs = _refs(name, recipe, _overrides())
    out = store_dir() / "dvc" / name
    part = out.with_name(f".{name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for ref in refs:
        _lay(ref, part / ref.key[:16])
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def _refs(name: str, recipe: str, overrides: list[str]) -> list[Ref]:
    """The stage's artefacts. What lies upstream is intact already, or is made first."""
    from flows.recipes import load
    from tasks.adopt import adopt_datasets
    from tasks.chunks import chunk_tables
    from tasks.collect import collect_batches
    from tasks.dataset import aggregate_batches
    from tasks.evaluate import evaluate_checkpoint
    from tasks.frames import frame_stores
    from tasks.language import language_of
    from tasks.nights import begin
    from tasks.recipe import jsonable
    from tasks.train import train_checkpoint

    night = load(recipe, overrides)
    with begin(night) as current:
        if night.improve:
            import_module("flows.improve").improve(night)
            made = {outcome.ref.key: outcome.ref for outcome in current.outcomes if outcome.stage == name}
            return list(made.values())
        rollouts, adopted = collect_batches(night), adopt_datasets(night)
        if name in ("collect", "adopt"):
            return rollouts if name == "collect" else adopted
        if name in ("branch", "relabel", "critic", "compare"):
            return []  # of a recipe with `improve`
        batches = rollouts + adopted
        if name == "dataset":
            return [aggregate_batches(night, batches)]
        if name == "language":
            return language_of(jsonable(night.policy), aggregate_batches(night, batches))
        if name == "frames":
            return frame_stores(night, batches)
        if name == "chunks":
            return chunk_tables(night, batches)
        dataset, frames, chunks = (
            aggregate_batches(night, batches),
            frame_stores(night, batches),
            chunk_tables(night, batches),
        )
        checkpoint = train_checkpoint(night, dataset, frames, chunks)
        if name in ("jepa", "encode"):  # of a recipe with `represent`; made on the way to its checkpoint
            return [outcome.ref for outcome in current.outcomes if outcome.stage == name]
        return [checkpoint] if name == "train" else [evaluate_checkpoint(night, checkpoint, dataset)]


def _lay(ref: Ref, where: Path) -> None:
    """A copy of the artefact's files: DVC links and moves what it tracks, and the store's own must stay untouched."""
    shutil.copytree(ref.dir, where, ignore=shutil.ignore_patterns(MANIFEST))


def _overrides() -> list[str]:
    try:
        params = yaml.safe_load((root() / PARAMS).read_text()) or {}
    except (OSError, yaml.YAMLError) as fault:
        raise BadInput(
            f"{root() / PARAMS}: cannot be read ({type(fault).__name__}); it holds recipe and overrides"
        ) from None
    overrides = params.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise BadInput(f"{root() / PARAMS}: overrides must be a table such as 'fit.lr: 1e-4', not {overrides!r}")
    return [f"{name}={value}" for name, value in overrides.items()]


if __name__ == "__main__":
    (root() / "dvc.yaml").write_text(dvc_yaml())
