"""Reading files that somebody else wrote: only regular files below a folder, only what their format allows.

Each refusal is one line under 200 characters that names the file, what is wrong with it, and what to do.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data.errors import BadInput

LINE = 199  # characters of a refusal, at most
PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError)
RESTORE = "restore it from where it was recorded"


def fault(root: Path, file: str, what: str, remedy: str) -> BadInput:
    """The one line, under 200 characters, that says what is wrong in which file and what to do about it."""
    where = f"{root}/{file}"
    where = where if len(where) <= 84 else "..." + where[-81:]
    room = LINE - len(where) - len(remedy) - len(": ; ")
    line = f"{where}: {what if len(what) <= room else what[: room - 3] + '...'}; {remedy}"
    return BadInput("".join(c if c.isprintable() else "?" for c in line))


def member(root: Path, file: str) -> Path:
    """The regular, non-empty file `file` below `root`. Links, devices and paths that lead outside are refused."""
    parts = PurePosixPath(file).parts
    if not parts or file.startswith("/") or ".." in parts:
        raise fault(root, file, "leads outside the dataset", "name files below its own folder")
    path = root
    try:
        for part in parts:
            mode = (status := os.lstat(path := path / part)).st_mode
            if stat.S_ISLNK(mode):
                raise fault(root, file, "is a symbolic link", "copy the dataset with `cp -rL`")
    except (FileNotFoundError, NotADirectoryError):
        raise fault(root, file, "is missing", RESTORE) from None
    if not stat.S_ISREG(mode):
        raise fault(root, file, "is not a regular file", RESTORE)
    if status.st_size == 0:
        raise fault(root, file, "is empty", RESTORE)
    return path


def parse_json(root: Path, file: str, text: bytes | str, *, nan: bool = False) -> Any:
    """JSON as the standard has it: no duplicate keys, and no NaN unless `nan`."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(value := dict(pairs)):
            twin = next(k for k in value if sum(k == other for other, _ in pairs) > 1)
            raise fault(root, file, f"key '{twin}' appears twice", "keep one of them")
        return value

    def no_nan(constant: str) -> float:
        if nan:
            return float(constant)
        raise fault(root, file, f"holds {constant}, which JSON does not allow", "write a number")

    try:
        return json.loads(text, object_pairs_hook=no_twins, parse_constant=no_nan)
    except BadInput:
        raise
    except (ValueError, RecursionError):
        raise fault(root, file, "is not valid JSON (truncated?)", RESTORE) from None


def load_json(root: Path, file: str, *, nan: bool = False) -> Any:
    return parse_json(root, file, member(root, file).read_bytes(), nan=nan)


def read_table(root: Path, file: str, *, rows: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """The parquet file's table, page checksums verified.

    `rows` is how many it must have, looked up in the footer before anything is unpacked: a small file can claim
    millions of rows. `columns` it lacks are refused.
    """
    path = member(root, file)
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            found, names = parquet.metadata.num_rows, parquet.schema_arrow.names
            if rows is not None and found != rows:
                raise fault(root, file, f"has {found} rows, but meta/ says {rows}", RESTORE)
            if missing := [c for c in columns or [] if c not in names]:
                remedy = "record it, or drop it from meta/info.json"
                raise fault(root, file, f"column '{missing[0]}' is missing", remedy)
            if twin := next((n for n in names if names.count(n) > 1), None):
                raise fault(root, file, f"column '{twin}' appears twice", "keep one of them")
            table = parquet.read(columns, use_threads=False)
            return pa.Table.from_arrays(
                table.columns, names=table.column_names
            )  # without metadata: polars trips on some
    except BadInput:
        raise
    except PARQUET_ERRORS as error:
        damaged = [c for c in columns or [] if not _readable(path, c)]
        column = f"column '{damaged[0]}' " if 0 < len(damaged) < len(columns or []) else ""
        raise fault(root, file, f"{column}is not readable parquet (truncated?): {error}", RESTORE) from None


def read_frame(root: Path, file: str, *, rows: int | None = None) -> pl.DataFrame:
    """The same as a polars frame."""
    table = read_table(root, file, rows=rows)
    try:
        return pl.DataFrame(pl.from_arrow(table))
    except (
        pl.exceptions.PolarsError,
        pl.exceptions.PanicException,
    ) as error:  # it panics at names that are no text
        raise fault(root, file, f"is not readable parquet: {error}", RESTORE) from None


def _readable(path: Path, column: str) -> bool:
    try:
        pq.read_table(path, columns=[column], page_checksum_verification=True)
    except PARQUET_ERRORS:
        return False
    return True
