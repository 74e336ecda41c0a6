"""Proposals: for every chunk start, K chunks that a policy would have executed, beside the one that was.

```
 chunks.parquet      episode_index t start  h next reward ...      what happened, never touched
      row i   ||           row i
 proposals.parquet   episode_index t start  relabel.0 .. relabel.K-1     float32 [H*a] each, in the environment's units
                     metadata: who proposed, from which noise, to which chunk table
```
A proposal was never executed, so it has no reward and no next observation: it serves V's expectation, ranking and
regularisation, or is executed in the simulator (`data.sim.branch`) to earn a reward of its own.

Rows are worked on in batches cut at fixed places, each kept when it is done: a killed relabelling goes on with the next
one, and ends with the bytes of an undisturbed one.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float32, Int64, UInt32

from data.chunks import read_chunks
from data.errors import BadInput
from data.loader import ChunkSource
from data.store import MANIFEST, canonical, sha256_file

METADATA = "flywheel.proposals"  # key in the parquet file's metadata
COLUMN = "relabel."  # + k
ROW = ("episode_index", "t", "start")  # of the chunk table, repeated so that a misfit is seen

# (dataset columns with a leading axis b, which chunk each is) -> float32 [b K h a], h the policy's own horizon.
# Its noise must be a function of which chunk it is, and of nothing else.
Ask = Callable[[dict[str, Any], list[str]], Float32[np.ndarray, "b k h a"]]


@dataclass(frozen=True, kw_only=True)
class ProposalMeta:
    """Where proposals come from; written into the file itself."""

    proposer: dict[str, Any]  # kind, policy (digest), steps (of denoising), normalization (digest)
    seed: int
    samples: int  # K
    horizon: int  # H, of the chunk table
    action: int  # a, components
    batch_size: int  # rows asked together: another one rounds differently
    collection: str  # digest of the batch of episodes
    chunks: str  # sha256 of the chunk table these rows are aligned with


@dataclass(frozen=True, kw_only=True, eq=False)
class Proposals:
    """One collection's proposals, in the order of its chunk table."""

    episode: Int64[np.ndarray, " n"]
    t: Int64[np.ndarray, " n"]  # step within the episode
    start: UInt32[np.ndarray, " n"]  # row of the observation
    array: Float32[np.ndarray, "n k h a"]  # the chunks, in the environment's units
    meta: ProposalMeta

    def __len__(self) -> int:
        return len(self.array)


def write_proposals(
    frames: Path,
    chunks: Path,
    out: Path,
    *,
    ask: Ask,
    proposer: dict[str, Any],
    seed: int,
    samples: int,
    batch_size: int,
    collection: str,
    work: Path,
    on_chunks: Callable[[int], None] = lambda n: None,
) -> ProposalMeta:
    """Propose for every row of the chunk table `chunks` of the frame store `frames`; write the parquet file `out`.

    work: folder that survives a kill; what lies in there of the same relabelling is used. on_chunks: told how many rows
    are done since it was last told. Raises `BadInput` for a NaN, naming its episode and step, and for a policy that
    looks less far ahead than the table's chunks are long.
    """
    source = ChunkSource.open([frames], [chunks])
    table = read_chunks(chunks)
    meta = ProposalMeta(
        proposer=proposer,
        seed=seed,
        samples=samples,
        horizon=source.horizon,
        action=len(source.schema.action),
        batch_size=batch_size,
        collection=collection,
        chunks=sha256_file(chunks),
    )
    shards = work / hashlib.sha256(canonical(asdict(meta)).encode()).hexdigest()[:16]
    shards.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, len(source), batch_size):
        rows = np.arange(first, min(first + batch_size, len(source)))
        shard = shards / f"{first:09d}.npy"
        part = _done(shard, (len(rows), samples, meta.horizon, meta.action))
        if part is None:
            part = _propose(source, table.rows[rows], rows, ask, meta)
            _keep(shard, part)
        parts.append(part)
        on_chunks(len(rows))
    _write(table.rows, np.concatenate(parts), meta, out)
    return meta


def read_proposals(path: Path) -> Proposals:
    """What `write_proposals` wrote. Raises `BadInput` on a damaged file or one of another kind."""
    try:
        meta = ProposalMeta(**json.loads(pl.read_parquet_metadata(path)[METADATA]))
        rows = pl.read_parquet(path)
        samples = [rows[f"{COLUMN}{k}"].to_numpy() for k in range(meta.samples)]
        array = np.stack(samples, axis=1).reshape(len(rows), meta.samples, meta.horizon, meta.action)
        episode, t, start = (rows[name].to_numpy() for name in ROW)
    except (OSError, KeyError, TypeError, ValueError, pl.exceptions.PolarsError) as fault:
        raise BadInput(f"{path}: no proposals ({type(fault).__name__}); relabel again") from fault
    return Proposals(episode=episode, t=t, start=start, array=array, meta=meta)


def refuse_misfit(proposals: Proposals, path: Path, chunks: Path) -> None:
    """Raise `BadInput` unless the proposals of `path` were made for exactly the chunk table in `chunks`."""
    if proposals.meta.chunks != sha256_file(chunks):
        raise BadInput(f"{path}: proposals for another chunk table than {chunks}; relabel again")


def folder_digest(folder: Path) -> str:
    """What a policy's folder is: sha256 over the names and digests of its JSON and safetensors files."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors") and p.name != MANIFEST)
    return hashlib.sha256(canonical({p.name: sha256_file(p) for p in files}).encode()).hexdigest()


def _propose(
    source: ChunkSource, table: pl.DataFrame, rows: Int64[np.ndarray, " b"], ask: Ask, meta: ProposalMeta
) -> Float32[np.ndarray, "b k h a"]:
    columns = source.gather(rows, source.buffers(len(rows)))
    which = [f"{meta.collection}/{episode}/{t}" for episode, t in table.select("episode_index", "t").iter_rows()]
    answer = ask(columns, which)
    b, k, h, a = answer.shape
    if (b, k, a) != (len(rows), meta.samples, meta.action) or h < meta.horizon:
        raise BadInput(
            f"policy {str(meta.proposer['policy'])[:24]} proposes {k} x {h} actions of {a} components, the chunks "
            f"have {meta.horizon} of {meta.action}; train it on such, or build chunks with horizon {h}"
        )
    part = np.ascontiguousarray(answer[:, :, : meta.horizon], np.float32)
    broken = ~np.isfinite(part).all(axis=(1, 2, 3))
    if broken.any():
        episode, t = table.select("episode_index", "t").row(int(broken.argmax()))
        raise BadInput(
            f"policy {str(meta.proposer['policy'])[:24]} proposed NaN or infinity for episode {episode}, step {t}; "
            "its weights or its normalisation are broken"
        )
    return part


def _done(shard: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """What an earlier run kept; None when it kept nothing whole."""
    try:
        part = np.load(shard, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return part if part.shape == shape and part.dtype == np.float32 else None


def _keep(shard: Path, part: np.ndarray) -> None:
    """Complete or invisible, whenever the process dies."""
    staging = shard.with_suffix(".part")
    with staging.open("wb") as file:
        np.save(file, part, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    staging.rename(shard)


def _write(rows: pl.DataFrame, actions: Float32[np.ndarray, "n k h a"], meta: ProposalMeta, out: Path) -> None:
    flat = actions.reshape(len(actions), meta.samples, meta.horizon * meta.action)
    proposed = [pl.Series(f"{COLUMN}{k}", flat[:, k]) for k in range(meta.samples)]
    rows.select(ROW).with_columns(proposed).write_parquet(out, metadata={METADATA: canonical(asdict(meta))})
