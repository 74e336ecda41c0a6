"""The stage table, and `ensure`: the one way a stage's work gets done, whichever front asks.

```
 collect --+--> frames --+
   (adopt) |             |
           +--> chunks --+--> train --> evaluate --> (registry)
           +--> dataset -+------^
                         |      |
                         +--> relabel --> critic --+--> train --> evaluate --> compare      when a recipe improves
                         |       +--> branch (rollouts, used as those of collect)
                         +--> jepa --> encode --> train --> evaluate                        when a recipe represents
```
`collect`, `frames` and `chunks` are made per batch of episodes, so a night costs what is new in it. A stage's key is
made of its parameters, the digests of its upstream artefacts and of the code it stands on; `flywheel stage` (which
`dvc.yaml` runs), `flywheel nightly` and a Prefect deployment all come here and so share every artefact.
"""

import contextvars
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from data.refs import Ref
from data.registry import Registry
from data.store import Build, Inputs, Store
from tasks.code import code_digests
from tasks.explain import why_stale


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table."""

    body: str  # "module:function" of (build, work) -> None, which fills build.out
    upstream: tuple[str, ...]  # stages whose artefacts it reads
    libraries: tuple[str, ...]  # whose versions may change the answer
    about: str  # one line for people
    per_batch: bool = False  # one artefact per batch of episodes, not one per recipe


STAGES: dict[str, Stage] = {
    "collect": Stage(
        body="tasks.collect:record_batch",
        upstream=("train",),
        libraries=("sapien", "lerobot", "av"),
        about="rollouts of one batch of seeds as a finalized LeRobot v3 dataset",
        per_batch=True,
    ),
    "adopt": Stage(
        body="tasks.adopt:copy_checked",
        upstream=(),
        libraries=(),
        about="a LeRobot dataset recorded elsewhere, checked",
        per_batch=True,
    ),
    "frames": Stage(
        body="tasks.frames:decode_frames",
        upstream=("collect", "adopt", "branch"),
        libraries=("av",),
        about="the batch's videos as a memory-mapped uint8 frame store",
        per_batch=True,
    ),
    "chunks": Stage(
        body="tasks.chunks:build_chunk_table",
        upstream=("collect", "adopt", "branch"),
        libraries=("polars",),
        about="sub-goal events and chunk transitions of the batch",
        per_batch=True,
    ),
    "dataset": Stage(
        body="tasks.dataset:aggregate_members",
        upstream=("collect", "adopt", "branch"),
        libraries=(),
        about="the list of batches, the held-out split, the normalisation statistics",
    ),
    "language": Stage(
        body="tasks.language:write_embeddings",
        upstream=("dataset",),
        libraries=("torch", "transformers", "tokenizers"),
        about="the tasks of a training set as CLIP's vectors",
    ),
    "jepa": Stage(
        body="tasks.jepa:learn_encoder",
        upstream=("dataset", "frames", "chunks", "language"),
        libraries=("torch", "transformers", "sapien"),
        about="an encoder that foretells its own next state, chosen by what it knows",
    ),
    "encode": Stage(
        body="tasks.encode:encode_chunks",
        upstream=("jepa", "frames", "chunks"),
        libraries=("torch", "transformers"),
        about="what a frozen encoder says of every chunk's first observation",
        per_batch=True,
    ),
    "relabel": Stage(
        body="tasks.relabel:propose_actions",
        upstream=("collect", "adopt", "frames", "chunks", "train"),
        libraries=("torch", "lerobot", "transformers"),
        about="the chunks that a policy would have executed, beside those that were",
        per_batch=True,
    ),
    "branch": Stage(
        body="tasks.branch:record_branches",
        upstream=("collect", "relabel", "train"),
        libraries=("sapien", "lerobot", "av", "torch", "transformers"),
        about="proposals executed in the simulator, as rollouts of their own",
        per_batch=True,
    ),
    "critic": Stage(
        body="tasks.critic:learn_critic",
        upstream=("dataset", "frames", "chunks", "relabel"),
        libraries=("torch",),
        about="Q and V over chunks, and their judgement of every chunk",
    ),
    "train": Stage(
        body="tasks.train:train_policy",
        upstream=("dataset", "frames", "chunks", "language", "jepa", "encode", "relabel", "critic", "train"),
        libraries=("torch",),
        about="a policy checkpoint",
    ),
    "evaluate": Stage(
        body="tasks.evaluate:score_policy",
        upstream=("train", "dataset", "critic"),
        libraries=("sapien", "torch"),
        about="success on unseen seeds with its interval, videos, plot",
    ),
    "compare": Stage(
        body="tasks.compare:compare_scores",
        upstream=("evaluate",),
        libraries=("scipy",),
        about="two policies on the same seeds: who is better, and how sure that is",
    ),
}

# What carries work about, but has no say in what comes out of it: neither it nor what it imports is in a key.
INFRASTRUCTURE = frozenset(
    {
        *("data.store", "data.refs", "data.paths", "data.errors"),
        *("data.registry", "data.sim.registry", "models.registry"),  # what is chosen by name is in `parts`
        *("tasks.stages", "tasks.code", "tasks.explain", "tasks.progress"),
        *("tasks.recipe", "tasks.actors", "tasks.nights", "tasks.tracking", "tasks.versioning"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one unit of work."""

    stage: str
    label: str  # which unit, for people: "pick_cube seeds 0-19"
    ref: Ref
    cached: bool
    why: str  # why it ran, or "intact"
    seconds: float


