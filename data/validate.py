"""The gate: what is wrong with a dataset, in one line, before anything trains on it.

`open_dataset` already refuses what cannot be read under the format's own rules (`meta/`, types, shapes, nulls). Here
are the faults that read well, and that LeRobot 0.6.1 trains on without a word: rows out of order, NaN, a wrong clock,
stale statistics, a video of another length. Cheap checks come first; nothing is opened that `meta/` does not name.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl

from data import lerobot_v3
from data.errors import BadInput
from data.lerobot import Dataset, open_dataset
from data.lerobot_format import FLYWHEEL, INFO, ROLLOUTS, canonical, first
from data.lerobot_rows import read_rows
from data.lerobot_stats import column_stats
from data.schema import ACTION, REWARD, STATE, SUBGOAL, SUCCESS, TERMINATED, TRUNCATED
from data.untrusted import RESTORE, fault, member
from data.video import DECODE_ERRORS, VideoIndex, decode, in_words, index

CLOCK_TOLERANCE = 1e-3  # s, between a time stamp and frame_index / fps; LeRobot itself allows 1e-4 between frames
ABSURD = 1e8  # no joint, pose, encoder count or reward is this large
BLANK = 4  # grey levels; a picture with less between its darkest and brightest pixel shows nothing


def check_dataset(path: Path) -> None:
    """Raise `BadInput`, naming file, column, episode and remedy, unless the dataset in folder `path` is sound."""
    dataset = open_dataset(path)
    _refuse_orphans(dataset)
    rows = read_rows(dataset.meta)
    _check_order(dataset, rows)
    _check_values(dataset, rows)
    _check_stats(dataset, rows)
    _check_rollouts(dataset, rows)
    _check_cameras(dataset)


def _refuse_orphans(dataset: Dataset) -> None:
    """LeRobot reads every parquet file below data/, also one that a crashed recording left behind."""
    known = set(dataset.meta.episodes["data_file"])
    for found in sorted((dataset.path / "data").rglob("*.parquet")):
        if (file := found.relative_to(dataset.path).as_posix()) not in known:
            raise fault(dataset.path, file, "belongs to no episode of meta/", "delete it, or restore meta/")


def _where(dataset: Dataset, row: int) -> tuple[str, str]:
    """The file that holds a row of the whole table, and its episode and frame in words."""
    starts = dataset.episodes["start"].to_numpy()
    episode = int(np.searchsorted(starts, row, side="right")) - 1
    return dataset.meta.episodes["data_file"][episode], f"episode {episode} frame {row - starts[episode]}"


def _check_order(dataset: Dataset, rows: pl.DataFrame) -> None:
    length = dataset.episodes["length"].to_numpy()
    frame = np.arange(len(rows)) - np.repeat(dataset.episodes["start"].to_numpy(), length)
    expected = {"episode_index": np.repeat(np.arange(len(length)), length), "frame_index": frame}
    expected["index"] = np.arange(len(rows))
    for name, right in expected.items():
        if (row := first(rows[name].to_numpy() != right)) is not None:
            file, where = _where(dataset, row)
            what = f"{name}: {where}: is {rows[name][row]}, should be {right[row]}"
            raise fault(dataset.path, file, what, "restore the rows' order, without gaps or repeats")
    clock = np.abs(rows["timestamp"].to_numpy() - frame / dataset.fps)
    if (row := first(~(clock <= CLOCK_TOLERANCE + 1e-6 * frame))) is not None:
        file, where = _where(dataset, row)
        what = f"timestamp: {where}: is {rows['timestamp'][row]:.4f} s, by fps {frame[row] / dataset.fps:.4f} s"
        raise fault(dataset.path, file, what, "mend fps in meta/info.json, or the time stamps")


def _check_values(dataset: Dataset, rows: pl.DataFrame) -> None:
    for name, kind in rows.schema.items():
        if not (kind.base_type() == pl.Array or kind.is_float()):
            continue
        values = rows[name].to_numpy().reshape(len(rows), -1)
        bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
        if name in (STATE, ACTION, REWARD):
            bad |= np.abs(values) > ABSURD
        if (row := first(bad.any(1))) is not None:
            file, where = _where(dataset, row)
            column = int(bad[row].argmax())
            what = f"{name}: {where}: component {column} is {values[row, column]}"
            raise fault(dataset.path, file, what, "drop or mend the episode")


def _check_stats(dataset: Dataset, rows: pl.DataFrame) -> None:
    stats, file = dataset.meta.stats, lerobot_v3.STATS
    if stats is None:  # v2.1 keeps none for the whole dataset
        return
    remedy = "recompute the statistics"
    recomputed = column_stats({n: rows[n].to_numpy() for n in (STATE, ACTION) if n in rows.columns})
    for key, feature in dataset.meta.info.features.items():
        if feature.dtype == "string":
            continue
        # Of a feature with several axes LeRobot keeps the last one only.
        widths = (3,) if feature.visual else (feature.shape[-1], int(np.prod(feature.shape)))
        of_key = stats.get(key) if isinstance(stats, dict) else None
        if not isinstance(of_key, dict):
            raise fault(dataset.path, file, f"{key}: has no statistics", remedy)
        right = recomputed.get(canonical(key, visual=feature.visual))
        for name in ("min", "max", "mean", "std"):
            try:
                values = np.asarray(of_key[name], np.float64).ravel()
            except (KeyError, TypeError, ValueError):
                raise fault(dataset.path, file, f"{key}: {name} is missing or not numeric", remedy) from None
            if values.size not in widths or not np.isfinite(values).all():
                raise fault(dataset.path, file, f"{key}: {name} is not {widths[0]} finite numbers", remedy)
            if right and (column := first(np.abs(values - right[name]) > _slack(name, right))) is not None:
                says = f"{values[column]:.4g}, the rows say {right[name][column]:.4g}"
                what = f"{key}: {name} of component {column} is {says}"
                raise fault(dataset.path, file, what, remedy)


def _slack(name: str, right: dict[str, list]) -> np.ndarray:
    """How far a statistic may be off: extremes hardly, moments by what float32 sums over episodes lose."""
    low, high = np.array(right["min"]), np.array(right["max"])
    share = 1e-4 if name in ("min", "max") else 0.02
    return share * (high - low) + 1e-4 * np.maximum(abs(low), abs(high)) + 1e-6


def _check_rollouts(dataset: Dataset, rows: pl.DataFrame) -> None:
    """What a dataset recorded here must hold besides: an outcome per frame and the sidecar's row per episode."""
    if dataset.subgoals is None:
        return
    for name in (STATE, REWARD, SUCCESS, TERMINATED, TRUNCATED, *(SUBGOAL + s for s in dataset.subgoals)):
        if name not in rows.columns:
            raise fault(dataset.path, INFO, f"declares no feature '{name}', but {FLYWHEEL} promises it", RESTORE)
    rollouts, (start, length) = dataset.rollouts, (dataset.episodes[c].to_numpy() for c in ("start", "length"))
    if rollouts is None:
        raise fault(dataset.path, ROLLOUTS, "is missing", RESTORE)
    kinds = {"episode_index": pl.Int64, "scene": pl.String, "seed": pl.Int64, "policy_digest": pl.String}
    kinds |= {"randomization": pl.String, "subgoals_at_reset": pl.String, "success": pl.Boolean, "length": pl.Int64}
    if wrong := [n for n, kind in kinds.items() if rollouts.schema.get(n) != kind or rollouts[n].null_count()]:
        raise fault(dataset.path, ROLLOUTS, f"column '{wrong[0]}' is missing, null or no {kinds[wrong[0]]}", RESTORE)
    right = {"episode_index": np.arange(len(length)), "length": length}
    right["success"] = np.logical_or.reduceat(rows[SUCCESS].to_numpy(), start)
    for name, values in right.items():
        if (episode := first(rollouts[name].to_numpy() != values)) is not None:
            what = f"{name}: episode {episode} is {rollouts[name][episode]}, its rows say {values[episode]}"
            raise fault(dataset.path, ROLLOUTS, what, RESTORE)
    for episode, (drawn, at_reset) in enumerate(rollouts.select("randomization", "subgoals_at_reset").iter_rows()):
        if not _is_object(drawn) or not _is_object(at_reset) or not set(json.loads(at_reset)) <= set(dataset.subgoals):
            raise fault(dataset.path, ROLLOUTS, f"episode {episode}: its JSON is not as recorded", RESTORE)
    over = (rows[TERMINATED] | rows[TRUNCATED]).to_numpy().copy()
    over[start + length - 1] = False
    if (row := first(over)) is not None:
        file, where = _where(dataset, row)
        raise fault(dataset.path, file, f"terminated/truncated: {where}: ends before its last row", RESTORE)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


