"""Long-lived helpers of this checkout (Prefect's server and worker, MLflow's pages): started once, found again, ended.

Each runs in a session of its own with a log file and a record: process id, start time and boot, so that a recycled id
is never taken for it, and a token in its environment, by which all it has started is found even after it is gone.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from data.errors import BadInput
from data.paths import root, state_dir

TOKEN = "FLYWHEEL_SERVICE"  # environment variable: which service started this process
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with 127.0.0.1


@dataclass(frozen=True, kw_only=True)
class Service:
    """A helper that was started, alive or not."""

    name: str
    pid: int
    birth: str  # boot id and start time in clock ticks since then
    token: str
    url: str  # where it answers; "" if it does not
    log: str

    @property
    def alive(self) -> bool:
        return _birth(self.pid) == self.birth

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2].partition("/")[0])


def recorded(name: str) -> Service | None:
    """The service as last started, alive or not."""
    try:
        return Service(**json.loads(_record(name).read_text()))
    except FileNotFoundError:
        return None


def start(name: str, command: Sequence[str], *, environment: dict[str, str], url: str = "") -> Service:
    """Start `command` detached from this process and its terminal."""
    log = state_dir() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=root(),
            env={**os.environ, **environment, TOKEN: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(name=name, pid=process.pid, birth=_birth(process.pid), token=token, url=url, log=str(log))
    record = _record(name)
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    part.write_text(json.dumps(asdict(service)))
    part.replace(record)
    return service


def stop(service: Service, patience: float = 20.0) -> None:
    """End a service and all it has started; what is still there after `patience` seconds is killed."""
    family = _family(service)
    for process in family:
        _signal(process, signal.SIGTERM)
    _, deaf = psutil.wait_procs(family, timeout=patience)
    for process in [*deaf, *_family(service)]:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(deaf, timeout=5)
    _record(service.name).unlink(missing_ok=True)


def answers(url: str, timeout: float = 5.0) -> bool:
    """Whether `url` returns a success within `timeout` seconds."""
    try:
        with _DIRECT.open(url, timeout=timeout) as response:
            return response.status == 200
    except (OSError, urllib.error.URLError, ValueError):
        return False


def wait_until_it_answers(service: Service, path: str, seconds: float) -> bool:
    """True when `service.url + path` answers; False when it has died, or `seconds` are over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if answers(service.url + path):
            return True
        if not service.alive:
            return False
        time.sleep(0.2)
    return False


def last_words(service: Service) -> str:
    """The last line of a service's log that says something."""
    lines = Path(service.log).read_text(errors="replace").split("\n")
    return next((line.strip()[:80] for line in reversed(lines) if line.strip()), "no output")


def free_port(first: int) -> int:
    """The first port from `first` on that nobody listens on."""
    for port in range(first, first + 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BadInput(f"ports {first} to {first + 99} on 127.0.0.1 are all taken; end something, or name another one")


def _record(name: str) -> Path:
    return state_dir() / "services" / f"{name}.json"


def _birth(pid: int) -> str:
    """Boot and start time of a living process; "" for none. (psutil's start time moves when the clock is set.)"""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    if fields[0] in "ZX":  # dead, and not yet collected by its parent
        return ""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[19]}"


def _family(service: Service) -> list[psutil.Process]:
    """The service, its descendants, and whatever else carries its token."""
    found = set()
    if service.alive:
        main = psutil.Process(service.pid)
        found = {main, *main.children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get(TOKEN) == service.token:
                found.add(process)
        except psutil.Error:  # gone, or another user's
            continue
    return [process for process in found if process.pid != os.getpid()]


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
