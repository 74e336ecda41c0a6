"""Chunk tables: the sub-goal events of a batch, and what every decision of H actions earned and led to."""

from data.refs import Ref
from data.store import Build
from tasks.recipe import Recipe, jsonable, rebuild
from tasks.stages import Work, ensure

TABLE = "chunks.parquet"


def chunk_tables(recipe: Recipe, batches: list[Ref]) -> list[Ref]:
    """One table of chunk transitions per batch."""
    params = jsonable(recipe.chunks)
    return [ensure("chunks", params, [batch], label=f"batch {i}") for i, batch in enumerate(batches)]


def build_chunk_table(build: Build, work: Work) -> None:
    """The body of the `chunks` stage."""
    from data.chunks import ChunkConfig, write_chunks
    from data.lerobot import open_dataset
    from data.subgoals import RisingEdge

    dataset = open_dataset(work.inputs.parents[0].dir)
    at_reset = dataset.at_reset.fill_null(False)  # null: a predicate of another scene of the batch, false throughout
    config = rebuild(ChunkConfig, work.params)
    write_chunks(dataset.steps.lazy(), at_reset, build.out / TABLE, config=config, labeler=RisingEdge())
