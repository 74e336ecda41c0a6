"""Progress of anything that lasts longer than two seconds: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
LINE_EVERY_S = 20.0  # without a terminal: seconds between two lines


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`."""
    if sys.stderr.isatty():
        columns = (
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            row = bar.add_task(what, total=total, note="")
            yield lambda n=1, note="": bar.update(row, advance=n, note=note)
    else:
        yield _lines(what, total, unit)


def _lines(what: str, total: int, unit: str) -> Callable[..., None]:
    started = last = time.monotonic()
    done = 0

    def advance(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= LINE_EVERY_S:
            last = now
            left = (now - started) / done * (total - done) if done else 0.0
            console.print(
                f"  {what}: {done}/{total} {unit}, {now - started:.0f} s, about {left:.0f} s left {note}".rstrip()
            )

    return advance
