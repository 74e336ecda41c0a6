"""Frame stores: the videos of a batch, decoded once, so that no training step waits for a decoder."""

from data.refs import Ref
from data.store import Build
from tasks.recipe import Recipe
from tasks.stages import Work, ensure


def frame_stores(recipe: Recipe, batches: list[Ref]) -> list[Ref]:
    """One memory-mapped uint8 frame store per batch."""
    return [ensure("frames", {}, [batch], label=f"batch {i}") for i, batch in enumerate(batches)]


def decode_frames(build: Build, work: Work) -> None:
    """The body of the `frames` stage."""
    from data.frames import build_frames
    from data.lerobot import open_dataset

    build_frames(open_dataset(work.inputs.parents[0].dir), build.out)
