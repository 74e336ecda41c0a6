"""What every stage that trains has in common: a job that can go to another process, live curves, a progress bar."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.refs import Ref
from data.store import Build
from models.config import FitConfig
from tasks.nights import phase_run
from tasks.progress import progress
from tasks.stages import Work

LOG_EVERY = 20  # optimizer steps between two points of a curve

Metrics = dict[str, float]
Train = Callable[["Job", Callable[[int, Metrics], None]], Path]


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a training process needs to know; can be pickled."""

    params: dict[str, Any]
    parents: tuple[Ref, ...]
    folder: Path  # where checkpoints go

    def upstream(self, stage: str) -> list[Ref]:
        """The upstream artefacts that `stage` made, in order."""
        return [ref for ref in self.parents if ref.stage == stage]

    @property
    def fit(self) -> FitConfig:
        return FitConfig(**self.params["fit"])


def trained(
    build: Build,
    work: Work,
    train: Train,
    *,
    note: Callable[[Metrics], str],
    on_point: Callable[[int, Metrics], None] = lambda step, metrics: None,
) -> Path:
    """The final checkpoint of `train`, run in as many processes as its `fit` says, followed live in MLflow.

    `train` is a function of a module. note: what the progress bar says. on_point: also told what is logged.
    """
    from models.ranks import in_ranks

    job = Job(params=work.params, parents=tuple(work.inputs.parents), folder=build.work)
    every, steps = work.execution.get("log_every", LOG_EVERY), job.fit.steps
    with phase_run(work, datasets=work.upstream("dataset")) as run, progress(work.label, steps, "steps") as advance:
        shown = 0

        def on_metrics(step: int, metrics: Metrics) -> None:
            nonlocal shown
            if step % every == 0 or step == steps:
                run.log(step, metrics)
                on_point(step, metrics)
            advance(step - shown, note=note(metrics))  # the first may follow a checkpoint
            shown = step

        return in_ranks(train, job, job.fit.processes, on_metrics)
