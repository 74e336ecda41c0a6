"""Chunks and frames to batches: which chunks step k of a training sees, and the gather that fetches them.

```
 step             0          1          2          3            n = 10 chunks, batches of 4
 position      0 1 2 3    4 5 6 7    8 9|0 1    2 3 4 5
 epoch         0 0 0 0    0 0 0 0    0 0|1 1    1 1 1 1         chunk = order(seed, epoch)[position]
```
Nothing about the order is ever saved: it is a function of (seed, step), so a resumed run sees what an undisturbed one
would have seen. A batch lists its chunks in rising order, which keeps the reads of one collection together.

Pictures leave as uint8, exactly as stored; scaling, augmentation and normalisation are the policy's. One or two threads
fill buffers that are made once: numpy copies without the interpreter lock, whereas worker processes would copy every
picture twice and be ten times slower.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64, UInt32

from data.chunks import EXECUTED, ChunkTable, read_chunks
from data.errors import BadInput
from data.frames import Frames, open_frames
from data.schema import ACTION, IMAGE, STATE, Schema

ACTION_IS_PAD = "action_is_pad"
NEXT = "next."  # + column: the same at the row a chunk bootstraps from

# observation.images.<camera>  uint8 [b height width 3]      action         float32 [b h a], beyond the end the last one
# observation.state            float32 [b s]                 action_is_pad  bool [b h]
# reward, discount             float32 [b]                   task           list of b instructions
# next.<observation columns>   on request                    index          int64 [b], which chunk of the source
Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkSource:
    """The chunks of many collections under one index. The pictures stay where they are."""

    members: tuple[Frames, ...]
    tasks: tuple[str, ...]  # the instructions there are
    horizon: int  # H
    member: UInt32[np.ndarray, " n"]  # which collection a chunk is in
    start: UInt32[np.ndarray, " n"]  # row there of o_t and a_t
    next: UInt32[np.ndarray, " n"]  # row there of the observation to bootstrap from
    h: UInt32[np.ndarray, " n"]  # actions inside the episode
    reward: Float32[np.ndarray, " n"]
    discount: Float32[np.ndarray, " n"]
    task: UInt32[np.ndarray, " n"]  # number of the instruction
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)  # further columns [n ...], by name
    actions: str = EXECUTED  # whose actions the rewards belong to

    def __len__(self) -> int:
        return len(self.start)

    @property
    def schema(self) -> Schema:
        return self.members[0].schema

    @classmethod
    def open(
        cls,
        frames: Sequence[Path],
        chunks: Sequence[Path],
        episodes: Sequence[Sequence[int]] | None = None,
        beside: Sequence[Mapping[str, np.ndarray]] | None = None,
    ) -> "ChunkSource":
        """From the folders of frame stores and the files of their chunk tables, in step.

        episodes: for each collection, the episodes to use; None uses all. beside: for each, further columns, whose rows
        are those of its chunk table. Raises `BadInput` on collections that do not fit together, or when none is left.
        """
        members = [open_frames(path) for path in frames]
        tables = [read_chunks(path) for path in chunks]
        for i, (member, table) in enumerate(zip(members, tables, strict=True)):
            _refuse_misfit(members[0], tables[0], member, table, frames[i], chunks[i])
        wanted = episodes if episodes is not None else [None] * len(members)
        used = [_used(t.rows, e) for t, e in zip(tables, wanted, strict=True)]
        parts = [_part(i, m, t.rows, u) for i, (m, t, u) in enumerate(zip(members, tables, used, strict=True))]
        rows = pl.concat(parts) if parts else pl.DataFrame()
        if not len(rows):
            raise BadInput("no chunk to train on: no episode is left in the training set; collect more episodes")
        tasks = sorted(rows["task"].unique())
        number = rows["task"].replace_strict(tasks, range(len(tasks)), return_dtype=pl.UInt32)
        columns = ("member", "start", "next", "h", "reward", "discount")
        return cls(
            members=tuple(members),
            tasks=tuple(tasks),
            horizon=tables[0].meta.config.horizon,
            task=number.to_numpy(),
            beside=_beside(beside or [], used, chunks),
            actions=tables[0].meta.actions,
            **{name: rows[name].to_numpy() for name in columns},
        )

    def rows(self, which: Int64[np.ndarray, " m"]) -> "ChunkSource":
        """The chunks of these numbers alone."""
        columns = ("member", "start", "next", "h", "reward", "discount", "task")
        beside = {name: column[which] for name, column in self.beside.items()}
        return replace(self, beside=beside, **{name: getattr(self, name)[which] for name in columns})

    def without_pictures(self) -> "ChunkSource":
        """The same chunks for who knows them by what stands beside them: no picture is read."""
        blind = [replace(m, images={}, schema=replace(m.schema, cameras=())) for m in self.members]
        return replace(self, members=tuple(blind))

    def buffers(self, batch_size: int, *, with_next: bool = False) -> Batch:
        """Arrays for `gather` to fill, again and again.

        with_next is for a Q-function. Raises `BadInput` when the rewards are not those of the table's own actions.
        """
        if with_next and self.actions != EXECUTED:
            raise BadInput(
                f"the chunk table pairs executed actions' rewards with actions of {self.actions}: no data for a "
                "Q-function; keep the executed actions, give the others as proposals"
            )
        columns = {name: np.empty((batch_size, *c.shape[1:]), c.dtype) for name, c in self.beside.items()}
        return _arrays(self.schema, batch_size, self.horizon, with_next) | columns

    def gather(self, index: Int64[np.ndarray, " b"], into: Batch) -> Batch:
        """The chunks `index`, written into the arrays of `into` (from `buffers`), which is also returned."""
        start, h, k = self.start[index], self.h[index], np.arange(self.horizon, dtype=np.uint32)
        into[ACTION_IS_PAD][:] = k >= h[:, None]
        into["index"][:] = index
        into["reward"][:] = self.reward[index]
        into["discount"][:] = self.discount[index]
        into["task"] = [self.tasks[number] for number in self.task[index]]
        for name, column in self.beside.items():
            _take(column, index, into[name])
        action_rows = start[:, None] + np.minimum(k, h[:, None] - 1)
        observed = {"": start, NEXT: self.next[index]} if NEXT + STATE in into else {"": start}
        for number, run in _runs(self.member[index]):
            frames = self.members[number]
            _take(frames.action, action_rows[run], into[ACTION][run])
            for prefix, rows in observed.items():
                _take(frames.state, rows[run], into[prefix + STATE][run])
                for camera, images in frames.images.items():
                    _take(images, rows[run], into[prefix + IMAGE + camera][run])
        return into


def batches(
    source: ChunkSource,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    with_next: bool = False,
    threads: int = 1,
    depth: int = 2,
) -> Iterator[Batch]:
    """Batches for steps `start_step`, `start_step + 1`, ... without end; batch k is a function of (seed, k).

    A batch's arrays belong to the caller until the next one is asked for; then they are filled anew.
    threads: how many fill batches in the background; 0 does it in the caller. depth: batches filled ahead.
    """

    def fill(step: int, into: Batch) -> Batch:
        return source.gather(chosen(len(source), batch_size, seed, step), into)

    if threads == 0:
        into = source.buffers(batch_size, with_next=with_next)
        for step in count(start_step):
            yield fill(step, into)
    ring = [source.buffers(batch_size, with_next=with_next) for _ in range(depth + 1)]  # one is the caller's
    with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
        pending = deque(
            pool.submit(fill, step, ring[step % len(ring)]) for step in range(start_step, start_step + depth)
        )
        try:
            for step in count(start_step):
                batch = pending.popleft().result()
                ahead = step + depth
                pending.append(pool.submit(fill, ahead, ring[ahead % len(ring)]))  # what the caller has just given back
                yield batch
        finally:
            for future in pending:
                future.cancel()


def chosen(n: int, batch_size: int, seed: int, step: int) -> Int64[np.ndarray, " b"]:
    """Which of `n` chunks step `step` sees, in rising order. Every epoch shows each chunk once."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epoch = position // n
    return np.sort(np.concatenate([order(n, seed, int(e))[position[epoch == e] % n] for e in np.unique(epoch)]))


