"""The registry: a scored checkpoint becomes a model version, and champion if it is the first or better."""

import subprocess
from pathlib import Path
from typing import Any

from data.refs import Ref
from data.store import Store
from tasks.evaluate import read_score
from tasks.recipe import Recipe
from tasks.stages import current_session
from tasks.versioning import dvc_digest


def promote_checkpoint(recipe: Recipe, checkpoint: Ref, dataset: Ref, score: Ref) -> dict[str, Any]:
    """Register the checkpoint under its score, once. Returns version, aliases and the reason of the decision."""
    if current_session().dry:
        return {}
    from tasks.tracking import find_run
    from tasks.tracking_registry import ModelVersion, register

    result = read_score(score)["score"]

    def is_better(champion: ModelVersion) -> bool:
        """On the same seeds, more successes."""
        return result["success_rate"] > _score_of(champion)["success_rate"]

    version = register(
        checkpoint.dir,
        name=recipe.model,
        key=score.key,
        tags={
            "checkpoint": checkpoint.key,
            "checkpoint_digest": checkpoint.digest,
            "dataset": dvc_digest(dataset.dir),
            "dataset_digest": dataset.digest,
            "rollouts": ",".join(sorted({p["digest"][:16] for p in Store().manifest(dataset)["parents"]}))[:4900],
            "code": commit(),
            "protocol": result["protocol"],
            "score": score.key,
            "success_rate": result["success_rate"],
            "parent": _parent(dataset),
        },
        is_better=is_better,
        run_id=find_run(checkpoint.key),
    )
    return {
        "model": version.name,
        "model_version": version.version,
        "aliases": list(version.aliases),
        "decision": version.decision,
    }


def _score_of(version: Any) -> dict[str, Any]:
    return {"success_rate": float(version.tags["success_rate"])}


def _parent(dataset: Ref) -> str:
    """The checkpoints that collected the data, if any did."""
    store = Store()
    batches = [store.find(p["stage"], p["key"])[0] for p in store.manifest(dataset)["parents"]]
    parents = {q["digest"][:16] for ref in batches if ref for q in store.manifest(ref)["parents"]}
    return ",".join(sorted(parents)) or "none"


def commit() -> str:
    """The checkout's commit, and whether it was altered."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return described.stdout.strip() or "unversioned"
