"""The small frozen handles that tasks exchange: where an artefact is, and the digest that proves it."""

from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Ref:
    """A published, verified artefact of one stage."""

    stage: str  # stage that made it, e.g. "collect"
    key: str  # what it was made from: sha256 over stage, parameters, upstream digests and code
    digest: str  # what it is: sha256 over its files
    path: str  # folder that holds it

    @property
    def dir(self) -> Path:
        return Path(self.path)

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, str]) -> "Ref":
        return cls(**value)


class DatasetRef(Ref):
    """A LeRobot v3 dataset of one batch of episodes, or an aggregation of several."""


class CheckpointRef(Ref):
    """A policy: weights, spec, normalisation."""


class EvalRef(Ref):
    """A score under one `EvalProtocol`."""