@lru_cache(maxsize=4)  # 8 bytes per chunk; two epochs meet in one batch
def order(n: int, seed: int, epoch: int) -> Int64[np.ndarray, " n"]:
    """A permutation of 0..n-1, the same on every machine and with every numpy.

    Sorts the numbers by splitmix64 of (number + key); that is one-to-one, so there are no ties to break.
    """
    key = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8).digest()
    z = np.arange(n, dtype=np.uint64) + np.uint64(int.from_bytes(key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)))


def fake_batch(
    schema: Schema, *, batch_size: int = 2, horizon: int = 10, seed: int = 0, with_next: bool = False
) -> Batch:
    """Noise in the shape of a batch; its last sample is a tail chunk with one real action."""
    rng = np.random.default_rng(seed)
    batch = _arrays(schema, batch_size, horizon, with_next)
    for array in batch.values():
        if array.dtype == np.uint8:
            array[:] = rng.integers(0, 256, array.shape, np.uint8)
        elif array.dtype == np.float32:
            array[:] = rng.uniform(-1, 1, array.shape)
    batch[ACTION_IS_PAD][:] = False
    batch[ACTION_IS_PAD][-1, 1:] = True
    batch[ACTION][-1, 1:] = batch[ACTION][-1, 0]
    batch["index"][:] = np.arange(batch_size)
    return batch | {"task": ["do the task"] * batch_size}


