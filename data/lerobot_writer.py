"""Writes one batch of episodes as a finished LeRobot v3.0 dataset (the layout is drawn in `data.lerobot_v3`).

The writer is ours and not LeRobot's: theirs takes 11 CPU-seconds to import, encodes 24 frames/s, and orders its JSON by
a set, so that no two runs make the same bytes. The tests hold what this one writes against LeRobot's own reader.
"""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.episode import Episode
from data.lerobot_format import FLYWHEEL, INFO, ROLLOUTS
from data.lerobot_stats import color_histogram, column_stats, image_stats
from data.lerobot_v3 import DATA_PATH, EPISODES, STATS, TASKS, VIDEO_PATH
from data.schema import ACTION, IMAGE, REWARD, STATE, SUBGOAL, SUCCESS, TERMINATED, TRUNCATED, Schema
from data.video import CRF, GOP, PIXELS, PRESET, VideoWriter

FIRST = {"chunk_index": 0, "file_index": 0}


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """What is left of an episode once its pictures are in the video."""

    episode: dict[str, Any]  # its row of rollouts.parquet
    task: str
    columns: dict[str, np.ndarray]  # (l,) or (l, width)
    histograms: dict[str, np.ndarray]  # camera -> (3, 256)

    def __len__(self) -> int:
        return self.episode["length"]


def write_episodes(episodes: Iterable[Episode], schema: Schema, out: Path) -> None:
    """Write one finished dataset into the empty folder `out`; the same episodes make the same bytes.

    Pictures are encoded as the episodes come, so one episode is in memory at a time. All frames of a camera go into one
    file: this is for batches of episodes, not for terabytes. Raises ValueError for an episode that is not of `schema`.
    """
    if any(out.iterdir()):
        raise ValueError(f"{out} is not empty; a dataset is never appended to")
    with ExitStack() as stack:
        videos = {
            camera: stack.enter_context(VideoWriter(_video(out, camera), size=schema.image_size, fps=schema.fps))
            for camera in schema.cameras
        }
        recorded = [_record(i, episode, schema, videos) for i, episode in enumerate(episodes)]
    if not recorded:
        raise ValueError("no episodes to write")
    tasks = list(dict.fromkeys(r.task for r in recorded))
    subgoals = sorted({name for r in recorded for name in r.columns if name.startswith(SUBGOAL)})
    tables = _complete(recorded, tasks, subgoals)
    _write_rows(tables, out / DATA_PATH.format(**FIRST))
    _write_meta(recorded, tables, tasks, schema, out)
    _write_json(out / FLYWHEEL, {"format": 1, "schema": schema.to_json(), "subgoals": _bare(subgoals)})
    _write_parquet(pa.Table.from_pylist([r.episode for r in recorded]), out / ROLLOUTS)


def _video(out: Path, camera: str) -> Path:
    return out / VIDEO_PATH.format(video_key=IMAGE + camera, **FIRST)


def _record(number: int, episode: Episode, schema: Schema, videos: dict[str, VideoWriter]) -> _Recorded:
    _refuse_misfit(number, episode, schema)
    for camera, video in videos.items():
        video.write(episode.images[camera])
    frame = np.arange(len(episode))
    columns = {
        STATE: episode.state,
        ACTION: episode.action,
        REWARD: episode.reward,
        SUCCESS: episode.success,
        TERMINATED: episode.terminated,
        TRUNCATED: episode.truncated,
        **{SUBGOAL + name: reached for name, reached in episode.subgoals.items()},
        "timestamp": (frame / schema.fps).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(len(episode), number),
    }
    rollout = {
        "episode_index": number,
        "scene": episode.scene,
        "seed": episode.seed,
        "policy_digest": episode.policy_digest,
        "randomization": json.dumps(episode.randomization, sort_keys=True),
        "subgoals_at_reset": json.dumps(episode.subgoals_at_reset, sort_keys=True),
        "success": episode.succeeded,
        "length": len(episode),
    }
    histograms = {camera: color_histogram(episode.images[camera]) for camera in schema.cameras}
    return _Recorded(episode=rollout, task=episode.task, columns=columns, histograms=histograms)


def _refuse_misfit(number: int, episode: Episode, schema: Schema) -> None:
    """A fault of the recording program, not of its user: hence ValueError."""
    n, size = len(episode), schema.image_size
    expected: dict[str, tuple[int, ...]] = {"state": (n, len(schema.state)), "action": (n, len(schema.action))}
    expected |= {f"images[{c}]": (n, *size, 3) for c in schema.cameras}
    arrays = {"state": episode.state, "action": episode.action}
    arrays |= {f"images[{c}]": images for c, images in episode.images.items()}
    for name in ("reward", "success", "terminated", "truncated"):
        arrays[name], expected[name] = getattr(episode, name), (n,)
    found = {name: array.shape for name, array in arrays.items()}
    if found != expected or n == 0:
        raise ValueError(f"episode {number}: shapes are {found}, the schema wants {expected}")