@dataclass(kw_only=True)
class Session:
    """One run of a flow: what to force, and what became of each unit."""

    force: frozenset[str] = frozenset()
    dry: bool = False  # say what is stale and why, run nothing
    resume: bool = True  # go on from what a killed builder left in its work folder
    on_start: Callable[[str, str, str], None] = lambda stage, label, why: None
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    outcomes: list[Outcome] = field(default_factory=list)
    night: dict[str, Any] | None = None  # the resolved recipe, when this is a whole night
    run: Any = None  # the night's MLflow run, once something needs it


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the body of a stage is given beside the folders of its `Build`."""

    inputs: Inputs
    label: str
    session: Session

    @property
    def params(self) -> dict[str, Any]:
        return self.inputs.params

    @property
    def execution(self) -> dict[str, Any]:
        return self.inputs.execution or {}

    def upstream(self, stage: str) -> list[Ref]:
        """The upstream artefacts that `stage` made, in order."""
        return [ref for ref in self.inputs.parents if ref.stage == stage]


_session: contextvars.ContextVar[Session] = contextvars.ContextVar("session")


def current_session() -> Session:
    """The session of this run; one that reports to nobody when a stage is done on its own."""
    return _session.get(None) or Session()


@contextmanager
def session(current: Session) -> Iterator[Session]:
    """Every `ensure` inside reports to `current` and obeys it."""
    token = _session.set(current)
    try:
        yield current
    finally:
        _session.reset(token)


def inputs_of(
    stage: str,
    params: dict[str, Any],
    upstream: Sequence[Ref],
    *,
    parts: tuple[str, ...] = (),
    execution: dict[str, Any] | None = None,
) -> Inputs:
    """What the artefact is made from.

    parts: modules chosen by name in `params` (a scene, a head). execution: how it is made, which changes no byte of it.
    """
    row = STAGES[stage]
    code = code_digests((row.body.split(":")[0], *parts), row.libraries, without=INFRASTRUCTURE)
    return Inputs(stage=stage, params=params, parents=tuple(upstream), code=code, execution=execution)


def ensure(
    stage: str,
    params: dict[str, Any],
    upstream: Sequence[Ref] = (),
    *,
    label: str = "",
    parts: tuple[str, ...] = (),
    execution: dict[str, Any] | None = None,
) -> Ref:
    """The artefact of one unit of work: found if it is there and intact, made otherwise.

    Inside a Prefect flow this is a task run, shown as Cached when nothing had to be done.
    """
    current = current_session()
    inputs = inputs_of(stage, params, upstream, parts=parts, execution=execution)
    if current.dry:
        outcome = _foresee(inputs, label, current)
    elif (orchestration := _orchestration()) and orchestration.in_flow():
        outcome = orchestration.run_as_task(inputs, label, current)
    else:
        outcome = perform(inputs, label, current)
    current.outcomes.append(outcome)
    current.on_outcome(outcome)
    return outcome.ref


def perform(inputs: Inputs, label: str, current: Session) -> Outcome:
    """Find or make the artefact, here and now."""
    store = Store()
    started = time.monotonic()
    forced = inputs.stage in current.force
    ref, fault = store.find(inputs.stage, inputs.key)
    why = "forced" if forced else "intact" if ref else _why(inputs, store, fault)
    if ref is None or forced:
        current.on_start(inputs.stage, label, why)
    work = Work(inputs=inputs, label=label, session=current)
    ref, cached = store.ensure(inputs, lambda build: _body(inputs)(build, work), force=forced, resume=current.resume)
    return Outcome(stage=inputs.stage, label=label, ref=ref, cached=cached, why=why, seconds=time.monotonic() - started)


def _why(inputs: Inputs, store: Store, fault: str) -> str:
    return why_stale(inputs, store, fault, per_batch=STAGES[inputs.stage].per_batch)


def _foresee(inputs: Inputs, label: str, current: Session) -> Outcome:
    waiting = [p.stage for p in inputs.parents if not p.digest]
    store = Store()
    ref, fault = (None, "") if waiting else store.find(inputs.stage, inputs.key)
    if waiting:
        why = f"upstream {', '.join(sorted(set(waiting)))} will be made anew"
    elif inputs.stage in current.force:
        why = "forced"
    else:
        why = "intact" if ref else _why(inputs, store, fault)
    # No digest: what is stale has none yet, and whoever stands on it learns from that.
    stale = Ref(stage=inputs.stage, key=inputs.key, digest="", path="")
    return Outcome(
        stage=inputs.stage,
        label=label,
        ref=ref if ref and why == "intact" else stale,
        cached=why == "intact",
        why=why,
        seconds=0.0,
    )


def _body(inputs: Inputs) -> Callable[[Build, Work], None]:
    return Registry("stage", {name: row.body for name, row in STAGES.items()}).resolve(inputs.stage)


def _orchestration() -> Any:
    """Prefect's side, if anybody has imported Prefect: without it there can be no flow."""
    return import_module("tasks.orchestration") if "prefect" in sys.modules else None
