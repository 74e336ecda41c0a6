"""Chunk transitions: what one decision of H actions earned, and where it led.

```
 t             0   1   2   3          H = 3, an episode of L = 4 steps that succeeds at t = 3
 event         0   1   0   1
                                      h  n_pad  next   reward: indicator  count  discounted   discount
 chunk at 0    a0  a1  a2             3    0     3                 1        1      γ             γ³
 chunk at 1        a1  a2  a3         3    0     3†                1        2      1 + γ²        0   ended inside
 chunk at 2            a2  a3  --     2    1     3†                1        1      γ             0
 chunk at 3                a3  --  -- 1    2     3†                1        1      1             0

 h = min(H, L-t)   reward = Σ_{k<h} γ^k event[t+k]   discount = γ^h · (1 - terminal)
 target of a critic = reward + discount · V(o_next)
```
† o_L, seen after the last action, is never recorded. A chunk that reaches t+h = L therefore points `next` at the last
picture there is, o_{L-1}. After a termination the discount is 0 and nothing is read from it. After a truncation the
bootstrap is one step early: the value of o_{L-1} stands in for that of o_L.

The table holds row numbers, never actions: a batch gathers them (`data.loader`), so 10 million chunks cost 400 MB and
not 3 GB. Rows are numbered as in the dataset's steps, from 0; `action_is_pad[k]` is `k >= h`.
Source: Sutton, Precup & Singh 1999 (semi-Markov options). Terminating without (1 - terminal) is a common slip.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int64, UInt32

from data.chunk_config import ChunkConfig
from data.errors import BadInput
from data.schema import TERMINATED, TRUNCATED
from data.store import canonical
from data.subgoals import EVENT, Labeler, labeler_digest

EXECUTED = "executed"
METADATA = "flywheel.chunks"  # key in the parquet file's metadata
COLUMNS = {
    "episode_index": pl.Int64,
    "start": pl.UInt32,  # row number of o_t and a_t
    "t": pl.Int64,  # step within the episode
    "h": pl.UInt32,  # actions inside the episode, 1..H
    "next": pl.UInt32,  # row number of the observation to bootstrap from
    "reward": pl.Float32,
    "discount": pl.Float32,
    "terminal": pl.Boolean,  # the task ended inside
    "truncated": pl.Boolean,  # the recording ended inside, the task did not
    "n_pad": pl.UInt32,  # H - h
}


@dataclass(frozen=True, kw_only=True)
class ChunkMeta:
    """What a chunk table was made by; written into the file itself."""

    config: ChunkConfig
    labeler: str  # name of the labeler whose events pay
    labeler_version: int
    labeler_digest: str
    actions: str = EXECUTED  # whose actions the rewards belong to; a Q-function learns from "executed" only


@dataclass(frozen=True, kw_only=True)
class ChunkTable:
    """One collection's chunks, in memory."""

    rows: pl.DataFrame  # `COLUMNS`, one row per chunk
    meta: ChunkMeta


def build_chunks(steps: pl.LazyFrame, config: ChunkConfig) -> pl.LazyFrame:
    """One row per chunk start, in order.

    `steps` holds every row of the collection, in order and labelled: episode_index, frame_index, event, terminated.
    The cost is linear in the rows; it does not grow with H, but for `discounted`, which adds H sweeps.
    """
    chunks = steps.select("episode_index", "frame_index", EVENT, TERMINATED).map_batches(
        lambda rows: _transitions(rows, config),
        schema=COLUMNS,
        predicate_pushdown=False,  # every row counts, whichever of them are wanted
        projection_pushdown=False,
        slice_pushdown=False,
    )
    return chunks if config.stride == 1 else chunks.filter(pl.col("t") % config.stride == 0)


def write_chunks(
    steps: pl.LazyFrame, at_reset: pl.DataFrame, out: Path, *, config: ChunkConfig, labeler: Labeler
) -> ChunkMeta:
    """Label `steps` and stream their chunks into the parquet file `out`. Raises `BadInput` on steps out of order."""
    refuse_disorder(steps)
    meta = ChunkMeta(
        config=config,
        labeler=labeler.name,
        labeler_version=labeler.version,
        labeler_digest=labeler_digest(labeler),
    )
    chunks = build_chunks(labeler(steps, at_reset), config)
    chunks.sink_parquet(out, metadata={METADATA: canonical(asdict(meta))})
    return meta