def _complete(recorded: list[_Recorded], tasks: list[str], subgoals: list[str]) -> list[dict[str, np.ndarray]]:
    """The same columns for every episode: a sub-goal that its scene does not have is False throughout."""
    tables, start = [], 0
    for r in recorded:
        head = {k: v for k, v in r.columns.items() if not k.startswith(SUBGOAL)}
        keys = {name: head.pop(name) for name in ("timestamp", "frame_index", "episode_index")}
        reached = {name: r.columns.get(name, np.zeros(len(r), bool)) for name in subgoals}
        index = {"index": np.arange(start, start + len(r)), "task_index": np.full(len(r), tasks.index(r.task))}
        tables.append(head | reached | keys | index)
        start += len(r)
    return tables


def _write_rows(tables: list[dict[str, np.ndarray]], path: Path) -> None:
    rows = [pa.table({name: _arrow(values) for name, values in table.items()}) for table in tables]
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, rows[0].schema, write_page_checksum=True) as writer:
        for table in rows:
            writer.write_table(table)


def _arrow(values: np.ndarray) -> pa.Array:
    flat = pa.array(values.ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim == 2 else flat


def _write_meta(
    recorded: list[_Recorded], tables: list[dict[str, np.ndarray]], tasks: list[str], schema: Schema, out: Path
) -> None:
    features = _features(schema, tables[0])
    info = {
        "codebase_version": "v3.0",
        "fps": schema.fps,
        "features": features,
        "total_episodes": len(recorded),
        "total_frames": sum(map(len, recorded)),
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if schema.cameras else None,
        "robot_type": None,
        "splits": {"train": f"0:{len(recorded)}"},
    }
    whole = {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}
    pictures = {c: np.sum([r.histograms[c] for r in recorded], axis=0) for c in schema.cameras}
    _write_json(out / INFO, info)
    _write_json(out / STATS, _stats(whole, pictures, schema))
    _write_parquet(_task_table(tasks), out / TASKS)
    rows, start = [], 0
    for r, table in zip(recorded, tables, strict=True):
        rows.append(_episode_row(r, table, start, schema))
        start += len(r)
    _write_parquet(pa.Table.from_pylist(rows), out / EPISODES / "chunk-000/file-000.parquet")


def _stats(columns: dict[str, np.ndarray], histograms: dict[str, np.ndarray], schema: Schema) -> dict[str, dict]:
    height, width = schema.image_size
    pictures = {IMAGE + c: image_stats(h, int(h[0].sum()) // (height * width)) for c, h in histograms.items()}
    return pictures | column_stats(columns)


def _episode_row(r: _Recorded, table: dict[str, np.ndarray], start: int, schema: Schema) -> dict[str, Any]:
    row = {"episode_index": r.episode["episode_index"], "tasks": [r.task], "length": len(r)}
    row |= {f"data/{k}": v for k, v in FIRST.items()}
    row |= {"dataset_from_index": start, "dataset_to_index": start + len(r)}
    for camera in schema.cameras:
        times = {"from_timestamp": start / schema.fps, "to_timestamp": (start + len(r)) / schema.fps}
        row |= {f"videos/{IMAGE}{camera}/{k}": v for k, v in (FIRST | times).items()}
    row |= {
        f"stats/{name}/{stat}": value
        for name, stats in _stats(table, r.histograms, schema).items()
        for stat, value in stats.items()
    }
    return row | {f"meta/episodes/{k}": v for k, v in FIRST.items()}


def _features(schema: Schema, table: dict[str, np.ndarray]) -> dict[str, dict]:
    height, width = schema.image_size
    video = {"codec": "h264", "pix_fmt": PIXELS, "fps": schema.fps, "height": height, "width": width, "channels": 3}
    encoder = {"g": GOP, "crf": CRF, "preset": PRESET, "fast_decode": 0, "video_backend": "pyav", "extra_options": {}}
    about = {f"video.{k}": v for k, v in (video | encoder).items()} | {"has_audio": False, "is_depth_map": False}
    names = {STATE: [c.name for c in schema.state], ACTION: [c.name for c in schema.action]}
    pictures = {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channels"], "info": about}
    return {IMAGE + camera: pictures for camera in schema.cameras} | {
        name: {"dtype": str(values.dtype), "shape": list(values.shape[1:]) or [1], "names": names.get(name)}
        for name, values in table.items()
    }


def _bare(subgoals: list[str]) -> list[str]:
    return [name.removeprefix(SUBGOAL) for name in subgoals]


def _task_table(tasks: list[str]) -> pa.Table:
    """`task_index` with the instruction as pandas' index, which is how LeRobot looks it up; written without pandas."""
    table = pa.table({"task_index": range(len(tasks)), "task": tasks})
    column = {"metadata": None, "pandas_type": "int64", "numpy_type": "int64"}
    index = {"metadata": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, **index, "metadata": {"encoding": "UTF-8"}}],
        "columns": [{"name": n, "field_name": n, **about} for n, about in (("task_index", column), ("task", index))],
        "pandas_version": "2.2.3",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _write_parquet(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, write_page_checksum=True)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4, ensure_ascii=False, allow_nan=False), encoding="utf-8")
