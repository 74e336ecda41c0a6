"""The frame store: one collection's pictures and vectors as flat arrays that training maps into memory.

```
 frames_<camera>.npy   uint8    [n, height, width, 3]     row i of every file is row i of the dataset's steps,
 state.npy             float32  [n, s]                    which is what `start` and `next` of a chunk table count
 action.npy            float32  [n, a]
 rows.parquet          episode_index, frame_index, task   n rows
 frames.json           schema of what lies here
```
Training never decodes video: a gather from here is a copy, 160 times cheaper. The LeRobot dataset stays the source of
truth; this is made from it once, byte for byte the same each time.
"""

import errno
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from data.errors import BadInput
from data.schema import ACTION, STATE, Schema

FORMAT = 1  # of the folder's layout; a reader refuses another


class Recorded(Protocol):
    """The part of `data.lerobot.Dataset` that a frame store is made from. Its tables are asked for again and again."""

    @property
    def path(self) -> Path: ...

    @property
    def schema(self) -> Schema: ...

    @cached_property
    def episodes(self) -> pl.DataFrame:
        """episode_index, start, length; in the order of `steps`."""
        ...

    @cached_property
    def steps(self) -> pl.DataFrame:
        """episode_index, frame_index, task, observation.state, action; one row per frame."""
        ...

    def decode(self, camera: str, episode: int) -> UInt8[np.ndarray, "l height width 3"]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """An opened frame store. `images` are mapped, not read: a row costs memory when it is touched."""

    path: Path
    schema: Schema
    images: dict[str, UInt8[np.ndarray, "n height width 3"]]  # camera -> pictures seen before the row's action
    state: Float32[np.ndarray, "n s"]
    action: Float32[np.ndarray, "n a"]  # as executed
    rows: pl.DataFrame  # episode_index, frame_index, task

    def __len__(self) -> int:
        return len(self.rows)


def build_frames(dataset: Recorded, out: Path, size: tuple[int, int] | None = None) -> None:
    """Decode every camera of `dataset` once into the empty folder `out`, one episode in memory at a time.

    size: height, width to scale the pictures to, black bars keeping their shape; None leaves them as recorded.
    """
    for column in (STATE, ACTION):
        if column not in dataset.steps.columns:
            raise BadInput(f"{dataset.path}: {column}: column is missing; record it, training reads it at every step")
    schema = replace(dataset.schema, image_size=size or dataset.schema.image_size)
    for camera in schema.cameras:
        shape = (len(dataset.steps), *schema.image_size, 3)
        _write_pictures(out / _pictures(camera), shape, _decoded(dataset, camera, size))
    np.save(out / "state.npy", dataset.steps[STATE].to_numpy(), allow_pickle=False)
    np.save(out / "action.npy", dataset.steps[ACTION].to_numpy(), allow_pickle=False)
    dataset.steps.select("episode_index", "frame_index", "task").write_parquet(out / "rows.parquet")
    content = {"format": FORMAT, "schema": schema.to_json()}
    (out / "frames.json").write_text(json.dumps(content, indent=1, sort_keys=True))


def open_frames(path: Path) -> Frames:
    """The frame store in folder `path`. Raises `BadInput` when files are missing or disagree.

    Whether the bytes are those that were written is for `data.store` to say, which hashes them.
    """
    try:
        content = json.loads((path / "frames.json").read_text())
        if content["format"] != FORMAT:
            raise BadInput(
                f"{path}/frames.json: format is {content['format']}, this version reads {FORMAT}; rebuild it"
            )
        schema = Schema.from_json(content["schema"])
        rows = pl.read_parquet(path / "rows.parquet")
    except (OSError, KeyError, TypeError, json.JSONDecodeError, pl.exceptions.PolarsError) as fault:
        raise BadInput(f"{path}: no frame store ({type(fault).__name__}); build it again") from fault
    n = len(rows)
    return Frames(
        path=path,
        schema=schema,
        images={c: _mapped(path / _pictures(c), np.uint8, (n, *schema.image_size, 3)) for c in schema.cameras},
        state=_mapped(path / "state.npy", np.float32, (n, len(schema.state))),
        action=_mapped(path / "action.npy", np.float32, (n, len(schema.action))),
        rows=rows,
    )


def _pictures(camera: str) -> str:
    return f"frames_{camera}.npy"


def _decoded(dataset: Recorded, camera: str, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    for episode, length in dataset.episodes.select("episode_index", "length").iter_rows():
        images = dataset.decode(camera, episode)
        if len(images) != length:
            raise BadInput(f"{dataset.path}: {camera}: episode {episode} has {len(images)} pictures and {length} rows")
        yield images if size is None else _scaled(images, size)


def _scaled(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow scales in whole numbers, so that every machine gets the same bytes."""
    height, width = size
    scaled = (ImageOps.pad(Image.fromarray(i), (width, height), Image.Resampling.BILINEAR) for i in images)
    return np.stack([np.asarray(i) for i in scaled])


def _write_pictures(path: Path, shape: tuple[int, ...], episodes: Iterator[np.ndarray]) -> None:
    """A .npy file, written front to back: on a full disk that is an error, where a write into a map is a SIGBUS."""
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for images in episodes:
            file.write(np.ascontiguousarray(images).data)


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(_map(path))  # a plain array over the map: np.memmap costs a microsecond per access
    except (OSError, ValueError) as fault:
        raise BadInput(f"{path}: missing or damaged; build the frame store again") from fault
    if array.dtype != dtype or array.shape != shape:
        raise BadInput(f"{path}: holds {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}; build it again")
    return array


def _map(path: Path) -> np.memmap:
    """Read-only. Each map holds a file open, and a year of nights has thousands: allow more when they run out."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as fault:
        if fault.errno != errno.EMFILE:
            raise
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        return np.load(path, mmap_mode="r", allow_pickle=False)