# ---------------------------------------------------------------- pictures


def _check_cameras(dataset: Dataset) -> None:
    """Lengths, times and sizes of every video from its packets; pictures only from its two ends."""
    for camera, key in dataset.meta.cameras.items():
        if dataset.meta.info.features[key].dtype == "video":
            for (file,), episodes in dataset.meta.episodes.group_by(f"file/{key}", maintain_order=True):
                _check_video(dataset, key, str(file), episodes)
        else:
            for episode in sorted({0, len(dataset.episodes) - 1}):
                dataset.decode(camera, episode)


def _check_video(dataset: Dataset, key: str, file: str, episodes: pl.DataFrame) -> None:
    path = member(dataset.path, file)
    try:
        video = index(path)
        _check_index(dataset, key, file, video, episodes)
        ends = [decode(path, start=i, length=1, fps=dataset.fps)[0] for i in (0, len(video.times) - 1)]
    except BadInput:
        raise
    except DECODE_ERRORS as error:
        raise fault(dataset.path, file, f"is not a whole video (truncated?): {in_words(error)}", RESTORE) from None
    if all(int(end.max()) - int(end.min()) < BLANK for end in ends):
        raise fault(dataset.path, file, "its first and last picture are blank", "record the camera again")


def _check_index(dataset: Dataset, key: str, file: str, video: VideoIndex, episodes: pl.DataFrame) -> None:
    """Size, clock and number of pictures, and that each episode has its own stretch of them."""
    height, width = dataset.meta.info.features[key].height_width
    if (video.height, video.width) != (height, width):
        what = f"pictures are {video.height}x{video.width}, info.json says {height}x{width}"
        raise fault(dataset.path, file, what, RESTORE)
    if abs(video.fps - dataset.fps) > 0.01 * dataset.fps:
        raise fault(dataset.path, file, f"plays at {video.fps:g} fps, info.json says {dataset.fps}", RESTORE)
    clock = np.abs(video.times - np.arange(len(video.times)) / dataset.fps)
    if (frame := first(clock > 0.25 / dataset.fps)) is not None:
        raise fault(dataset.path, file, f"frame {frame} is shown at {video.times[frame]:.4f} s", RESTORE)
    taken = 0
    for episode, start, length in episodes.select("episode_index", f"start/{key}", "length").iter_rows():
        if start < taken:
            what = f"episode {episode} begins at frame {start}, inside the one before it"
            raise fault(dataset.path, file, what, "restore from_timestamp in meta/episodes")
        if (taken := start + length) > len(video.times):
            what = f"episode {episode} needs {taken} frames, the video has {len(video.times)}"
            raise fault(dataset.path, file, what, RESTORE)
    if dataset.meta.info.codebase_version != "v3.0" and taken != len(video.times):
        what = f"episode {episodes['episode_index'][0]} has {taken} rows, its video {len(video.times)} frames"
        raise fault(dataset.path, file, what, RESTORE)
