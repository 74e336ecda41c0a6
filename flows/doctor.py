"""`flywheel doctor`: what this machine can do, one line per finding, each with the command that mends it."""

import importlib.util
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from data.paths import state_dir, store_dir
from flows import processes

NEEDED_DISK_GB = 5.0  # a night of the demo recipe with room to spare
NEEDED_MEMORY_GB = 4.0  # training the demo recipe beside two rendering environments
NEWEST = {  # from these versions on something fails at night: see pyproject.toml
    "fastapi": (0, 151),  # no Prefect server starts
    "sqlalchemy": (2, 1),  # schedules silently never fire
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    ok: bool
    required: bool  # without it the demo does not run
    found: str
    mend: str = ""  # what to do when it is not ok


def run(*, deep: bool = False, as_json: bool = False) -> int:
    """Print the findings, as lines or as JSON. 1 if a required one is not ok, else 0. `deep` re-reads the store."""
    findings = []
    for finding in examine(deep=deep):
        findings.append(finding)
        if not as_json:
            _print(finding)
    healthy = all(finding.ok for finding in findings if finding.required)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}))
    return 0 if healthy else 1


def examine(*, deep: bool = False) -> Iterator[Finding]:
    """Every finding, as it is made."""
    checks: list[Callable[[], Finding]] = [
        _python, _packages, _gpu, _compiler, _vulkan, _libero, _memory, _disk, _store, _prefect, _mlflow, _spool,
    ]  # fmt: skip
    for check in checks:
        yield check()
    if deep:
        yield from _damaged_artefacts()


def _print(finding: Finding) -> None:
    from rich.console import Console
    from rich.text import Text

    mark, style = ("ok", "green") if finding.ok else ("MISSING", "bold red") if finding.required else ("none", "yellow")
    line = Text.assemble((f"{mark:<8}", style), f"{finding.name:<10} {finding.found}")
    if not finding.ok:
        line.append(f"\n{'':<19}-> {finding.mend}")
    Console(highlight=False, soft_wrap=True).print(line)


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(name="Python", ok=sys.version_info[:2] == (3, 12), required=True, found=found, mend="./setup.sh")


def _packages() -> Finding:
    """The two whose newer versions break Prefect, one of them without a word."""
    found, ok = [], True
    for name, limit in NEWEST.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            have = "missing"
        found.append(f"{name} {have}")
        ok &= have != "missing" and tuple(int(part) for part in have.split(".")[:2]) < limit
    return Finding(name="packages", ok=ok, required=True, found=", ".join(found), mend="./setup.sh")


def _gpu() -> Finding:
    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        names = ""
    return Finding(
        name="GPU",
        ok=bool(names),
        required=False,
        found="; ".join(names.splitlines()) or "no NVIDIA GPU; everything runs on the CPU",
        mend="with one in this machine: install NVIDIA's driver (`nvidia-smi` must list it)",
    )


def _compiler() -> Finding:
    found = shutil.which(os.environ.get("CC", "cc"))
    return Finding(
        name="C",
        ok=found is not None,
        required=False,
        found=f"{found} compiles Mamba's scan for the CPU"
        if found
        else "no C compiler; Mamba's scan is five times slower",
        mend="sudo apt-get install gcc",
    )


def _vulkan() -> Finding:
    from data.sim.driver import device_summary

    device = device_summary()
    found = f"{device.name} [{device.detail}]" if device.ok else device.detail
    mend = f"{sys.executable} -m data.sim.driver"
    return Finding(name="Vulkan", ok=device.ok, required=True, found=found, mend=mend)


def _libero() -> Finding:
    found = importlib.util.find_spec("libero") is not None
    return Finding(
        name="LIBERO",
        ok=found,
        required=False,
        found="installed" if found else "not installed; the SAPIEN scenes need it not",
        mend=f"uv pip install --python {sys.executable} -e '.[libero]'",
    )