def read_chunks(path: Path) -> ChunkTable:
    """What `write_chunks` wrote. Raises `BadInput` on a damaged file or one of another kind."""
    try:
        meta = json.loads(pl.read_parquet_metadata(path)[METADATA])
        meta = ChunkMeta(**{**meta, "config": ChunkConfig(**meta["config"])})
        return ChunkTable(rows=pl.read_parquet(path), meta=meta)
    except (OSError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as fault:
        raise BadInput(f"{path}: no chunk table ({type(fault).__name__}); build it again") from fault


def refuse_disorder(steps: pl.LazyFrame) -> None:
    """Raise `BadInput` unless episodes follow each other, count from 0 without gaps and end at their last row only."""
    columns = steps.collect_schema().names()
    for name in ("episode_index", "frame_index", TERMINATED, TRUNCATED):
        if name not in columns:
            raise BadInput(f"{name}: the dataset has no such column; chunks need to know where and why episodes end")
    episode, frame = pl.col("episode_index"), pl.col("frame_index")
    same = episode == episode.shift(1)
    in_order = pl.when(same).then(frame == frame.shift(1) + 1).otherwise((frame == 0) & (episode > episode.shift(1)))
    ended = pl.col(TERMINATED) | pl.col(TRUNCATED)
    faults = steps.select(
        disorder=episode.filter(~in_order).first(),
        early_end=episode.filter(ended.shift(1) & same).first(),
    ).collect(engine="streaming")
    disorder, early_end = faults.row(0)
    if disorder is not None:
        raise BadInput(
            f"frame_index: duplicated or out of order in episode {disorder}; sort the steps, or record again"
        )
    if early_end is not None:
        raise BadInput(f"terminated/truncated: episode {early_end} goes on after its end; split it or record it again")


def _transitions(steps: pl.DataFrame, config: ChunkConfig) -> pl.DataFrame:
    """The table of `build_chunks`. In numpy: window expressions over episodes cost polars twice as much."""
    episode, event, terminated = (steps[c].to_numpy() for c in ("episode_index", EVENT, TERMINATED))
    horizon, n = np.uint32(config.horizon), len(episode)
    start = np.arange(n, dtype=np.uint32)
    end = _episode_ends(episode)
    stop = start + horizon  # the chunk is rows start..stop-1
    tail = np.flatnonzero(stop >= end)  # few: all else is filled in one stroke
    end = end[tail]
    stop[tail] = end
    h = np.full(n, horizon)
    h[tail] = end - start[tail]
    after = stop.copy()
    after[tail] = end - np.uint32(1)
    ended = terminated[end - np.uint32(1)]  # an episode terminates at its last row or not at all
    terminal, truncated = np.zeros(n, bool), np.zeros(n, bool)
    terminal[tail], truncated[tail] = ended, ~ended
    discounts = np.array([config.gamma**k for k in range(config.horizon + 1)], np.float32)
    discount = np.full(n, discounts[-1])
    discount[tail] = np.where(ended, np.float32(0), discounts[h[tail]])
    return pl.DataFrame(
        {
            "episode_index": steps["episode_index"],
            "start": start,
            "t": steps["frame_index"],
            "h": h,
            "next": after,
            "reward": _reward(event, start, stop, config).astype(np.float32),
            "discount": discount,
            "terminal": terminal,
            "truncated": truncated,
            "n_pad": horizon - h,
        },
        schema=COLUMNS,
    )


def _episode_ends(episode: Int64[np.ndarray, " n"]) -> UInt32[np.ndarray, " n"]:
    """For each row, the number of the first row after its episode."""
    ends = np.append(np.flatnonzero(episode[1:] != episode[:-1]) + 1, len(episode))
    return np.repeat(ends.astype(np.uint32), np.diff(ends, prepend=0))


def _reward(
    event: np.ndarray, start: UInt32[np.ndarray, " n"], stop: UInt32[np.ndarray, " n"], config: ChunkConfig
) -> np.ndarray:
    """What each chunk of rows start..stop-1 earns, from `event` [n], the number of events at each row."""
    n = len(event)
    if config.reward_mode == "discounted":
        total = np.zeros(n)
        for k in range(min(config.horizon, n)):
            total[: n - k] += config.gamma**k * (event[k:] * (start[k:] < stop[: n - k]))
        return total
    paid = np.zeros(n + 1, np.uint32)  # paid[i]: events before row i, so a window's sum is one difference
    np.cumsum(event, out=paid[1:])
    count = paid[stop] - paid[:-1]
    return count > 0 if config.reward_mode == "indicator" else count
