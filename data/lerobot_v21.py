"""LeRobot v2.1 (and v2.0) on disk: one file per episode. Read only.

```
meta/info.json                                   as in v3.0, other path templates
meta/tasks.jsonl                                 {"task_index": 0, "task": "pick the cube up"}
meta/episodes.jsonl                              {"episode_index": 0, "tasks": [...], "length": 120}
data/chunk-000/episode_000000.parquet            one row per frame; pictures as PNG or JPEG bytes, or
videos/chunk-000/<feature>/episode_000000.mp4    as a video
```
"""

from pathlib import Path
from typing import Any

import polars as pl

from data.lerobot_format import Info, Meta, check_meta
from data.untrusted import RESTORE, fault, member, parse_json

EPISODES = "meta/episodes.jsonl"
TASKS = "meta/tasks.jsonl"


def read_meta(root: Path, info: Info) -> Meta:
    """What `meta/` of a v2.1 dataset says, checked for agreement within itself."""
    index, length = _integers(root, EPISODES, "episode_index"), _integers(root, EPISODES, "length")
    columns: dict[str, Any] = {
        "episode_index": pl.Series(index, dtype=pl.Int64),
        "length": pl.Series(length, dtype=pl.Int64),
        "data_file": _files(root, info, info.data_path, index),
    }
    for key in (k for k, f in info.features.items() if f.dtype == "video"):
        columns[f"file/{key}"] = _files(root, info, info.video_path or "", index, video_key=key)
        columns[f"start/{key}"] = pl.zeros(len(index), pl.Int64, eager=True)
    tasks = dict(zip(_integers(root, TASKS, "task_index"), _column(root, TASKS, "task"), strict=True))
    if not all(isinstance(task, str) for task in tasks.values()):
        raise fault(root, TASKS, "holds a task that is no text", RESTORE)
    return check_meta(Meta(root=root, info=info, tasks=tasks, episodes=pl.DataFrame(columns), stats=None), EPISODES)


def _column(root: Path, file: str, key: str) -> list[Any]:
    rows = [parse_json(root, file, line, nan=True) for line in member(root, file).read_bytes().splitlines() if line]
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or key not in row:
            raise fault(root, file, f"line {number + 1} has no '{key}'", RESTORE)
    return [row[key] for row in rows]


def _integers(root: Path, file: str, key: str) -> list[int]:
    values = _column(root, file, key)
    for number, value in enumerate(values):
        if type(value) is not int or not 0 <= value <= 10**9:
            raise fault(root, file, f"line {number + 1}: '{key}' is {str(value)[:20]!r}", RESTORE)
    if key.endswith("index") and len(set(values)) != len(values):
        raise fault(root, file, f"'{key}' repeats", RESTORE)
    return values


def _files(root: Path, info: Info, template: str, episodes: list[int], **key: str) -> list[str]:
    try:
        return [template.format(episode_chunk=i // info.chunks_size, episode_index=i, **key) for i in episodes]
    except KeyError as error:
        raise fault(root, "meta/info.json", f"path '{template}': no {error} in v2.1", "use LeRobot's own") from None
