"""A journal on the local disk between a run and the tracking server, so that an outage costs the run nothing.

    run       append  append  append  append  append ...         microseconds each; never waits, never raises
    journal   ─────────────────────────────────────────          JSON lines, a file per run, locked while its run lives
    shipper        deliver · ack     deliver · (server gone) ... deliver · ack

Delivery is at least once: what was sent but not acknowledged is sent again, and the receiver must recognise it. A
journal whose writer is dead (the kernel has dropped its lock) is closed with status KILLED and shipped by whichever
process looks next.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]  # {"kind": start | metrics | tags | artifact | input | finish, "time": ms, ...}
State = dict[str, Any]  # what the receiver needs to go on with a run; kept beside the acknowledged offset
Deliver = Callable[[State, list[Event]], State]

BATCH = 1000  # metric values in one delivery: MLflow's limit
INTERVAL = 1.0  # seconds between deliveries
LONGEST_PAUSE = 10.0  # seconds between attempts while the server is away
TAIL = 65536  # bytes at the end of a journal in which its last event is looked for


class Unreachable(Exception):
    """The receiver is away: try the same events again."""


class Later(Exception):
    """This journal must wait for another one: try it in the next pass."""


class Rejected(Exception):
    """The receiver will never take these events: skip them, and say so."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Journal:
    """The writer's end of one run's journal. The lock on it says that the run is alive."""

    def __init__(self, folder: Path, start: Event):
        """Create the file, lock it, write `start` (with its `id`). OSError if the folder cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{time.time_ns()}-{start['id']}.jsonl"
        self.state: State = {}  # as last acknowledged
        self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o644)
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # a shipper may hold an empty journal for a moment, and leaves it alone
        self._lock = threading.Lock()
        self._broken = False  # the last write failed half-way
        self._closed = False
        self._warned = False
        self.append(start)

    def append(self, event: Event) -> None:
        """Add one event. Never raises for a full disk: the run matters more than its curve."""
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self._closed:
                self._warn("its run has finished")
                return
            try:
                written = os.write(self._fd, b"\n" + line if self._broken else line)
                self._broken = written < len(line)
            except OSError as error:
                self._broken = True
                self._warn(error.strerror or str(error))

    def _warn(self, why: str) -> None:
        if not self._warned:
            log.warning("metrics are being lost, %s cannot be written: %s", self.path, why)
        self._warned = True

    def close(self) -> None:
        with self._lock:
            self._closed = True  # the descriptor's number may be another file's soon
            os.close(self._fd)


def read(path: Path, offset: int) -> Iterator[tuple[Event | None, int]]:
    """Whole lines from `offset` on, each with the offset behind it; None for a line torn by a kill or a full disk."""
    with path.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            yield event if isinstance(event, dict) else None, offset


def batches(path: Path, offset: int) -> Iterator[tuple[list[Event], int]]:
    """Events in order: neighbouring metrics together up to BATCH values, everything else alone."""
    pending: list[Event] = []
    size = 0
    for event, end in read(path, offset):
        if event is None:
            continue
        values = len(event["values"]) if event["kind"] == "metrics" else BATCH
        if pending and size + values > BATCH:
            yield pending, offset
            pending, size = [], 0
        pending.append(event)
        size += values
        offset = end
    if pending:
        yield pending, offset


def _load_ack(journal: Path) -> tuple[int, State]:
    try:
        ack = json.loads(journal.with_suffix(".ack").read_text())
    except FileNotFoundError:
        return 0, {}
    return ack["offset"], ack["state"]


def _save_ack(journal: Path, offset: int, state: State) -> None:
    temporary = journal.with_suffix(".ack.tmp")
    temporary.write_text(json.dumps({"offset": offset, "state": state}))
    os.replace(temporary, journal.with_suffix(".ack"))


def acknowledged(folder: Path, run: str) -> State | None:
    """What is known of a run whose journal is not yet shipped to its end; None when there is no such journal."""
    for journal in folder.glob(f"*-{run}.jsonl"):
        return _load_ack(journal)[1]
    return None


class Shipper(threading.Thread):
    """Delivers journals in the background: this process's own, and those of dead ones. Oldest first."""

    def __init__(self, folder: Path, deliver: Deliver):
        super().__init__(name="metric-shipper", daemon=True)
        self.outage: str | None = None  # why the receiver cannot be reached now
        self._folder = folder
        self._deliver = deliver
        self._mine: dict[Path, Journal] = {}
        self._wake = threading.Event()
        self._turn = threading.Condition()
        self._passes = 0

    def add(self, journal: Journal) -> None:
        """Own a journal: deliver it while it grows, close and remove it when its run has finished."""
        self._mine[journal.path] = journal
        self._wake.set()

    def run(self) -> None:
        pause = INTERVAL
        while True:
            self._wake.wait(pause)
            self._wake.clear()
            try:
                self._pass()
                outage, pause = None, INTERVAL
            except Unreachable as error:
                outage, pause = str(error), min(2 * pause, LONGEST_PAUSE)
            except Exception as error:  # a fault of ours must not stop delivery for good
                log.exception("the metric shipper failed, and will try again")
                outage, pause = repr(error), LONGEST_PAUSE
            if outage and not self.outage:
                log.warning("%s; metrics wait in %s and are sent when it is back", outage, self._folder)
            with self._turn:
                self.outage = outage
                self._passes += 1
                self._turn.notify_all()

    def flush(self, timeout: float) -> bool:
        """Wait until all own journals are delivered. False after `timeout` s, or as soon as the receiver is away."""
        deadline = time.monotonic() + timeout
        first = self._passes
        with self._turn:
            while self._pending():
                if self.outage and self._passes > first:
                    return False
                if not self._turn_over(deadline):
                    return False
        return True

    def whole_pass(self, timeout: float) -> bool:
        """Wait until every journal without a living writer has been tried once; False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._turn:
            enough = self._passes + 2  # the pass under way may have begun before this call
            while self._passes < enough:
                if not self._turn_over(deadline):
                    return False
        return True

    def _turn_over(self, deadline: float) -> bool:
        self._wake.set()
        return self._turn.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() < deadline

    def _pending(self) -> bool:
        return any(next(batches(path, _load_ack(path)[0]), None) for path in list(self._mine) if path.exists())

    def _pass(self) -> None:
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                if journal := self._mine.get(path):
                    self._ship_own(journal)
                else:
                    self._ship_dead(path)
            except Later:
                continue

    def _ship_own(self, journal: Journal) -> None:
        if self._ship(journal.path, journal):
            del self._mine[journal.path]
            _remove(journal.path)
            journal.close()

    def _ship_dead(self, path: Path) -> None:
        """Close and deliver the journal of a dead process; leave it alone when its writer lives or is just starting."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_APPEND)
        except FileNotFoundError:  # another process has just delivered it
            return
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            if os.fstat(fd).st_nlink == 0 or os.fstat(fd).st_size == 0:
                return
            _close_killed(path, fd)
            if self._ship(path, None):
                _remove(path)
        finally:
            os.close(fd)

    def _ship(self, path: Path, owner: Journal | None) -> bool:
        """Deliver what is new; True when the run's end has been delivered."""
        offset, state = _load_ack(path)
        for events, end in batches(path, offset):
            state = self._deliver_or_skip(state, events)
            state["ended"] = events[-1]["kind"] == "finish"
            _save_ack(path, end, state)
            if owner:
                owner.state = state
        return state.get("ended", False)

    def _deliver_or_skip(self, state: State, events: list[Event]) -> State:
        try:
            return self._deliver(state, events)
        except Rejected as error:
            if len(events) == 1:
                log.warning("not recorded: %s", error)
                return state
        for event in events:  # one bad value must not take its neighbours with it
            state = self._deliver_or_skip(state, [event])
        return state


def _close_killed(path: Path, fd: int) -> None:
    """Write the finish event that a killed run could not write; its time is that of the run's last event."""
    last: Event = {"kind": "", "time": now_ms()}
    for event, _ in read(path, max(0, path.stat().st_size - TAIL)):  # the first line of it may be cut: read() skips it
        last = event or last
    if last["kind"] != "finish":
        finish = {"kind": "finish", "status": "KILLED", "time": last["time"]}
        os.write(fd, b"\n" + json.dumps(finish).encode() + b"\n")


def _remove(journal: Path) -> None:
    journal.unlink()
    journal.with_suffix(".ack").unlink(missing_ok=True)
