"""The whole line without a server, in a process that can be killed: for tests of what a kill leaves behind."""

import multiprocessing
import os
import random
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from flows.recipes import load
from tasks.chunks import chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches
from tasks.evaluate import evaluate_checkpoint
from tasks.frames import frame_stores
from tasks.stages import Outcome, Session, session
from tasks.train import train_checkpoint

Digests = dict[str, list[str]]


def run_line(recipe: str, overrides: list[str], current: Session) -> list[Outcome]:
    """A recipe from rollouts to score."""
    night = load(recipe, overrides)
    with session(current):
        batches = collect_batches(night)
        frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
        dataset = aggregate_batches(night, batches)
        checkpoint = train_checkpoint(night, dataset, frames, chunks)
        evaluate_checkpoint(night, checkpoint, dataset)
    return current.outcomes


# A clean process that has everything imported and nothing started; children are forked from it in milliseconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    [
        "line",
        "models.fit",
        "models.acting",
        "models.evaluation",
        "data.loader",
        "data.validate",
        "tasks.tracking_system",
    ]
)


def in_child(
    root: Path, *, recipe: str = "debug", overrides: list[str] | None = None, kill_after: float | None = None
) -> list[Outcome] | None:
    """Run the line in a process of its own. `kill_after`: SIGKILL it so many seconds into the first unit that runs.

    Returns the outcomes, or None if it was killed.
    """
    here, there = FORKSERVER.Pipe(duplex=False)
    child = FORKSERVER.Process(target=_child, args=(there, root, recipe, overrides or [], kill_after))
    child.start()
    there.close()
    try:
        outcomes = here.recv()
    except EOFError:
        outcomes = None
    child.join()
    assert child.exitcode == (-signal.SIGKILL if outcomes is None else 0), (
        f"the line failed: exit code {child.exitcode}"
    )
    return outcomes


def _child(answer: Connection, root: Path, recipe: str, overrides: list[str], kill_after: float | None) -> None:
    os.environ["FLYWHEEL_ROOT"] = str(root)
    current = Session()
    if kill_after is not None:
        kill = (os.getpid(), signal.SIGKILL)
        current.on_start = lambda *_: threading.Timer(kill_after, os.kill, kill).start()
    outcomes = run_line(recipe, overrides, current)
    answer.send(outcomes)
    os._exit(0)  # a timer that is still waiting must not keep the process


def digests(outcomes: list[Outcome]) -> Digests:
    """Per stage, what was made."""
    made: Digests = {}
    for outcome in outcomes:
        made.setdefault(outcome.stage, []).append(outcome.ref.digest)
    return made


def delays(count: int, longest: float, seed: int) -> list[float]:
    """Moments to kill at, seconds; the small ones are the likely ones, where files are being moved into place."""
    rng = random.Random(seed)
    return [longest * rng.random() ** 2 for _ in range(count)]