def _arrays(schema: Schema, b: int, horizon: int, with_next: bool) -> Batch:
    def observation(prefix: str) -> Batch:
        pictures = {prefix + IMAGE + c: np.empty((b, *schema.image_size, 3), np.uint8) for c in schema.cameras}
        return pictures | {prefix + STATE: np.empty((b, len(schema.state)), np.float32)}

    return {
        **observation(""),
        **(observation(NEXT) if with_next else {}),
        ACTION: np.empty((b, horizon, len(schema.action)), np.float32),
        ACTION_IS_PAD: np.empty((b, horizon), bool),
        "reward": np.empty(b, np.float32),
        "discount": np.empty(b, np.float32),
        "index": np.empty(b, np.int64),
    }


def _take(array: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
    np.take(array, rows, axis=0, out=out, mode="clip")  # mode="raise" copies through a buffer; `_part` checked the rows


def _runs(member: UInt32[np.ndarray, " b"]) -> Iterator[tuple[int, slice]]:
    """Stretches of one collection: its number and where they lie in the batch."""
    borders = [0, *(np.flatnonzero(np.diff(member)) + 1).tolist(), len(member)]
    for first, end in pairwise(borders):
        yield int(member[first]), slice(first, end)


def _used(chunks: pl.DataFrame, episodes: Sequence[int] | None) -> Int64[np.ndarray, " n"]:
    """The rows of a chunk table that belong to `episodes`."""
    if episodes is None:
        return np.arange(len(chunks))
    return np.flatnonzero(chunks["episode_index"].is_in(list(episodes)).to_numpy())


def _part(number: int, frames: Frames, chunks: pl.DataFrame, used: Int64[np.ndarray, " n"]) -> pl.DataFrame:
    """One collection's rows of the source's index."""
    chunks = chunks[used]
    return chunks.select(
        "start", "next", "h", "reward", "discount", member=pl.lit(number, dtype=pl.UInt32)
    ).with_columns(task=frames.rows["task"].gather(chunks["start"]))


def _beside(
    members: Sequence[Mapping[str, np.ndarray]], used: list[Int64[np.ndarray, " n"]], tables: Sequence[Path]
) -> dict[str, np.ndarray]:
    """The further columns of all collections, one under another."""
    if not members:
        return {}
    for columns, table in zip(members, tables, strict=True):
        if columns.keys() != members[0].keys():
            raise BadInput(f"{table}: has {sorted(columns)} beside it, the first table {sorted(members[0])}; make both")
    return {
        name: np.concatenate([columns[name][rows] for columns, rows in zip(members, used, strict=True)])
        for name in members[0]
    }


def _refuse_misfit(
    first: Frames, first_table: ChunkTable, frames: Frames, table: ChunkTable, folder: Path, file: Path
) -> None:
    first.schema.refuse_unless_fits(frames.schema, mine=f"frame store {first.path}", others=f"frame store {folder}")
    if table.meta != first_table.meta:
        raise BadInput(f"{file}: made with another horizon, reward or labeler than the first table; build it again")
    rows, at = table.rows, ["episode_index", "frame_index"]
    beyond = rows.select(pl.max_horizontal(pl.col("start") + pl.col("h"), pl.col("next") + 1).max()).item() or 0
    if beyond > len(frames) or not _same(frames.rows[at][rows["start"]], rows[["episode_index", "t"]]):
        raise BadInput(f"{file}: is not of the steps in {folder}; build both again from one collection")


def _same(a: pl.DataFrame, b: pl.DataFrame) -> bool:
    return np.array_equal(a.to_numpy(), b.to_numpy())
