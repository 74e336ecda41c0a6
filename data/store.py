"""The one store of artefacts: content-keyed, immutable, complete or invisible.

```
store/objects/<stage>/<key16>/            a published artefact: its files and manifest.json, nothing else
store/objects/<stage>/.staging-<key16>-*  being built; invisible to readers, removed by the next builder of that key
store/work/<stage>/<key16>/               what a killed builder may go on from (training); removed once published
store/locks/<stage>-<key16>.lock          one flock per key; the kernel frees it when its holder dies
store/verified/<stage>-<key16>.json       stat() of files already hashed here, so that a second check costs no reading
```
A key says what an artefact was made from; a digest says what it is. Readers take only what the manifest lists.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import BadInput
from data.paths import store_dir
from data.refs import Ref

MANIFEST = "manifest.json"
MIN_FREE_BYTES = 256 * 1024**2  # an artefact is not begun with less room than this


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What an artefact is made from; its sha256 is the key."""

    stage: str
    params: dict[str, Any]  # resolved parameters, JSON-able
    parents: tuple[Ref, ...] = ()  # upstream artefacts, in order
    code: dict[str, str] | None = None  # module or library -> digest or version
    execution: dict[str, Any] | None = None  # how it is made, not what: worker counts and the like; not in the key

    @property
    def as_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "params": self.params,
            "parents": [{"stage": p.stage, "key": p.key, "digest": p.digest} for p in self.parents],
            "code": self.code or {},
        }

    @property
    def key(self) -> str:
        # Upstream digests, not keys: an input that was rebuilt to the same bytes makes nothing stale.
        inputs = self.as_json | {"parents": [p.digest for p in self.parents]}
        return hashlib.sha256(canonical(inputs).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Build:
    """The two folders a builder gets."""

    out: Path  # empty; becomes the artefact
    work: Path  # survives a kill of the builder, gone after publishing


def canonical(value: Any) -> str:
    """JSON with one spelling per value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Artefacts under one folder. Safe for any number of processes at once."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = Path(root) if root else store_dir()

    def path(self, stage: str, key: str) -> Path:
        return self.root / "objects" / stage / key[:16]

    def find(self, stage: str, key: str) -> tuple[Ref | None, str]:
        """The verified artefact, or None and why: "not built yet", or what is damaged."""
        entry = self.path(stage, key)
        if not entry.exists():
            return None, "not built yet"
        try:
            manifest = self._read_manifest(entry, key)
            self._verify(entry, manifest)
        except BadInput as fault:
            return None, str(fault)
        return Ref(stage=stage, key=key, digest=manifest["digest"], path=str(entry)), "intact"

    def manifest(self, ref: Ref) -> dict[str, Any]:
        """What `ref` was made from and consists of."""
        return self._read_manifest(ref.dir, ref.key)

    def manifests(self, stage: str) -> Iterator[dict[str, Any]]:
        """Every published manifest of a stage, newest first."""
        entries = [p for p in (self.root / "objects" / stage).glob("[!.]*/" + MANIFEST)]
        for path in sorted(entries, key=lambda p: p.stat().st_mtime_ns, reverse=True):
            with contextlib.suppress(ValueError):  # a damaged one is nobody's precedent
                yield json.loads(path.read_text())

    def ensure(
        self, inputs: Inputs, make: Callable[[Build], None], *, force: bool = False, resume: bool = True
    ) -> tuple[Ref, bool]:
        """The artefact of `inputs` and whether it was there already; `make` fills it if not.

        force: make it anyway. resume: let the builder go on from what a killed one left in its work folder.
        Two processes that ask for one key make it once: the second waits, then finds it.
        """
        stage, key = inputs.stage, inputs.key
        with refusing_storage_faults(self.root), self._lock(stage, key):
            ref, _ = self.find(stage, key)
            if ref and not force:
                return ref, True
            if force or not resume:
                shutil.rmtree(self._work(inputs), ignore_errors=True)
            return self._build(inputs, make), False

    def verify_all(self) -> Iterator[tuple[Path, bool, str]]:
        """Read every artefact in full: (folder, intact, why)."""
        shutil.rmtree(self.root / "verified", ignore_errors=True)
        for path in sorted((self.root / "objects").glob("*/[!.]*")):
            try:
                manifest = self._read_manifest(path, None)
                self._verify(path, manifest)
                yield path, True, "intact"
            except BadInput as fault:
                yield path, False, str(fault)

    # -- building ------------------------------------------------------------------------------------------------

    def _build(self, inputs: Inputs, make: Callable[[Build], None]) -> Ref:
        entry = self.path(inputs.stage, inputs.key)
        work = self._work(inputs)
        for stale in entry.parent.glob(f".staging-{entry.name}-*"):
            shutil.rmtree(stale)
        staging = entry.parent / f".staging-{entry.name}-{uuid.uuid4().hex[:8]}"
        staging.mkdir(parents=True)
        work.mkdir(parents=True, exist_ok=True)
        self._refuse_when_nearly_full()
        started = time.monotonic()
        try:
            make(Build(out=staging, work=work))
            manifest = self._write_manifest(staging, inputs, seconds=time.monotonic() - started)
            self._publish(staging, entry)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)
        self._remember(entry, manifest)
        return Ref(stage=inputs.stage, key=inputs.key, digest=manifest["digest"], path=str(entry))

    def _work(self, inputs: Inputs) -> Path:
        return self.root / "work" / inputs.stage / inputs.key[:16]

    def _write_manifest(self, staging: Path, inputs: Inputs, *, seconds: float) -> dict[str, Any]:
        files = {}
        for path in sorted(p for p in staging.rglob("*") if p.is_file()):
            path.chmod(0o444)
            fsync(path)
            files[str(path.relative_to(staging))] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        digest = hashlib.sha256(canonical(files).encode()).hexdigest()
        built = {"seconds": round(seconds, 3), "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        manifest = inputs.as_json | {"key": inputs.key, "digest": digest, "files": files, "built": built}
        path = staging / MANIFEST
        path.write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False))
        path.chmod(0o444)
        for folder in [path, *(p for p in staging.rglob("*") if p.is_dir()), staging]:
            fsync(folder)
        return manifest

    def _publish(self, staging: Path, entry: Path) -> None:
        if entry.exists():  # damaged, or forced: set aside in one rename, so a reader sees the old, nothing, or the new
            aside = entry.parent / f".staging-{entry.name}-replaced-{uuid.uuid4().hex[:8]}"
            entry.rename(aside)
            staging.rename(entry)
            shutil.rmtree(aside)
        else:
            staging.rename(entry)
        fsync(entry.parent)

    def _refuse_when_nearly_full(self) -> None:
        free = shutil.disk_usage(self.root).free
        if free < MIN_FREE_BYTES:
            raise BadInput(
                f"{self.root}: {free >> 20} MiB free, {MIN_FREE_BYTES >> 20} MiB needed to begin an artefact; "
                "free some disk or point FLYWHEEL_ROOT elsewhere"
            )

    # -- verifying -----------------------------------------------------------------------------------------------

    def _read_manifest(self, entry: Path, key: str | None) -> dict[str, Any]:
        path = entry / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            files, found = manifest["files"], manifest["key"]
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise BadInput(f"damaged: {path} cannot be read ({type(fault).__name__})") from None
        if key is not None and found != key:
            raise BadInput(f"damaged: {path} belongs to another key")
        if manifest["digest"] != hashlib.sha256(canonical(files).encode()).hexdigest():
            raise BadInput(f"damaged: {path} was altered")
        return manifest

    def _verify(self, entry: Path, manifest: dict[str, Any]) -> None:
        known = self._recalled(entry)
        stats, hashed = {}, False
        for name, expected in manifest["files"].items():
            path = entry / name
            try:
                stats[name] = _stat(path)
            except OSError:
                raise BadInput(f"damaged: {path} is missing") from None
            if stats[name][0] != expected["size"]:
                raise BadInput(f"damaged: {path} has {stats[name][0]} bytes, not {expected['size']}")
            if known.get(name) != stats[name]:
                hashed = True
                if sha256_file(path) != expected["sha256"]:
                    raise BadInput(f"damaged: {path} does not have the sha256 it was published with")
        if hashed:
            self._remember(entry, manifest)

    def _memo(self, entry: Path) -> Path:
        return self.root / "verified" / f"{entry.parent.name}-{entry.name}.json"

    def _recalled(self, entry: Path) -> dict[str, list[int]]:
        try:
            return json.loads(self._memo(entry).read_text())
        except (OSError, ValueError):
            return {}

    def _remember(self, entry: Path, manifest: dict[str, Any]) -> None:
        memo = self._memo(entry)
        with contextlib.suppress(OSError):  # a store that cannot be written can still be read
            memo.parent.mkdir(parents=True, exist_ok=True)
            part = memo.with_suffix(f".{uuid.uuid4().hex[:8]}")
            part.write_text(json.dumps({name: _stat(entry / name) for name in manifest["files"]}))
            part.replace(memo)

    @contextlib.contextmanager
    def _lock(self, stage: str, key: str) -> Iterator[None]:
        path = self.root / "locks" / f"{stage}-{key[:16]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def refusing_storage_faults(where: Path) -> Iterator[None]:
    """Turn a full disk or a read-only folder into one line that says so."""
    try:
        yield
    except OSError as fault:
        path = fault.filename or where
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(where).free >> 20
            raise BadInput(
                f"{path}: the disk is full ({free} MiB free); free some, nothing half-written is kept"
            ) from None
        if fault.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise BadInput(f"{path}: cannot be written; make {where} writable or set FLYWHEEL_ROOT elsewhere") from None
        raise


def _stat(path: Path) -> list[int]:
    # ctime changes with every write and cannot be set back, so an equal stat is an unaltered file
    s = path.lstat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def fsync(path: Path) -> None:
    """Bring a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
