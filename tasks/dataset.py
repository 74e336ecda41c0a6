"""From batches of rollouts to what training reads: frame stores, chunk tables, and the set as a whole."""

import json
from typing import TYPE_CHECKING

from data.refs import Ref
from data.store import Build
from tasks.recipe import Recipe
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from data.training_set import TrainingSet


def frame_stores(recipe: Recipe, batches: list[Ref]) -> list[Ref]:
    """One memory-mapped uint8 frame store per batch."""
    return [ensure("frames", {}, [batch], label=f"batch {i}") for i, batch in enumerate(batches)]


def chunk_tables(recipe: Recipe, batches: list[Ref]) -> list[Ref]:
    """One table of chunk transitions per batch."""
    params = recipe.to_json()["chunks"]
    return [ensure("chunks", params, [batch], label=f"batch {i}") for i, batch in enumerate(batches)]


def aggregate_batches(recipe: Recipe, batches: list[Ref]) -> Ref:
    """The training set: which batches, which episodes of them are held out, the statistics of the rest."""
    return ensure("dataset", recipe.to_json()["dataset"], batches, label=f"{len(batches)} batches")


def decode_frames(build: Build, work: Work) -> None:
    """The body of the `frames` stage."""
    from data.frames import build_frames
    from data.lerobot import open_dataset

    build_frames(open_dataset(work.upstream("collect")[0].dir), build.out)


def build_chunk_table(build: Build, work: Work) -> None:
    """The body of the `chunks` stage."""
    from data.chunks import ChunkConfig, write_chunks
    from data.lerobot import open_dataset
    from data.subgoals import RisingEdge
    from data.training_set import at_reset

    dataset = open_dataset(work.upstream("collect")[0].dir)
    write_chunks(
        dataset.steps.lazy(), at_reset(dataset), build.out / "chunks.parquet",
        config=ChunkConfig(**work.params), labeler=RisingEdge(),
    )  # fmt: skip


def aggregate_members(build: Build, work: Work) -> None:
    """The body of the `dataset` stage."""
    from data.training_set import aggregate

    whole = aggregate(work.upstream("collect"), **work.params)
    (build.out / "dataset.json").write_text(json.dumps(whole.to_json(), indent=1, sort_keys=True))


def read_set(ref: Ref) -> "TrainingSet":
    """What `aggregate_members` wrote."""
    from data.training_set import TrainingSet

    return TrainingSet.from_json(json.loads((ref.dir / "dataset.json").read_text()))
