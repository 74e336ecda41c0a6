"""A LeRobot dataset's rows as one polars table: every column as `info.json` declares it, or a refusal that names it."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from data.lerobot_format import BOOKKEEPING, Feature, Meta, canonical, first
from data.schema import ACTION, REWARD, STATE, SUBGOAL, SUCCESS, TERMINATED, TRUNCATED
from data.untrusted import RESTORE, fault, read_table


def read_rows(meta: Meta) -> pl.DataFrame:
    """All columns but the pictures. Raises `BadInput` for a column that is missing, or of another type or shape."""
    rows = meta.episodes.group_by("data_file", maintain_order=True).agg(pl.col("length").sum())
    keys = {k: f for k, f in meta.info.features.items() if not f.visual}
    keys |= {
        k: Feature(dtype="float32" if k == "timestamp" else "int64", shape=[1]) for k in BOOKKEEPING if k not in keys
    }
    parts = []
    for file, length in rows.iter_rows():
        table = read_table(meta.root, file, rows=length, columns=list(keys))
        parts.append(pl.DataFrame([_column(meta.root, file, table[k], k, f) for k, f in keys.items()]))
    steps = pl.concat(parts)
    if meta.state_parts:
        state = np.concatenate([steps[part].to_numpy() for part in meta.state_parts], axis=1)
        steps = steps.with_columns(pl.Series(STATE, state.astype(np.float32, copy=False)))
    known = steps["task_index"].is_in(list(meta.tasks))
    if (wrong := first(~known)) is not None:
        what = f"task_index: row {wrong} (episode {steps['episode_index'][wrong]}) is {steps['task_index'][wrong]}"
        raise fault(meta.root, rows["data_file"][0], f"{what}, which meta/tasks does not list", RESTORE)
    task = steps["task_index"].replace_strict(meta.tasks, return_dtype=pl.String).alias("task")
    return steps.with_columns(task)


def _column(root: Path, file: str, column: pa.ChunkedArray, key: str, feature: Feature) -> pl.Series:
    """The column as declared, then as we use it: float32 vectors and rewards, boolean marks and sub-goals."""
    name, shape = canonical(key, visual=False), [] if feature.shape == [1] else feature.shape
    values, depth, per_row = column.combine_chunks(), 0, 1
    remedy = "record it as meta/info.json declares it"
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
        if values.null_count:
            row = int(values.is_null().to_numpy(False).argmax()) // per_row
            raise fault(root, file, f"{key}: row {row} is null", remedy)
        if not _is_list(values.type):
            break
        width = (shape or [1])[depth] if depth < len(shape or [1]) else 0
        lengths = values.value_lengths().to_numpy(False)
        if (wrong := first(lengths != width)) is not None:
            what = f"{key}: row {wrong // per_row} has {lengths[wrong]} values, not {width or 1}"
            raise fault(root, file, what, remedy)
        values, depth, per_row = values.flatten(), depth + 1, per_row * width
    if depth != len(shape) and not (depth == 1 and not shape):
        raise fault(root, file, f"{key}: is {column.type}, but declared as {feature.shape}", remedy)
    if not _same_kind(values.type, feature.dtype):
        raise fault(root, file, f"{key}: is {column.type}, but declared as {feature.dtype}", remedy)
    if feature.dtype == "string":
        return pl.Series(name, values.to_pylist(), dtype=pl.String)
    array = values.to_numpy(zero_copy_only=False).astype(feature.dtype, copy=False)
    return pl.Series(name, _as_ours(root, file, name, array).reshape(len(column), *_shape(name, feature)))


def _shape(name: str, feature: Feature) -> list[int]:
    return feature.shape if name in (STATE, ACTION) or feature.shape != [1] else []


def _as_ours(root: Path, file: str, name: str, array: np.ndarray) -> np.ndarray:
    if name in (STATE, ACTION, REWARD, "timestamp") or array.dtype == np.float16:
        return array.astype(np.float32, copy=False)
    if name in (SUCCESS, TERMINATED, TRUNCATED) or name.startswith(SUBGOAL):
        if (wrong := first((array != 0) & (array != 1))) is not None:
            raise fault(root, file, f"{name}: row {wrong} is {array[wrong]}", "it must be true or false")
        return array.astype(bool, copy=False)
    return array


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)


def _same_kind(stored: pa.DataType, declared: str) -> bool:
    """Whether both are text, boolean, whole or real numbers; the width may differ and is cast."""
    if declared == "string":
        return pa.types.is_string(stored) or pa.types.is_large_string(stored)
    if declared == "bool":
        return pa.types.is_boolean(stored)
    return pa.types.is_floating(stored) if declared.startswith("float") else pa.types.is_integer(stored)
