"""Sub-goal labelers: from predicates, which are levels, to events, which pay once.

```
 t                 reset   0   1   2   3   4
 subgoal.lifted      0     0   1   1   0   1      true after a_t
 event.lifted              0   1   0   0   0      a_1 did it; doing it again at t = 4 pays nothing
 subgoal.open        1     1   0   0   1   1
 event.open                0   0   0   0   0      true at reset: nobody earned it, so it never pays
 event                     0   1   0   0   0      how many predicates were earned by a_t
```
A level would pay in every chunk after the first success and teach a critic to farm it; hence rising edges only.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Protocol

import polars as pl

from data.errors import BadInput
from data.registry import Registry, did_you_mean
from data.schema import SUBGOAL
from data.store import canonical

EVENT = "event"  # events earned by the row's action; `event.<predicate>` says which

LABELERS = Registry("labeler", {"rising_edge": "data.subgoals:RisingEdge"})


class Labeler(Protocol):
    """Says which action earned what. Its identity goes into everything built from its labels."""

    name: str  # registry name
    version: int  # raised whenever equal parameters would label differently

    @property
    def parameters(self) -> dict[str, Any]:
        """JSON-able; everything the labels depend on besides the data."""
        ...

    def __call__(self, steps: pl.LazyFrame, at_reset: pl.DataFrame) -> pl.LazyFrame:
        """`steps` (episode_index, frame_index, subgoal.*) in order, plus `event.<name>` bool and `event` uint32.

        `at_reset` has one row per episode: episode_index, and each subgoal.* as it was before the first action, null
        where nobody knows.
        """
        ...


def labeler_digest(labeler: Labeler) -> str:
    """sha256 of the labeler's name, version and parameters."""
    identity = {"name": labeler.name, "version": labeler.version, "parameters": labeler.parameters}
    return hashlib.sha256(canonical(identity).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class RisingEdge:
    """Pays the step after which a predicate holds for the first time in its episode, unless it held at reset."""

    predicates: tuple[str, ...] = ()  # which of them pay; empty: every subgoal.* column there is

    name = "rising_edge"
    version = 1

    @property
    def parameters(self) -> dict[str, Any]:
        return {"predicates": list(self.predicates)}

    def __call__(self, steps: pl.LazyFrame, at_reset: pl.DataFrame) -> pl.LazyFrame:
        names = self._names(steps)
        missing = [SUBGOAL + n for n in names if SUBGOAL + n not in at_reset.columns]
        at_reset = at_reset.with_columns(pl.lit(None, dtype=pl.Boolean).alias(column) for column in missing)
        _refuse_unknown_reset(steps, at_reset, names)
        events = {f"{EVENT}.{name}": _first_rise(SUBGOAL + name, at_reset) for name in names}
        return steps.with_columns(**events).with_columns(
            pl.sum_horizontal(pl.col(event).cast(pl.UInt32) for event in events).alias(EVENT)
        )

    def _names(self, steps: pl.LazyFrame) -> list[str]:
        there = [c.removeprefix(SUBGOAL) for c in steps.collect_schema().names() if c.startswith(SUBGOAL)]
        if not there:
            raise BadInput("the dataset has no subgoal.* column; collect with a scene that declares sub-goals")
        for name in self.predicates:
            if name not in there:
                raise BadInput(f"unknown sub-goal {name!r}{did_you_mean(name, there)}")
        return list(self.predicates) or there


def _first_rise(predicate: str, at_reset: pl.DataFrame) -> pl.Expr:
    held = at_reset.filter(predicate)["episode_index"]
    first_time = pl.when(predicate).then("episode_index").is_first_distinct()
    return pl.col(predicate) & first_time & ~pl.col("episode_index").is_in(held.implode())


def _refuse_unknown_reset(steps: pl.LazyFrame, at_reset: pl.DataFrame, names: list[str]) -> None:
    """A predicate that came true earns nothing unless it is known to have been false at reset."""
    known = {SUBGOAL + n: at_reset.drop_nulls(SUBGOAL + n)["episode_index"] for n in names}
    unexplained = steps.select(
        pl.col("episode_index").filter(pl.col(p) & ~pl.col("episode_index").is_in(episodes.implode())).first().alias(p)
        for p, episodes in known.items()
    ).collect(engine="streaming")
    for predicate, episode in unexplained.row(0, named=True).items():
        if episode is not None:
            raise BadInput(f"{predicate}: episode {episode} does not say whether it held at reset; record it again")
