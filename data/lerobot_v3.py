"""LeRobot v3.0 on disk: many episodes per file.

```
meta/info.json                               features, fps, totals, path templates
meta/stats.json  meta/tasks.parquet          statistics, task_index -> instruction
meta/episodes/chunk-000/file-000.parquet     one row per episode: length, where its rows and frames lie, statistics
data/chunk-000/file-000.parquet              one row per frame, one row group per episode
videos/<feature>/chunk-000/file-000.mp4      the frames of many episodes, end to end; an episode begins at a time stamp
meta/flywheel.json  meta/rollouts.parquet    ours: schema with units, sub-goals; scene, seed, policy of each episode
```
"""

from pathlib import Path

import polars as pl

from data.lerobot_format import Info, Meta, check_meta, first
from data.untrusted import RESTORE, fault, load_json, read_frame, read_table

STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def read_meta(root: Path, info: Info) -> Meta:
    """What `meta/` of a v3.0 dataset says, checked for agreement within itself."""
    table, file = _episode_table(root)
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    ends = ["dataset_from_index", "dataset_to_index"]
    videos = [k for k, f in info.features.items() if f.dtype == "video"]
    stamps = [f"videos/{key}/{part}" for key in videos for part in ("chunk_index", "file_index")]
    table = _whole(root, file, table, names + ends + stamps)
    columns = {
        "episode_index": table["episode_index"],
        "length": table["length"],
        "data_file": _files(root, file, info.data_path, table, "data"),
    }
    for key in videos:
        columns[f"file/{key}"] = _files(root, file, info.video_path or "", table, f"videos/{key}", video_key=key)
        columns[f"start/{key}"] = _starts(root, file, info, table, key)
    meta = Meta(
        root=root,
        info=info,
        tasks=_tasks(root),
        episodes=pl.DataFrame(columns),
        stats=load_json(root, STATS, nan=True),
    )
    check_meta(meta, file)
    start = table["length"].cum_sum() - table["length"]
    for name, expected in zip(ends, (start, start + table["length"]), strict=True):
        if (wrong := first(table[name] != expected)) is not None:
            what = f"episode {wrong}: {name} is {table[name][wrong]}, its rows say {expected[wrong]}"
            raise fault(root, file, what, RESTORE)
    return meta


def _episode_table(root: Path) -> tuple[pl.DataFrame, str]:
    """All of meta/episodes/, in order of file name as LeRobot reads it; and one file's name for messages."""
    files = sorted(p.relative_to(root).as_posix() for p in (root / EPISODES).glob("*/*.parquet"))
    if not files:
        raise fault(root, f"{EPISODES}/chunk-000/file-000.parquet", "is missing", RESTORE)
    tables = [read_frame(root, file) for file in files]
    keep = [c for c in tables[0].columns if not c.startswith("stats/")]
    try:
        return pl.concat([t.select(keep) for t in tables]), files[0]
    except pl.exceptions.PolarsError:
        raise fault(root, files[-1], f"has other columns than {files[0]}", RESTORE) from None


def _whole(root: Path, file: str, table: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """`table` with `names` as integers."""
    for name in names:
        if name not in table.columns:
            raise fault(root, file, f"column '{name}' is missing", RESTORE)
        if not table[name].dtype.is_integer() or table[name].null_count() or (table[name] < 0).any():
            raise fault(root, file, f"column '{name}' is not whole numbers from 0 on", RESTORE)
        if (table[name] > 10**9).any():
            raise fault(root, file, f"column '{name}' holds {table[name].max()}", RESTORE)
    return table.with_columns(pl.col(names).cast(pl.Int64))


def _files(root: Path, file: str, template: str, table: pl.DataFrame, prefix: str, **key: str) -> list[str]:
    chunks, files = table[f"{prefix}/chunk_index"], table[f"{prefix}/file_index"]
    try:
        return [template.format(chunk_index=c, file_index=f, **key) for c, f in zip(chunks, files, strict=True)]
    except KeyError as error:
        raise fault(root, "meta/info.json", f"path '{template}': no {error} in v3.0", "use LeRobot's own") from None


def _starts(root: Path, file: str, info: Info, table: pl.DataFrame, key: str) -> pl.Series:
    """The frame of its video file with which each episode begins."""
    name = f"videos/{key}/from_timestamp"
    if name not in table.columns or not table[name].dtype.is_numeric():
        raise fault(root, file, f"column '{name}' is missing or not numeric", RESTORE)
    frame = table[name].cast(pl.Float64) * info.fps
    whole = ((frame - frame.round()).abs() < 0.1) & (frame > -0.1) & (frame < 1e9)
    if (wrong := first(~whole.fill_null(False))) is not None:
        what = f"episode {wrong}: '{name}' is {table[name][wrong]}, between frames at {info.fps} fps"
        raise fault(root, file, what, RESTORE)
    return frame.round().cast(pl.Int64)


def _tasks(root: Path) -> dict[int, str]:
    table = read_table(root, TASKS)
    texts = next((c for c in ("task", "__index_level_0__") if c in table.column_names), None)
    if texts is None or "task_index" not in table.column_names:
        raise fault(root, TASKS, "has no columns 'task_index' and 'task'", RESTORE)
    numbers, tasks = table["task_index"].to_pylist(), table[texts].to_pylist()
    # LeRobot looks a task up by position, others by task_index: the two must be one.
    if numbers != list(range(len(numbers))) or len(set(tasks)) != len(tasks):
        raise fault(root, TASKS, f"task_index is {str(numbers)[:40]}", "number distinct tasks 0, 1, 2 ... in order")
    if not all(isinstance(task, str) for task in tasks):
        raise fault(root, TASKS, "holds a task that is no text", RESTORE)
    return dict(zip(numbers, tasks, strict=True))
