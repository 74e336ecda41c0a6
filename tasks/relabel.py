"""Relabelling: beside each chunk that was executed, K chunks that a policy would have executed there."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import BadInput
from data.refs import Ref
from data.relabel_config import Relabel
from data.store import Build
from tasks.actors import acting_code, code_of
from tasks.chunks import TABLE
from tasks.progress import progress
from tasks.recipe import jsonable, rebuild
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    import numpy as np

    from data.schema import Schema
    from models.proposer import Proposer

PROPOSALS = "proposals.parquet"


def relabel_chunks(
    config: Relabel, batches: Sequence[Ref], frames: Sequence[Ref], chunks: Sequence[Ref], *, checkpoint: Ref | None
) -> list[Ref]:
    """The proposals of each batch, row by row beside its chunk table.

    checkpoint: the night's own, which proposes unless `config.source` names a folder.
    """
    params, parts, upstream, execution = who_proposes(config, checkpoint)
    refs = [
        ensure("relabel", params, [batch, f, c, *upstream], label=f"batch {i}", parts=parts, execution=execution)
        for i, (batch, f, c) in enumerate(zip(batches, frames, chunks, strict=True))
    ]
    _opened.cache_clear()  # its memory is for whoever comes next
    return refs


def proposed(ref: Ref) -> "np.ndarray":
    """The proposals [n, k, h, a] of one batch's chunks."""
    from data.relabel import read_proposals

    return read_proposals(ref.dir / PROPOSALS).array


def who_proposes(
    config: Relabel, checkpoint: Ref | None
) -> tuple[dict[str, Any], tuple[str, ...], list[Ref], dict[str, Any]]:
    """(parameters, code chosen by name, upstream artefacts, execution) of whatever stands on the proposer.

    A folder counts by what is in it, not by where it lies.
    """
    params = jsonable(config)
    del params["execute"], params["source"]
    if not config.source:
        if checkpoint is None:
            raise BadInput("relabel.source is empty and there is no checkpoint of the night yet; name a folder")
        parts = code_of([checkpoint]) if checkpoint.digest else ()
        return {**params, "policy": ""}, parts, [checkpoint], {"source": checkpoint.path}
    from data.relabel import folder_digest

    folder = Path(config.source)
    if not folder.is_dir():
        raise BadInput(f"relabel.source {config.source!r} is no folder; `flywheel fetch pi0_libero` gets one")
    return {**params, "policy": folder_digest(folder)}, _code_in(folder), [], {"source": str(folder)}


def _code_in(folder: Path) -> tuple[str, ...]:
    """The modules that a folder's acting stands on and that are named in it. LeRobot's pi0 names none of ours."""
    import json

    spec = folder / "spec.json"
    if not spec.is_file():
        return ()
    try:
        return acting_code(json.loads(spec.read_text())["config"])
    except (ValueError, KeyError, TypeError) as fault:
        raise BadInput(f"{spec}: cannot be read ({type(fault).__name__}); restore the checkpoint") from None


def propose_actions(build: Build, work: Work) -> None:
    """The body of the `relabel` stage."""
    from data.chunks import read_chunks
    from data.frames import open_frames
    from data.relabel import write_proposals
    from models.proposer import asking

    frames, table = work.upstream("frames")[0].dir, work.upstream("chunks")[0].dir / TABLE
    batch = work.inputs.parents[0]
    config, proposer = the_proposer(work, open_frames(frames).schema)
    with _rate(work.label, len(read_chunks(table).rows)) as on_chunks:
        write_proposals(
            frames,
            table,
            build.out / PROPOSALS,
            ask=asking(proposer, samples=config.samples, seed=config.seed),
            proposer=proposer.provenance(),
            seed=config.seed,
            samples=config.samples,
            batch_size=config.batch_size,
            collection=batch.digest,
            work=build.work,
            on_chunks=on_chunks,
        )


def the_proposer(work: Work, schema: "Schema") -> "tuple[Relabel, Proposer]":
    """Who proposes in this unit of work."""
    params = dict(work.params)
    checkpoint = work.upstream("train")
    digest = params.pop("policy") or checkpoint[0].digest
    config = rebuild(Relabel, {name: params[name] for name in Relabel.__dataclass_fields__ if name in params})
    cameras = tuple(sorted(config.cameras.items()))
    return config, _opened(work.execution["source"], schema, digest, config.steps, cameras, config.state)


@lru_cache(maxsize=1)  # one for all batches of a night: a pi0 takes a minute to load
def _opened(
    source: str,
    schema: "Schema",
    digest: str,
    steps: int | None,
    cameras: tuple[tuple[str, str], ...],
    state: tuple[str, ...],
) -> "Proposer":
    from models.proposer import open_proposer

    return open_proposer(source, schema, digest=digest, steps=steps, cameras=dict(cameras), state=state)


@contextmanager
def _rate(label: str, total: int) -> Iterator[Any]:
    """Progress that also says how many chunks are done per second."""
    done, began = 0, time.monotonic()
    with progress(label, total, "chunks") as advance:

        def on_chunks(n: int) -> None:
            nonlocal done
            done += n
            advance(n, note=f"{done / (time.monotonic() - began):.1f} chunks/s")

        yield on_chunks
