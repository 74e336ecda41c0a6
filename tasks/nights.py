"""A night: which one it is, and how MLflow shows it.

In MLflow a night is a parent run with a child per phase that really ran. Where nothing ran, nothing is logged.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from data.refs import Ref
from data.store import Store
from tasks import tracking
from tasks.recipe import Recipe
from tasks.stages import Session, Work, current_session, session
from tasks.tracking import RunHandle
from tasks.versioning import dvc_digest


def next_night(recipe: Recipe) -> Recipe:
    """`recipe` with one night more than were completed. A night that was killed is not complete, and goes on."""
    nights = completed_nights(recipe.name) + 1
    return replace(recipe, collect=replace(recipe.collect, nights=nights))


def nights_until(recipe: Recipe) -> list[Recipe]:
    """The recipe as it was on its first night, its second, ..., tonight."""
    return [
        replace(recipe, collect=replace(recipe.collect, nights=night)) for night in range(1, recipe.collect.nights + 1)
    ]


def completed_nights(recipe: str) -> int:
    """How many nights of the recipe of this name went through to the registry."""
    try:
        return json.loads(_record(recipe).read_text())["completed"]
    except FileNotFoundError:
        return 0


def complete(recipe: Recipe) -> None:
    """Note that the recipe's nights are through."""
    if recipe.collect.nights > completed_nights(recipe.name):
        record = _record(recipe.name)
        record.parent.mkdir(parents=True, exist_ok=True)
        part = record.with_suffix(".part")
        part.write_text(json.dumps({"completed": recipe.collect.nights}))
        part.rename(record)


def _record(recipe: str) -> Path:
    return Store().root / "nights" / recipe / "nights.json"


@contextmanager
def begin(recipe: Recipe) -> Iterator[Session]:
    """The session of one flow: the command line's if there is one, else (a deployment's run) a new one."""
    current = current_session()
    current.night = recipe.to_json()
    with session(current):
        try:
            yield current
        except BaseException as fault:
            if current.run is not None:
                current.run.finish("FAILED" if isinstance(fault, Exception) else "KILLED")
            raise


@contextmanager
def phase_run(work: Work, *, datasets: Sequence[Ref] = ()) -> Iterator[RunHandle]:
    """The MLflow run of one unit of work, a child of the night's if there is a night."""
    run = tracking.start_phase(
        _parent(work.session),
        work.inputs.stage,
        key=work.inputs.key,
        params=work.params,
        tags={"flywheel.label": work.label},
        system_metrics=True,
    )
    with run:
        for ref in datasets:
            run.input_dataset(f"{ref.stage}-{ref.key[:8]}", dvc_digest(ref.dir), ref.dir)
        yield run


def _parent(current: Session) -> RunHandle | None:
    """The night's own run, begun when it is first needed."""
    if current.night is not None and current.run is None:
        current.run = tracking.start_night(current.night["name"], current.night)
    return current.run
