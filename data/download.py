"""Fetch published files: whole and checked, or not there at all; a killed fetch goes on at the byte it had reached.

```
 .<name>.lock       one fetch per name at a time; the kernel frees it when its holder dies
 <name>.partial/    files as they arrive; fetching.json: what they should be, and which have been checked
 <name>/            every file, checked, in one rename; fetched.json: source, revision, size and sha256 of each
```
huggingface_hub's own download begins a file anew after a kill (its temporary names are unique to a process since 1.x),
which for one file of 14 GB is most of the work; so the bytes are asked for in ranges here, by its own client.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import BadInput
from data.remotes import Listing, Remote, RemoteFile, Unreachable
from data.store import MIN_FREE_BYTES, fsync, refusing_storage_faults, sha256_file

FETCHED, FETCHING = "fetched.json", "fetching.json"
BLOCK = 16 * 1024**2  # bytes of one request
# Consecutive failures before giving up, each of which the clients try for half a minute; seconds between, doubling.
TRIES, PAUSE_S = 4, 5.0

Choose = Callable[[Sequence[RemoteFile]], Sequence[RemoteFile]]
Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]  # total bytes -> advance(bytes)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A folder that is complete."""

    folder: Path
    source: str
    revision: str
    files: Mapping[str, Mapping[str, Any]]  # name -> size, sha256


def fetch(
    remote: Remote,
    folder: Path,
    *,
    choose: Choose,
    progress: Progress,
    waiting: Callable[[], None] = lambda: None,
    room: Callable[[Sequence[RemoteFile]], float] = lambda files: 1.0,
) -> Fetched:
    """What `choose` takes of `remote`, in `folder`; at once if it is there already, or somebody brought it by hand.

    waiting: called when another process is fetching it, before waiting for that. room: disk to have free before the
    first byte, in sizes of what is fetched. Raises `BadInput` when the disk has less, `folder` holds something else, a
    file does not arrive as it was published, or the remote refuses; `Unreachable` without a connection. What had
    arrived by then stays for the next try.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with refusing_storage_faults(folder.parent), exclusive(folder, waiting):
        if (folder / FETCHED).exists():
            return read_fetched(folder, source=remote.name)
        if folder.exists():
            return adopt(folder, source=remote.name, choose=choose)
        listing = _listing(remote)
        files = sorted(choose(listing.files), key=lambda file: file.name)
        partial = folder.with_name(f"{folder.name}.partial")
        checked = _prepare(partial, files)
        _refuse_without_room(partial, files, room(files))
        with progress(sum(file.size for file in files)) as advance:
            for file in files:
                path = partial / file.name
                if file.name in checked:
                    advance(file.size)
                    continue
                _receive(remote, file, path, advance)
                checked[file.name] = _check(remote, file, path)
                _note(partial, files, checked)
        sizes = {file.name: {"size": file.size, "sha256": checked[file.name]} for file in files}
        return _publish(partial, folder, source=remote.name, revision=listing.revision, files=sizes)


def adopt(folder: Path, *, source: str, choose: Choose) -> Fetched:
    """The same for a folder that somebody has brought by hand: what is there is what it is. Raises as `choose` does."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FETCHED]
    files = [
        RemoteFile(name=str(path.relative_to(folder)), size=path.stat().st_size, sums={}, path="") for path in found
    ]
    sizes = {f.name: {"size": f.size, "sha256": sha256_file(folder / f.name)} for f in choose(files)}
    return _write_fetched(folder, source=source, revision="by hand", files=sizes)


def read_fetched(folder: Path, *, source: str | None = None) -> Fetched:
    """What `folder` holds. Raises `BadInput` if it is from elsewhere than `source`, or files are missing or cut off."""
    try:
        value = json.loads((folder / FETCHED).read_text())
        fetched = Fetched(folder=folder, **{key: value[key] for key in ("source", "revision", "files")})
    except FileNotFoundError:
        raise BadInput(f"{folder}: no {FETCHED} in it, so nothing that was fetched; move it away") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{folder / FETCHED}: damaged; remove the folder and fetch it again") from None
    if source is not None and fetched.source != source:
        raise BadInput(f"{folder}: holds {fetched.source}, not {source}; move it away, and try again")
    for name, expected in fetched.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            raise BadInput(f"{path}: missing or cut off; remove {folder} and fetch it again")
    return fetched


