"""The connection to MLflow: where it is, one client per place, and its errors in three kinds.

By default a SQLite file with the artefacts beside it; `MLFLOW_TRACKING_URI` names a server instead.
"""

import fcntl
import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from data.errors import BadInput
from data.paths import state_dir
from tasks.spool import Rejected, Unreachable

logging.getLogger("urllib3.connectionpool").setLevel(
    logging.ERROR
)  # each retry is a warning there; we tell once per outage

EXPERIMENT = "flywheel"
REJECTING = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}  # for good


def home() -> Path:
    """Where the SQLite file, the artefacts and the spool of this checkout lie."""
    return state_dir() / "mlflow"


def uri() -> str:
    """Absolute: MLflow's own default depends on the current directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Exclusive among the processes of this checkout; the kernel drops it with its holder."""
    home().mkdir(parents=True, exist_ok=True)
    with (home() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def errors_sorted() -> Iterator[None]:
    """MLflow's and SQLAlchemy's exceptions as `Rejected` (never try again) or `Unreachable` (try again)."""
    try:
        yield
    except MlflowException as error:
        raise (Rejected if error.error_code in REJECTING else Unreachable)(_reason(error.message)) from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise Unreachable(_reason(str(error))) from error


@contextmanager
def errors_told() -> Iterator[None]:
    """The same for calls the user waits for: one line, and what to do."""
    try:
        with errors_sorted():
            yield
    except Unreachable as error:
        raise BadInput(f"{error}; mend it (see `flywheel doctor`) and repeat: finished stages are kept") from error
    except Rejected as error:
        raise BadInput(str(error)) from error


def _reason(text: str) -> str:
    first_line = text.strip().partition("\n")[0]
    return f"MLflow at {uri()}: {'no answer' if 'Max retries exceeded' in first_line else first_line[:120]}"


def client() -> MlflowClient:
    return _connect(uri())


def experiment_id() -> str:
    return _experiment(uri())


@contextmanager
def as_global() -> Iterator[None]:
    """MLflow's registry looks a logged model up at the global address, whatever its client was given."""
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri())  # also sets the variable, and None below removes it
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]
        if environment:
            os.environ["MLFLOW_TRACKING_URI"] = environment


def make_schema() -> None:
    """Create the SQLite file's tables now if they are missing (seconds). A server is not asked."""
    if uri().startswith("sqlite"):
        with errors_told():
            client()


@lru_cache
def _connect(where: str) -> MlflowClient:
    if where.startswith("sqlite:///"):
        _ensure_database(Path(where.removeprefix("sqlite:///")))
    return MlflowClient(tracking_uri=where, registry_uri=where)


def _ensure_database(file: Path) -> None:
    """Create the tables complete or not at all.

    MLflow makes them in dozens of migrations: of processes that do so at once most fail, and a kill half-way leaves a
    file that no later start can complete.
    """
    with lock("schema"):
        if file.exists():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in file.parent.glob(f"{file.name}.making-*"):
            left_by_a_kill.unlink()
        making = file.with_name(f"{file.name}.making-{os.getpid()}")
        MlflowClient(tracking_uri=f"sqlite:///{making}", registry_uri=f"sqlite:///{making}")
        making.rename(file)


@lru_cache
def _experiment(where: str) -> str:
    connected = _connect(where)
    with lock("schema"):
        if found := connected.get_experiment_by_name(EXPERIMENT):
            return found.experiment_id
        beside = (home() / "artifacts").as_uri() if where.startswith("sqlite") else None  # a server chooses for itself
        kind = {"mlflow.experimentKind": "custom_model_development"}  # its page opens on runs, not on chat traces
        return connected.create_experiment(EXPERIMENT, artifact_location=beside, tags=kind)
