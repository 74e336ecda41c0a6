"""LeRobot datasets in and out: `write_episodes` makes v3.0, `open_dataset` reads v3.0 and v2.1 under our names.

The files of the family: `lerobot_format` (info.json, names), `lerobot_v3` and `lerobot_v21` (the two layouts),
`lerobot_rows`, `lerobot_writer`, `lerobot_stats`, `video`. `validate` is the gate that a dataset passes before
anything trains on it.
"""

import io
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8
from PIL import Image

from data import lerobot_v3, lerobot_v21
from data.episode import Episode
from data.lerobot_format import FLYWHEEL, INFO, ROLLOUTS, Meta, load_info
from data.lerobot_rows import read_rows
from data.lerobot_writer import write_episodes
from data.schema import ACTION, REWARD, STATE, SUBGOAL, SUCCESS, TERMINATED, TRUNCATED, Component, Schema
from data.untrusted import RESTORE, fault, load_json, member, read_frame
from data.video import DECODE_ERRORS, decode, in_words

__all__ = ["Dataset", "load_meta", "open_dataset", "write_episodes"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset on disk. Opening reads only `meta/`; the rest is read when first asked for."""

    meta: Meta
    schema: Schema
    subgoals: tuple[str, ...] | None  # predicates it must have a column for; None when the dataset does not say

    @property
    def path(self) -> Path:
        return self.meta.root

    @property
    def fps(self) -> int:
        return self.meta.info.fps

    @cached_property
    def episodes(self) -> pl.DataFrame:
        """episode_index, start (row in `steps`), length."""
        length = pl.col("length")
        return self.meta.episodes.select("episode_index", start=length.cum_sum() - length, length=length)

    @cached_property
    def steps(self) -> pl.DataFrame:
        """Every recorded column but the pictures, one row per frame in order, under our names.

        `episode_index`, `frame_index`, `timestamp` (s), `task` (text), `observation.state` and `action` as fixed-size
        float32 arrays, and whichever of the reward, success, end and sub-goal columns the dataset has.
        """
        return read_rows(self.meta).drop("index", "task_index")

    @cached_property
    def rollouts(self) -> pl.DataFrame | None:
        """One row per episode: scene, seed, policy_digest, randomization and subgoals_at_reset (JSON), success, length.

        None for a dataset that was not recorded here.
        """
        if not (self.path / ROLLOUTS).exists():
            return None
        return read_frame(self.path, ROLLOUTS, rows=len(self.episodes))

    @cached_property
    def at_reset(self) -> pl.DataFrame:
        """`episode_index` and each `subgoal.*` column as it was before the first action, one row per episode.

        Null where nobody said: a sub-goal that the episode's scene does not have, a dataset not recorded here.
        """
        names = [c for c in self.steps.columns if c.startswith(SUBGOAL)]
        said = [json.loads(r) for r in self.rollouts["subgoals_at_reset"]] if self.rollouts is not None else []
        said = said or [{}] * len(self.episodes)
        columns = [pl.Series(n, [e.get(n.removeprefix(SUBGOAL)) for e in said], dtype=pl.Boolean) for n in names]
        return self.episodes.select("episode_index").with_columns(columns)

    def decode(self, camera: str, episode: int) -> UInt8[np.ndarray, "l height width 3"]:
        """All pictures of one camera in one episode."""
        key, row = self.meta.cameras[camera], self.meta.episodes.row(episode, named=True)
        if self.meta.info.features[key].dtype == "image":
            return _stored_images(self.meta, key, row)
        file = row[f"file/{key}"]
        path = member(self.path, file)
        try:
            return decode(path, start=row[f"start/{key}"], length=row["length"], fps=self.fps)
        except DECODE_ERRORS as error:
            raise fault(self.path, file, f"episode {episode}: {in_words(error)}", RESTORE) from None

    def read_episode(self, episode: int, *, images: bool = True) -> Episode:
        """One episode as it was recorded, pictures as the video gives them back. Only for datasets recorded here."""
        if self.rollouts is None:
            raise fault(self.path, ROLLOUTS, "is missing", "use `steps`: this dataset says nothing about its rollouts")
        rollout = self.rollouts.row(episode, named=True)
        at_reset = json.loads(rollout["subgoals_at_reset"])
        _, start, length = self.episodes.row(episode)
        steps = self.steps[start : start + length]
        return Episode(
            scene=rollout["scene"],
            seed=rollout["seed"],
            task=steps["task"][0],
            policy_digest=rollout["policy_digest"],
            randomization=json.loads(rollout["randomization"]),
            images={c: self.decode(c, episode) for c in self.schema.cameras} if images else {},
            state=steps[STATE].to_numpy(),
            action=steps[ACTION].to_numpy(),
            reward=steps[REWARD].to_numpy(),
            success=steps[SUCCESS].to_numpy(),
            terminated=steps[TERMINATED].to_numpy(),
            truncated=steps[TRUNCATED].to_numpy(),
            subgoals={name: steps[SUBGOAL + name].to_numpy() for name in at_reset},
            subgoals_at_reset=at_reset,
        )


def load_meta(path: Path) -> Meta:
    info = load_info(path)
    return (lerobot_v3 if info.codebase_version == "v3.0" else lerobot_v21).read_meta(path, info)


def open_dataset(path: Path) -> Dataset:
    """The dataset in folder `path`. Raises `BadInput` when `meta/` is not in order; see `validate` for the rest."""
    meta = load_meta(path)
    stored = _stored_schema(meta)
    if not (path / FLYWHEEL).exists():
        return Dataset(meta=meta, schema=stored, subgoals=None)
    sidecar = load_json(path, FLYWHEEL)
    try:
        if sidecar["format"] != 1:
            raise fault(path, FLYWHEEL, f"format is {sidecar['format']!r}", "read it with the version that wrote it")
        schema, subgoals = Schema.from_json(sidecar["schema"]), tuple(map(str, sidecar["subgoals"]))
    except (KeyError, TypeError, AttributeError):
        raise fault(path, FLYWHEEL, "is not a schema with sub-goals", RESTORE) from None
    for field in ("cameras", "image_size", "fps") if stored.cameras else ("cameras", "fps"):
        ours, theirs = getattr(schema, field), getattr(stored, field)
        if (set(ours) != set(theirs)) if field == "cameras" else (ours != theirs):
            raise fault(path, FLYWHEEL, f"{field} is {ours}, but info.json says {theirs}", "restore both as recorded")
    for field in ("state", "action"):
        if len(getattr(schema, field)) != len(getattr(stored, field)):
            raise fault(path, FLYWHEEL, f"{field} has another width than in info.json", RESTORE)
    return Dataset(meta=meta, schema=schema, subgoals=subgoals)


def _stored_schema(meta: Meta) -> Schema:
    """What `info.json` alone says: names and shapes, but neither units nor the control mode."""
    features, info, vectors = meta.info.features, meta.info, meta.vectors
    sizes = {camera: features[key].height_width for camera, key in meta.cameras.items()}
    if len(set(sizes.values())) > 1:
        what = f"cameras differ in size: {', '.join(f'{c} {h}x{w}' for c, (h, w) in sizes.items())}"
        raise fault(meta.root, INFO, what, "record them alike, or drop one")

    def components(name: str) -> tuple[Component, ...]:
        feature = vectors.get(name)
        return tuple(Component(name=n, unit="?") for n in feature.component_names) if feature else ()

    def in_parts() -> tuple[Component, ...]:
        return tuple(replace(c, name=f"{part}.{c.name}") for part in meta.state_parts for c in components(part))

    return Schema(
        cameras=tuple(meta.cameras),
        image_size=next(iter(sizes.values()), (0, 0)),
        state=components(STATE) or in_parts(),
        action=components(ACTION),
        fps=info.fps,
        control_mode="?",
        gripper="?",
        orientation="?",
    )


# ---------------------------------------------------------------- pictures inside the parquet


def _stored_images(meta: Meta, key: str, row: dict[str, Any]) -> UInt8[np.ndarray, "l height width 3"]:
    file, episode, (height, width) = row["data_file"], row["episode_index"], meta.info.features[key].height_width
    images = np.empty((row["length"], height, width, 3), np.uint8)
    path = member(meta.root, file)
    try:
        table = pq.read_table(path, columns=[key], filters=[("episode_index", "=", episode)])
        stored = table[key].combine_chunks().field("bytes").to_pylist()
        for i, data in zip(range(len(images)), stored, strict=True):
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
                if image.size != (width, height):
                    raise ValueError(f"picture {i} is {image.height}x{image.width}, not {height}x{width}")
                images[i] = np.asarray(image.convert("RGB"))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise fault(meta.root, file, f"{key}: episode {episode}: {in_words(error)}", RESTORE) from None
    return images
