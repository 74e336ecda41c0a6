"""Prefect's side of a stage: a task run per unit of work, cached under the store's own key."""

import base64
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import CachePolicy
from prefect.context import FlowRunContext, TaskRunContext
from prefect.states import Completed

from data.refs import Ref
from data.store import Inputs, Store
from tasks.stages import STAGES, Outcome, Session, perform


def in_flow() -> bool:
    """Whether this is the body of a Prefect flow run."""
    return FlowRunContext.get() is not None


class StoreKey(CachePolicy):
    """The store's key is Prefect's key, so the two cannot disagree about what is stale."""

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        return inputs["key"]


def run_as_task(inputs: Inputs, label: str, current: Session) -> Outcome:
    """Run one unit inside the current flow run.

    Prefect's record is believed only when the store holds the artefact intact: a record whose files are gone or
    damaged is refreshed.
    """
    outcomes: list[Outcome] = []

    def unit(key: str, label: str, params: dict[str, Any], upstream: list[dict[str, str]]) -> Any:
        outcome = perform(inputs, label, current)
        outcomes.append(outcome)
        ref = outcome.ref.to_json()
        return Completed(name="Cached", data=ref) if outcome.cached else ref

    intact, _ = Store().find(inputs.stage, inputs.key)
    prefect_task = task(
        name=inputs.stage,
        task_run_name=f"{inputs.stage} {label}".strip(),
        description=STAGES[inputs.stage].about,
        cache_policy=StoreKey(),
        persist_result=True,
        result_serializer="json",
        refresh_cache=intact is None or inputs.stage in current.force,
    )(unit)
    value = prefect_task(inputs.key, label, inputs.params, [p.to_json() for p in inputs.parents])
    if outcomes:
        return outcomes[0]
    ref = Ref.from_json(value)
    return Outcome(stage=inputs.stage, label=label, ref=intact or ref, cached=True, why="intact", seconds=0.0)


def show(summary: dict[str, Any], pictures: list[Path]) -> None:
    """The flow run's artefacts: a summary with its pictures, a table of the numbers, links to what was made."""
    name = summary["recipe"]
    prefix = name.lower().replace("_", "-")  # what Prefect takes for a key
    low, high = summary["interval"]
    images = {path.stem: _inline(path) for path in pictures}
    for stem, image in images.items():
        key = f"{prefix}-{stem}".replace("_", "-")
        create_image_artifact(image_url=image, key=key, description=stem.replace("_", " "))
    create_table_artifact(
        [{"what": k, "value": str(v)} for k, v in sorted(summary.items()) if k != "seeds"], key=f"{prefix}-numbers"
    )
    create_markdown_artifact(
        f"# {name}: {summary['success']:.0%} on {summary['episodes']} unseen seeds\n\n"
        f"95 % interval {low:.0%} to {high:.0%}. {_gain(summary)}{summary.get('decision', '')}\n\n"
        + "".join(f"![{stem}]({image})\n" for stem, image in images.items())
        + "".join(f"* {what}: `{summary[what]}`\n" for what in ("dataset", "checkpoint", "score", "video")),
        key=f"{prefix}-summary",
        description="what the night brought",
    )


def _gain(summary: dict[str, Any]) -> str:
    if "gain_points" not in summary:
        return ""
    return f"{summary['gain_points']:+.1f} points over cloning continued, p = {summary['p_value']:.2g}. "


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
