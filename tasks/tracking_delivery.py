"""What the shipper does with a journal's events: it tells MLflow, so that telling it twice is the same as once.

    the run that a `start` belongs to          and then
    ---------------------------------          --------
    FINISHED, same stage key                   the journal is a repetition: everything after is dropped
    any state, same journal                    our own, its acknowledgement was lost: go on
    KILLED or FAILED, same stage key           go on in that run: steps it already has are skipped (resume is bit-exact)
    none                                       create it

A metric is recognised by (key, step, value, time): times are taken when it is written down, not when it is sent.
"""

import json
from pathlib import Path
from typing import Any

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import register_dataset_source
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_PARENT_RUN_ID

from data.errors import BadInput
from tasks.spool import BATCH, Event, Later, Rejected, State, Unreachable, acknowledged
from tasks.tracking_client import client, errors_sorted, experiment_id, home

ID = "flywheel.id"  # the journal a run came from
KEY = "flywheel.key"  # the stage key a phase stands for
LONGEST_PARAM = 6000  # characters: MLflow's limit


class DvcSource(DatasetSource):
    """A dataset known by DVC's directory hash: `dvc_data` names it, the store holds it."""

    def __init__(self, digest: str, path: str):
        self.digest, self.path = digest, path

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return isinstance(raw_source, DvcSource)

    @classmethod
    def _resolve(cls, raw_source: Any) -> "DvcSource":
        return raw_source

    def load(self) -> Path:
        """The dataset's folder on this machine. BadInput if it is not here."""
        if not Path(self.path).exists():
            raise BadInput(
                f"{self.path}: dataset {self.digest} is not on this machine; `dvc pull` or run its stage again"
            )
        return Path(self.path)

    def to_dict(self) -> dict[str, str]:
        return {"digest": self.digest, "path": self.path}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "DvcSource":
        return cls(**source_dict)


register_dataset_source(DvcSource)  # pyright: ignore[reportArgumentType]  (MLflow's annotation says instance, its code class)


def deliver(state: State, events: list[Event]) -> State:
    """Tell MLflow one event, or several of kind metrics. Raises Unreachable, Rejected or Later."""
    with errors_sorted():
        match events[0]["kind"]:
            case "start":
                return _start(events[0])
            case _ if state["drop"]:
                pass
            case "metrics":
                _metrics(state, events)
            case "tags":
                client().log_batch(state["run_id"], tags=[RunTag(k, v) for k, v in events[0]["tags"].items()])
            case "artifact":
                _artifact(state, events[0])
            case "input":
                _input(state, events[0])
            case "finish":
                client().set_terminated(state["run_id"], events[0]["status"], events[0]["time"])
    return state


def find(tag: str, value: str) -> list[Run]:
    """Runs that carry a tag, newest first."""
    query = f"tags.`{tag}` = '{value}'"
    return list(client().search_runs([experiment_id()], query, order_by=["attributes.start_time DESC"]))


def _start(event: Event) -> State:
    same = find(KEY, event["key"]) if event["key"] else []
    finished = [run for run in same if run.info.status == "FINISHED"]
    if finished:
        return _state(finished[0], drop=True)
    ours = find(ID, event["id"])
    ended = [run for run in same if run.info.status in ("KILLED", "FAILED")]
    run = next(iter([*ours, *ended]), None) or _create(event)
    if run.info.status != "RUNNING":
        client().update_run(run.info.run_id, status="RUNNING")
    _describe(run.info.run_id, event)
    return _state(run)


def _state(run: Run, drop: bool = False) -> State:
    """`seen`: the last step of each metric the run had before this journal."""
    seen = {metric.key: metric.step for metric in run.data._metric_objs}
    return {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id, "drop": drop, "seen": seen}


def _create(event: Event) -> Run:
    try:
        with errors_sorted():
            return client().create_run(experiment_id(), event["time"], {ID: event["id"]}, event["name"])
    except Rejected as error:  # without a run every later event would be lost
        raise Unreachable(str(error)) from error


def _describe(run_id: str, event: Event) -> None:
    tags = {**event["tags"], ID: event["id"]}
    if event["key"]:
        tags[KEY] = event["key"]
    if parent := _parent(event["parent"]):
        tags[MLFLOW_PARENT_RUN_ID] = parent
    client().log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
    params = [Param(k, v[:LONGEST_PARAM]) for k, v in event["params"].items()]
    for start in range(0, len(params), 100):  # MLflow's limit for one call
        client().log_batch(run_id, params=params[start : start + 100])


def _parent(journal: str | None) -> str | None:
    """The run id of another journal's run; Later while that journal has not been delivered so far."""
    if not journal:
        return None
    if runs := find(ID, journal):
        return runs[0].info.run_id
    if acknowledged(home() / "spool", journal) is not None:
        raise Later(journal)
    return None


def _metrics(state: State, events: list[Event]) -> None:
    seen = state["seen"]
    rows = [
        Metric(key, value, event["time"], event["step"])
        for event in events
        for key, value in event["values"].items()
        if key not in seen or event["step"] > seen[key]
    ]
    for start in range(0, len(rows), BATCH):
        client().log_batch(state["run_id"], metrics=rows[start : start + BATCH])


def _artifact(state: State, event: Event) -> None:
    path = Path(event["path"])
    log = client().log_artifacts if path.is_dir() else client().log_artifact
    try:
        log(state["run_id"], str(path), event["folder"] or None)
    except (FileNotFoundError, PermissionError) as error:
        raise Rejected(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise Unreachable(f"{path}: {error}") from error


def _input(state: State, event: Event) -> None:
    source = DvcSource(event["digest"], event["path"])
    dataset = Dataset(event["name"], event["digest"], source._get_source_type(), json.dumps(source.to_dict()))
    tags = [InputTag(MLFLOW_DATASET_CONTEXT, event["context"])]
    client().log_inputs(state["run_id"], [DatasetInput(dataset, tags)])
