"""What a flow says at its end: to the terminal, to Prefect's page, to MLflow's parent run."""

from pathlib import Path
from typing import Any

from data.refs import Ref
from data.store import Store
from tasks.compare import read_comparison
from tasks.critic import CALIBRATION, FILM, read_critic
from tasks.dataset import read_set
from tasks.evaluate import PLOT, VIDEO, read_score
from tasks.jepa import CURVE, read_probes
from tasks.recipe import Recipe
from tasks.stages import current_session
from tasks.train import ADVANTAGES, EFFECTIVE


def summarize(
    recipe: Recipe,
    *,
    batches: list[Ref] | None = None,
    dataset: Ref | None = None,
    encoder: Ref | None = None,
    checkpoint: Ref | None = None,
    score: Ref | None = None,
    version: dict[str, Any] | None = None,
    improvement: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What was made, as plain JSON values; closes the night's MLflow run and leaves Prefect's artefacts."""
    current = current_session()
    if current.dry:
        return {}
    summary: dict[str, Any] = {"recipe": recipe.name}
    if batches:
        summary |= _of_batches(batches)
    if dataset:
        summary |= _of_dataset(dataset)
    if encoder := encoder or _encoder_under(checkpoint):
        summary |= {"encoder": encoder.path, "encoder_digest": encoder.digest, "probes": read_probes(encoder)}
        summary |= {"pictures": [str(encoder.dir / CURVE)]}
    if checkpoint:
        summary |= {"checkpoint": checkpoint.path, "checkpoint_digest": checkpoint.digest}
    if score:
        summary |= _of_score(score)
    summary |= (version or {}) | (improvement or {})
    summary |= {
        "tasks_run": sum(not o.cached for o in current.outcomes),
        "tasks_cached": sum(o.cached for o in current.outcomes),
    }
    _close_run(summary, score)
    if score:
        _show_in_prefect(summary, score)
    return summary


def _encoder_under(checkpoint: Ref | None) -> Ref | None:
    """What a policy acts by, where that was learnt before it."""
    if checkpoint is None:
        return None
    store = Store()
    keys = [parent["key"] for parent in store.manifest(checkpoint)["parents"] if parent["stage"] == "jepa"]
    return store.find("jepa", keys[0])[0] if keys else None


def of_improvement(*, parent: Ref, critic: Ref, improved: Ref, continued: Ref, control: Ref, comparison: Ref) -> dict:
    """What a cycle of improvement adds to a summary: both arms, and how sure the difference is."""
    if current_session().dry:
        return {}
    found = read_comparison(comparison)
    return {
        "gain_points": found["gain_points"],
        "p_value": found["p_value"],
        "comparison": {name: found[name] for name in ("episodes", "both", "only_a", "only_b", "neither")},
        "control": _of_score(control) | {"checkpoint": continued.path, "checkpoint_digest": continued.digest},
        "parent": parent.path,
        "parent_digest": parent.digest,
        "critic": critic.path,
        "critic_digest": critic.digest,
        "critic_numbers": read_critic(critic),
        "pictures": [str(ref.dir / name) for ref, names in _pictures(critic, improved) for name in names],
    }


def _pictures(critic: Ref, improved: Ref) -> list[tuple[Ref, tuple[str, ...]]]:
    return [(critic, (CALIBRATION, FILM)), (improved, (ADVANTAGES, EFFECTIVE))]


def _of_batches(batches: list[Ref]) -> dict[str, Any]:
    from data.lerobot import open_dataset

    rollouts = [open_dataset(ref.dir).rollouts for ref in batches]
    succeeded = [ok for table in rollouts if table is not None for ok in table["success"]]
    return {
        "batches": [ref.path for ref in batches],
        "batch_digests": [ref.digest for ref in batches],
        "collected_episodes": len(succeeded),
        "collected_successes": sum(succeeded),
    }


def _of_dataset(dataset: Ref) -> dict[str, Any]:
    whole = read_set(dataset)
    return {
        "dataset": dataset.path,
        "dataset_digest": dataset.digest,
        "collected_episodes": whole.episodes,
        "collected_steps": whole.steps,
    }


def _of_score(score: Ref) -> dict[str, Any]:
    found = read_score(score)
    result = found["score"]
    return {
        "success": result["success_rate"],
        "action_error": found["action_error"],
        **{name: result[name] for name in ("interval", "episodes", "seeds", "subgoals", "protocol")},
        "score": score.path,
        "score_digest": score.digest,
        "video": str(score.dir / VIDEO),
        "plot": str(score.dir / PLOT),
    }


def _close_run(summary: dict[str, Any], score: Ref | None) -> None:
    run = current_session().run
    if run is None:
        return
    if score:
        run.log(0, {"success_rate": summary["success"], "tasks_run": summary["tasks_run"]})
        for name in (VIDEO, PLOT):
            run.artifact(score.dir / name)
    if "gain_points" in summary:
        run.log(0, {name: summary[name] for name in ("gain_points", "p_value")})
    for picture in summary.get("pictures", []):
        run.artifact(Path(picture))
    if "model_version" in summary:
        run.tag({"flywheel.model_version": summary["model_version"], "flywheel.decision": summary["decision"]})
    run.finish()
    summary["run"] = run.page


def _show_in_prefect(summary: dict[str, Any], score: Ref) -> None:
    from tasks.orchestration import in_flow, show

    if in_flow():
        show(summary, [score.dir / PLOT, *map(Path, summary.get("pictures", []))])