def _memory() -> Finding:
    free, cores = psutil.virtual_memory().available / 1e9, len(os.sched_getaffinity(0))
    return Finding(
        name="memory",
        ok=free >= NEEDED_MEMORY_GB,
        required=False,
        found=f"{free:.1f} GB free of the {NEEDED_MEMORY_GB:.0f} GB the demo needs; {cores} cores",
        mend="end other programs, or train with a smaller --fit.batch_size",
    )


def _disk() -> Finding:
    place = next(folder for folder in (store_dir(), *store_dir().parents) if folder.exists())
    free = shutil.disk_usage(place).free / 1e9
    return Finding(
        name="disk",
        ok=free >= NEEDED_DISK_GB,
        required=True,
        found=f"{free:.1f} GB free at {place} of the {NEEDED_DISK_GB:.0f} GB a night needs",
        mend="free some space, or put FLYWHEEL_ROOT on a larger disk",
    )


def _store() -> Finding:
    try:
        store_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store_dir()):
            pass
        fault = ""
    except OSError as error:
        fault = f": {error.strerror}"
    return Finding(
        name="store",
        ok=not fault,
        required=True,
        found=f"{store_dir()} {'can be written' if not fault else 'cannot be written' + fault}",
        mend=f"sudo chown -R $USER {store_dir()}, or set FLYWHEEL_ROOT to a folder of yours",
    )


def _prefect() -> Finding:
    return _server("Prefect", "server", 4200, "PREFECT_API_URL", "/health")


def _mlflow() -> Finding:
    """A server the user has named, or our SQLite file."""
    pages = _server("MLflow", "mlflow", 5000, "MLFLOW_TRACKING_URI", "/health")
    database = state_dir() / "mlflow" / "mlflow.db"
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http") or not database.exists():
        return pages
    if fault := _sqlite_fault(database):
        mend = f"mv {database} {database}.broken"
        return Finding(name="MLflow", ok=False, required=True, found=f"{database}: {fault}", mend=mend)
    return replace(pages, found=f"its database is intact; its pages: {pages.found}")


def _server(name: str, service: str, port: int, variable: str, health: str) -> Finding:
    """One of ours, one the user has named, or the port it would take."""
    url = os.environ.get(variable, "")
    ours = processes.recorded(service)
    if url.startswith("http") and not (ours and ours.url == url):
        ok = processes.answers(url + health)
        found = f"{url} {'answers' if ok else 'does not answer'} ({variable})"
        return Finding(name=name, ok=ok, required=True, found=found, mend=f"start that server, or unset {variable}")
    if ours and ours.alive:
        ok = processes.answers(ours.url + health, timeout=10)
        found = f"runs at {ours.url.removesuffix('/api')}{'' if ok else ', but does not answer (yet)'}"
        return Finding(
            name=name, ok=ok, required=False, found=found, mend=f"look at {ours.log}; flywheel down && flywheel up"
        )
    taken = _is_taken(port)
    return Finding(
        name=name,
        ok=not taken,
        required=False,
        found=f"not running; port {port} is {'taken by another program' if taken else 'free'}",
        mend="nothing: the next free port is used instead",
    )


def _spool() -> Finding:
    waiting = len(list((state_dir() / "mlflow" / "spool").glob("*.jsonl")))
    return Finding(
        name="metrics",
        ok=True,
        required=False,
        found=f"{waiting} runs wait for MLflow or are going on" if waiting else "all delivered to MLflow",
    )


def _damaged_artefacts() -> Iterator[Finding]:
    """Every artefact read in full and compared with the digests in its manifest."""
    from data.store import Store

    intact = 0
    for path, ok, why in Store().verify_all():
        intact += ok
        if not ok:
            mend = "run the same flow again: only this is made anew"
            yield Finding(name="artefact", ok=False, required=True, found=f"{path}: {why}"[:300], mend=mend)
    yield Finding(name="artefacts", ok=True, required=False, found=f"{intact} read in full and intact")


def _sqlite_fault(database: Path) -> str:
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10) as connection:
            verdict = connection.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        return str(error)
    return "" if verdict == "ok" else str(verdict).splitlines()[0]


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False
