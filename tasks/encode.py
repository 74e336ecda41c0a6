"""What a frozen encoder says of every chunk's first observation, once: no picture is read again, no encoder run.

```
 chunks.parquet   start t h next ...        z.npy   float32 [n, d], row by row beside it
```
"""

from typing import TYPE_CHECKING

from data.refs import Ref
from data.store import Build
from models.registry import BACKBONES
from tasks.chunks import TABLE
from tasks.jepa import ENCODER
from tasks.progress import progress
from tasks.recipe import Recipe
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float32

FILE = "z.npy"


def encode_batches(recipe: Recipe, encoder: Ref, frames: list[Ref], chunks: list[Ref]) -> list[Ref]:
    """One table of encodings per batch."""
    parts = (BACKBONES.module(recipe.policy.backbone),)
    return [
        ensure("encode", {}, [encoder, stored, table], label=f"batch {i}", parts=parts)
        for i, (stored, table) in enumerate(zip(frames, chunks, strict=True))
    ]


def read_encodings(ref: Ref) -> "Float32[np.ndarray, 'n d']":
    """In the order of the batch's chunk table."""
    import numpy as np

    return np.load(ref.dir / FILE, allow_pickle=False)


def encode_chunks(build: Build, work: Work) -> None:
    """The body of the `encode` stage."""
    import numpy as np

    from data.loader import ChunkSource
    from models.checkpoint import load_encoder
    from models.devices import best_device
    from models.probe import encode

    (encoder,), (frames,), (chunks,) = (work.upstream(stage) for stage in ("jepa", "frames", "chunks"))
    source = ChunkSource.open([frames.dir], [chunks.dir / TABLE])
    known = load_encoder(encoder.dir / ENCODER, fits=source.schema).to(best_device())
    with progress(f"{work.label}: encoding", len(source), "chunks") as advance:
        np.save(build.out / FILE, encode(known, source, advance), allow_pickle=False)
