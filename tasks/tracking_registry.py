"""Model versions: a checkpoint folder becomes a version, the best is `champion`, and each knows where it came from.

    alias         points to
    challenger    the newest version
    champion      the first one, or one that was better on the same seeds
    previous      the champion before

A version carries the stage key it was made for, so that registering twice is registering once, also after a kill in
between: every step below finds what the last attempt left. MLflow's aliases have no compare-and-set, hence the lock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from data.errors import BadInput
from tasks.tracking_client import as_global, client, errors_told, experiment_id, lock, uri
from tasks.tracking_delivery import KEY

DECISION = "flywheel.decision"  # why the version is, or is not, champion; set last


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a registered model."""

    name: str  # the registered model
    version: int
    aliases: tuple[str, ...]  # of challenger, champion, previous
    tags: dict[str, str]  # dataset, code, protocol, parent, score, ...: as registered
    run_id: str | None  # MLflow run that trained it
    source: str  # models:/m-...

    @property
    def decision(self) -> str:
        return self.tags.get(DECISION, "")

    @property
    def model_id(self) -> str:
        return self.source.removeprefix("models:/")


def register(
    checkpoint: Path,
    *,
    name: str,
    key: str,
    tags: Mapping[str, object],
    is_better: Callable[[ModelVersion], bool],
    run_id: str | None = None,
) -> ModelVersion:
    """Make `checkpoint` (a folder of safetensors and JSON; it is copied) a version of `name`, once per stage key.

    `tags` name at least `protocol`; scores of different protocols do not compare, and such a version stays challenger.
    `is_better(champion)` is asked under the lock, and only when there is a champion of the same protocol.
    BadInput if MLflow cannot be reached: the same call later goes on where this one ended.
    """
    if "protocol" not in tags:
        raise BadInput(f"{name}: tags {sorted(tags)} lack 'protocol', the hash of the EvalProtocol behind the score")
    with lock("registry"), errors_told():
        version = _find(name, key) or _create(checkpoint, name, key, tags, run_id)
        if not version.decision:
            _decide(version, is_better)
        return get(name, version.version)


def champion(name: str) -> ModelVersion | None:
    """The champion of `name`; None when there is none."""
    with errors_told():
        return _aliased(name, "champion")


def get(name: str, version: int | str) -> ModelVersion:
    """A version by its number or by an alias. BadInput if there is none."""
    with errors_told():
        found = _aliased(name, version) if isinstance(version, str) else _known(name).get(version)
    if found is None:
        raise BadInput(
            f"model {name!r} has no version {version!r} in MLflow at {uri()}; register one: `flywheel nightly`"
        )
    return found


def versions(name: str) -> list[ModelVersion]:
    """All versions, oldest first."""
    with errors_told():
        return [version for _, version in sorted(_known(name).items())]


def checkpoint_dir(version: ModelVersion, destination: Path | None = None) -> Path:
    """The version's checkpoint folder: where it lies when it is on this machine, else downloaded to `destination`."""
    with errors_told():
        where = client().get_logged_model(version.model_id).artifact_location
        local = download_artifacts(where, dst_path=str(destination) if destination else None, tracking_uri=uri())
    return Path(local)


def datasets_of(version: ModelVersion) -> list[dict[str, str]]:
    """From a version to what it was trained on: name, digest, context of each dataset its run has used."""
    if version.run_id is None:
        return []
    with errors_told():
        inputs = client().get_run(version.run_id).inputs
    return [
        {"name": i.dataset.name, "digest": i.dataset.digest, "context": next((tag.value for tag in i.tags), "")}
        for i in (inputs.dataset_inputs if inputs else [])
    ]


def versions_of(name: str, digest: str) -> list[ModelVersion]:
    """From a dataset's digest to the versions trained on it, oldest first."""
    with errors_told():
        runs = {run.info.run_id for run in client().search_runs([experiment_id()], f"dataset.digest = '{digest}'")}
    return [version for version in versions(name) if version.run_id in runs or version.tags.get("dataset") == digest]


def _decide(version: ModelVersion, is_better: Callable[[ModelVersion], bool]) -> None:
    """Move the aliases. `previous` is set before `champion`, so that no kill in between can lose the old champion."""
    _alias(version, "challenger")
    best = _aliased(version.name, "champion")
    if best is None:
        decision, wins = "champion: the first", True
    elif best.version == version.version:  # an earlier attempt was killed right after it had decided
        decision, wins = "champion", True
    elif best.tags["protocol"] != version.tags["protocol"]:
        decision, wins = f"challenger: version {best.version} was scored under another protocol", False
    elif is_better(best):
        decision, wins = f"champion: better than version {best.version}", True
    else:
        decision, wins = f"challenger: not better than version {best.version}", False
    if wins:
        if best and best.version != version.version:
            _alias(best, "previous")
        _alias(version, "champion")
    client().set_model_version_tag(version.name, str(version.version), DECISION, decision)


def _alias(version: ModelVersion, alias: str) -> None:
    client().set_registered_model_alias(version.name, alias, str(version.version))


def _find(name: str, key: str) -> ModelVersion | None:
    return next((version for version in _known(name).values() if version.tags.get(KEY) == key), None)


def _create(checkpoint: Path, name: str, key: str, tags: Mapping[str, object], run_id: str | None) -> ModelVersion:
    if not checkpoint.is_dir():
        raise BadInput(f"{checkpoint}: no checkpoint folder to register as {name!r}")
    texts = {tag: str(value) for tag, value in tags.items()} | {KEY: key}
    model_id = _upload(checkpoint, name, key, texts, run_id)
    if not _exists(name):
        client().create_registered_model(name)
    with as_global():
        made = client().create_model_version(name, f"models:/{model_id}", run_id, texts, model_id=model_id)
    return _version(made, {})


def _upload(checkpoint: Path, name: str, key: str, tags: dict[str, str], run_id: str | None) -> str:
    """A ready LoggedModel with the checkpoint's files; one that a killed attempt has left is completed."""
    found = client().search_logged_models([experiment_id()], f"tags.`{KEY}` = '{key}'")
    model = next(iter(found), None) or client().create_logged_model(experiment_id(), name, run_id, tags)
    if model.status != "READY":
        client().log_model_artifacts(model.model_id, str(checkpoint))
        client().finalize_logged_model(model.model_id, "READY")
    return model.model_id


def _exists(name: str) -> bool:
    return _aliases(name) is not None


def _aliases(name: str) -> dict[str, int] | None:
    """Alias -> version; None when there is no such model. The aliases of a version search come back empty."""
    try:
        return {alias: int(version) for alias, version in client().get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _aliased(name: str, alias: str) -> ModelVersion | None:
    number = (_aliases(name) or {}).get(alias)
    return None if number is None else _known(name).get(number)


def _known(name: str) -> dict[int, ModelVersion]:
    aliases = _aliases(name) or {}
    return {
        int(found.version): _version(found, aliases) for found in client().search_model_versions(f"name = '{name}'")
    }


def _version(found: Any, aliases: dict[str, int]) -> ModelVersion:
    number = int(found.version)
    return ModelVersion(
        name=found.name,
        version=number,
        aliases=tuple(sorted(alias for alias, version in aliases.items() if version == number)),
        tags=dict(found.tags),
        run_id=found.run_id or None,
        source=found.source,
    )