@contextmanager
def exclusive(folder: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time for `folder`; whoever has to wait calls `waiting` first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- before the first byte -------------------------------------------------------------------------------------------


def _listing(remote: Remote) -> Listing:
    try:
        return remote.listing()
    except Exception as error:  # every client has faults of its own; those it does not know go on as they are
        told = remote.explain(error) if not isinstance(error, BadInput) else error
        if told is None:
            raise
        raise told from None


def _prepare(partial: Path, files: Sequence[RemoteFile]) -> dict[str, str]:
    """Make `partial` hold nothing but parts of `files`. Returns name -> sha256 of those that were checked already."""
    partial.mkdir(parents=True, exist_ok=True)
    try:
        noted = json.loads((partial / FETCHING).read_text())
    except (OSError, ValueError):
        noted = {"expected": {}, "checked": {}}
    expected = _expected(files)
    same = {name for name, value in expected.items() if noted["expected"].get(name) == value}
    for path in [p for p in partial.rglob("*") if p.is_file() and p.name != FETCHING]:
        name = str(path.relative_to(partial))
        if name not in same or path.stat().st_size > expected[name]["size"]:
            path.unlink()
    whole = {n for n in same if (partial / n).is_file() and (partial / n).stat().st_size == expected[n]["size"]}
    checked = {name: digest for name, digest in noted["checked"].items() if name in whole}
    _note(partial, files, checked)
    return checked


def _expected(files: Sequence[RemoteFile]) -> dict[str, Any]:
    return {file.name: {"size": file.size, **file.sums} for file in files}


def _note(partial: Path, files: Sequence[RemoteFile], checked: Mapping[str, str]) -> None:
    part = partial / f".{FETCHING}"
    part.write_text(json.dumps({"expected": _expected(files), "checked": dict(checked)}))
    part.replace(partial / FETCHING)


def _refuse_without_room(partial: Path, files: Sequence[RemoteFile], room: float) -> None:
    total = sum(file.size for file in files)
    here = sum(path.stat().st_size for file in files if (path := partial / file.name).is_file())
    needed, free = total * room - here + MIN_FREE_BYTES, shutil.disk_usage(partial).free
    if needed > free:
        raise BadInput(
            f"{partial.parent}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; free some, or point "
            "FLYWHEEL_ROOT to another disk"
        )


# -- one file --------------------------------------------------------------------------------------------------------


def _receive(remote: Remote, file: RemoteFile, path: Path, advance: Callable[[int], None]) -> None:
    """Append to `path` what it lacks of `file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as local:
        advance(local.tell())
        for block in _blocks(remote, file, start=local.tell()):
            local.write(block)
            advance(len(block))
        local.flush()
        os.fsync(local.fileno())


def _blocks(remote: Remote, file: RemoteFile, *, start: int) -> Iterator[bytes]:
    """The bytes from `start` on. A connection that breaks is made again; only bytes that arrived count."""
    failures = 0
    while start < file.size:
        try:
            with remote.open(file, BLOCK) as stream:
                stream.seek(start)
                while start < file.size:
                    wanted = min(BLOCK, file.size - start)
                    block = stream.read(wanted)
                    if not 0 < len(block) <= wanted:
                        raise ConnectionError(f"{len(block)} bytes for {wanted}")
                    yield block
                    start, failures = start + len(block), 0
        except Exception as error:  # as in `_listing`
            told, failures = remote.explain(error), failures + 1
            if told is None:
                raise
            if not isinstance(told, Unreachable) or failures == TRIES:
                raise told from None
            time.sleep(PAUSE_S * 2 ** (failures - 1))


def _check(remote: Remote, file: RemoteFile, path: Path) -> str:
    """The sha256 of `path`. Raises `BadInput`, and removes it, if it is not what was published."""
    hashes = {name: _hash(name, file.size) for name in {"sha256", *file.sums}}
    with path.open("rb") as local:
        while block := local.read(BLOCK):
            for running in hashes.values():
                running.update(block)
    found = {name: running.digest().hex() for name, running in hashes.items()}
    for name, expected in file.sums.items():
        if found[name] != expected:
            path.unlink()
            raise BadInput(f"{remote.name}: {file.name[-60:]} arrived damaged ({name} differs); run it again")
    return found["sha256"]


def _hash(name: str, size: int) -> Any:
    if name == "crc32c":
        import google_crc32c  # pyright: ignore[reportMissingImports]  (comes with gcsfs, as do these sums)

        return google_crc32c.Checksum()
    return hashlib.sha1(f"blob {size}\0".encode()) if name == "git" else hashlib.new(name)


# -- when all is there -----------------------------------------------------------------------------------------------


def _publish(partial: Path, folder: Path, **facts: Any) -> Fetched:
    for empty in sorted((p for p in partial.rglob("*") if p.is_dir() and not any(p.iterdir())), reverse=True):
        empty.rmdir()
    _write_fetched(partial, **facts)
    (partial / FETCHING).unlink()
    partial.rename(folder)
    fsync(folder.parent)
    return Fetched(folder=folder, **facts)


def _write_fetched(folder: Path, **facts: Any) -> Fetched:
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    path = folder / FETCHED
    path.write_text(json.dumps({"format": 1, "at": at, **facts}, indent=1, sort_keys=True) + "\n")
    fsync(path)
    fsync(folder)
    return Fetched(folder=folder, **facts)
