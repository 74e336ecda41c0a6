"""Runs, as the rest of the program sees them: say what happens, never wait for MLflow, never fail because of it.

    night = start_night("demo", params)                       the parent run
    with start_phase(night, "train", key=key, params=...) as run:
        run.input_dataset("pick_cube", digest, path)
        run.log(step, {"loss": 0.1})                          microseconds: a line in a journal (`tasks.spool`)
    night.finish()

A phase stands for a stage key. Whoever runs the same stage again reports into the same run: a finished one is left as
it is, a killed one goes on. A run whose process died without `finish` is marked KILLED by the next one that starts.
This package's `tracking*` files are the only ones that know mlflow; it is imported when the first run starts.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from data.errors import BadInput
from data.paths import state_dir
from tasks.spool import Event, Journal, Shipper, now_ms

if TYPE_CHECKING:
    from tasks.tracking_system import SystemSampler


class RunHandle:
    """One MLflow run, written down in a journal. Methods are quick and thread-safe; none raises for an outage."""

    def __init__(self, id: str, journal: Journal, shipper: Shipper):
        self.id = id  # give this to another process as `parent`
        self._journal = journal
        self._shipper = shipper
        self._sampler: SystemSampler | None = None
        self._finished = threading.Lock()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics at one step (of training, or an episode's number)."""
        if metrics:
            self._add("metrics", step=int(step), values={name: float(value) for name, value in metrics.items()})

    def tag(self, tags: Mapping[str, object]) -> None:
        self._add("tags", tags={name: str(value) for name, value in tags.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder to copy into the run; it must stay where it is until the run is delivered."""
        self._add("artifact", path=str(Path(path).absolute()), folder=folder)

    def input_dataset(self, name: str, digest: str, path: Path, context: str = "training") -> None:
        """A dataset the run has used; `digest` as `tasks.versioning.dvc_digest` gives it (at most 36 characters)."""
        if len(digest) > 36:
            raise BadInput(f"dataset {name}: digest {digest} is longer than 36 characters; give dvc_digest(path)")
        self._add("input", name=name, digest=digest, path=str(Path(path).absolute()), context=context)

    def finish(self, status: str = "FINISHED", timeout: float = 20.0) -> bool:
        """End the run: FINISHED, FAILED or KILLED. True when MLflow has all of it; the rest is delivered later.

        Waits `timeout` seconds at most, and hardly at all when MLflow is known to be away.
        """
        if self._finished.acquire(blocking=False):
            if self._sampler:
                self._sampler.stop()
            self._add("finish", status=status)
        return self._shipper.flush(timeout)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until it has been delivered for the first time."""
        return self._journal.state.get("run_id")

    @property
    def page(self) -> str | None:
        """What to append to the address of an MLflow page to see this run; None as `run_id`."""
        state = self._journal.state
        return f"/#/experiments/{state['experiment_id']}/runs/{state['run_id']}" if state else None

    def wait(self, timeout: float = 20.0) -> str | None:
        """`run_id`, after waiting for it at most `timeout` seconds (not at all while MLflow is away)."""
        self._shipper.flush(timeout)
        return self.run_id

    def sample_system(self) -> None:
        """Record the machine's processor, memory, disk, network and GPU until `finish`."""
        from tasks.tracking_system import SystemSampler

        self._sampler = SystemSampler(self.log)
        self._sampler.start()

    def _add(self, kind: str, **fields: Any) -> None:
        self._journal.append({"kind": kind, "time": now_ms(), **fields})

    def __enter__(self) -> "RunHandle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.finish("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")


def start_night(recipe: str, params: Mapping[str, Any], tags: Mapping[str, object] | None = None) -> RunHandle:
    """The parent run of one night."""
    name = f"{recipe} {time.strftime('%Y-%m-%d %H:%M')}"
    return _start(name, None, "", params, {"flywheel.recipe": recipe, **(tags or {})})


def start_phase(
    parent: RunHandle | str | None,
    name: str,
    *,
    key: str,
    params: Mapping[str, Any],
    tags: Mapping[str, object] | None = None,
    system_metrics: bool = False,
) -> RunHandle:
    """A child run that stands for the stage key `key`. `parent`: a night's handle, or its `id` in another process."""
    parent_id = parent.id if isinstance(parent, RunHandle) else parent
    run = _start(name, parent_id, key, params, {"flywheel.stage": name, **(tags or {})})
    if system_metrics:
        run.sample_system()
    return run


def find_run(key: str) -> str | None:
    """The id of the finished run of a stage key. BadInput if MLflow cannot be asked."""
    from tasks.tracking_client import errors_told
    from tasks.tracking_delivery import KEY, find

    with errors_told():
        return next((run.info.run_id for run in find(KEY, key) if run.info.status == "FINISHED"), None)


def replay_spools(timeout: float = 60.0) -> str | None:
    """Deliver what dead processes left behind, and end their runs as KILLED. Why that was not possible, or None.

    Starting a run does the same in the background.
    """
    shipper = _shipper()
    if not shipper.whole_pass(timeout):
        return f"{_spool()} was not delivered within {timeout:.0f} s"
    return shipper.outage


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as MLflow wants them: dotted names, text values."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def _start(name: str, parent: str | None, key: str, params: Mapping[str, Any], tags: Mapping[str, object]) -> RunHandle:
    start: Event = {
        "kind": "start",
        "time": now_ms(),
        "id": uuid.uuid4().hex,
        "name": name,
        "key": key,
        "parent": parent,
        "params": flatten(params),
        "tags": {
            "mlflow.user": os.environ.get("USER") or f"uid {os.getuid()}",
            **{tag: str(value) for tag, value in tags.items()},
        },
    }
    shipper = _shipper()
    try:
        journal = Journal(_spool(), start)
    except OSError as error:
        raise BadInput(
            f"{_spool()}: metrics cannot be written down: {error.strerror}; free space or fix rights"
        ) from error
    shipper.add(journal)
    return RunHandle(start["id"], journal, shipper)


def _spool() -> Path:
    return state_dir() / "mlflow" / "spool"


def _shipper() -> Shipper:
    return _shipper_of(_spool())


@lru_cache
def _shipper_of(folder: Path) -> Shipper:
    """One thread per process. What is slow about MLflow happens here, before training, and not beside it."""
    from tasks.tracking_client import make_schema
    from tasks.tracking_delivery import deliver

    make_schema()
    shipper = Shipper(folder, deliver)
    shipper.start()
    return shipper
