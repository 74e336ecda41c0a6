"""The training set: a list of batches of rollouts, which episodes of them are held out, and the statistics of the rest.

An aggregation copies nothing. It names its members by stage, key and digest; whoever reads it finds them in the store.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from data import normalize
from data.errors import BadInput
from data.lerobot import Dataset, open_dataset
from data.normalize import Stats
from data.refs import Ref
from data.schema import ACTION, STATE, Schema
from data.store import Store


@dataclass(frozen=True, kw_only=True)
class Member:
    """One batch of rollouts in the set."""

    stage: str  # that made it: "collect" or "adopt"
    key: str
    digest: str
    scenes: tuple[str, ...]  # per episode; of an adopted dataset its digest
    seeds: tuple[int, ...]  # per episode; of an adopted dataset the episode's number
    succeeded: tuple[bool, ...]  # per episode; an adopted dataset's are taken for demonstrations
    steps: int  # rows
    train: tuple[int, ...]  # episodes to learn from
    held_out: tuple[int, ...]  # episodes kept to measure on; those in neither failed


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What a policy may learn from."""

    schema: Schema
    members: tuple[Member, ...]
    stats: dict[str, Stats]  # "state", "action": over the training episodes

    @property
    def episodes(self) -> int:
        return sum(len(m.seeds) for m in self.members)

    @property
    def steps(self) -> int:
        return sum(m.steps for m in self.members)

    @property
    def collected(self) -> set[tuple[str, int]]:
        """Every (scene, seed) that was collected, failed ones too: none of them may be evaluated on."""
        return {pair for m in self.members for pair in zip(m.scenes, m.seeds, strict=True)}

    def held_out(self) -> Iterator[tuple[Dataset, int]]:
        """Each held-out episode, as its dataset and its index there."""
        for member in self.members:
            dataset = open_member(member)
            yield from ((dataset, episode) for episode in member.held_out)

    def to_json(self) -> dict[str, Any]:
        members = [asdict(m) for m in self.members]
        return {
            "schema": self.schema.to_json(),
            "members": members,
            "stats": {k: s.to_json() for k, s in self.stats.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainingSet":
        return cls(
            schema=Schema.from_json(value["schema"]),
            members=tuple(Member(**_with_tuples(m)) for m in value["members"]),
            stats={name: Stats.from_json(s) for name, s in value["stats"].items()},
        )


def aggregate(batches: Sequence[Ref], *, held_out: float, failures: bool) -> TrainingSet:
    """The set of all `batches`. Raises `BadInput` when their schemas differ or nothing is left to learn from.

    held_out: share of the episodes. Which ones is a function of (scene, seed), so a later night moves none across.
    failures: also learn from episodes that failed.
    """
    schema: Schema | None = None
    members, state, action = [], [], []
    for ref in batches:
        dataset = open_dataset(ref.dir)
        if schema is None:
            schema, first = dataset.schema, ref
        schema.refuse_unless_fits(dataset.schema, mine=f"batch {first.path}", others=f"batch {ref.path}")
        member = _member(ref, dataset, held_out, failures)
        members.append(member)
        rows = dataset.steps.filter(pl.col("episode_index").is_in(member.train))
        if len(rows):
            state.append(normalize.fit(rows[STATE].to_numpy()))
            action.append(normalize.fit(rows[ACTION].to_numpy()))
    if schema is None or not state:
        raise BadInput("dataset: no successful episode to learn from; collect more, or set dataset.failures true")
    stats = {"state": normalize.merge(state), "action": normalize.merge(action)}
    return TrainingSet(schema=schema, members=tuple(members), stats=stats)


def _with_tuples(member: dict[str, Any]) -> dict[str, Any]:
    """A member's fields from JSON, which has lists for them."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in member.items()}


def open_member(member: Member) -> Dataset:
    """The member's dataset, verified. Raises `BadInput` if it is gone or damaged."""
    ref, why = Store().find(member.stage, member.key)
    if ref is None or ref.digest != member.digest:
        raise BadInput(f"rollouts {member.key[:16]} of the dataset: {why}; `flywheel dataset` makes them again")
    return open_dataset(ref.dir)


def _member(ref: Ref, dataset: Dataset, held_out: float, failures: bool) -> Member:
    if dataset.rollouts is not None:
        scenes, seeds, succeeded = (dataset.rollouts[c].to_list() for c in ("scene", "seed", "success"))
    else:
        count = len(dataset.episodes)
        scenes, seeds, succeeded = [ref.digest[:16]] * count, list(range(count)), [True] * count
    kept_out = [_draw(scene, seed) < held_out for scene, seed in zip(scenes, seeds, strict=True)]
    usable = [ok or failures for ok in succeeded]
    return Member(
        stage=ref.stage,
        key=ref.key,
        digest=ref.digest,
        scenes=tuple(scenes),
        seeds=tuple(seeds),
        succeeded=tuple(succeeded),
        steps=len(dataset.steps),
        train=tuple(i for i, ok in enumerate(usable) if ok and not kept_out[i]),
        held_out=tuple(i for i, ok in enumerate(usable) if ok and kept_out[i]),
    )


def _draw(scene: str, seed: int) -> float:
    """A number in [0, 1) that is the episode's own."""
    return int.from_bytes(hashlib.sha256(f"{scene} {seed}".encode()).digest()[:6]) / 2**48
