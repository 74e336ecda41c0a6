"""Training: a policy from the training set, followed live in MLflow, resumed after a kill where it stopped.

```
 train_checkpoint     a new policy clones what was executed                          phase bc
                      ... by what an encoder, learnt first, says of it               phase flow_matching
 continue_cloning     ... and goes on, on more data                                  phase bc, from a parent's weights
 improve_checkpoint   the same weights and data, each chunk by what it was worth     phase chunk_policy, with a critic
```
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.refs import Ref
from data.store import Build, Store
from models.config import PolicyConfig
from models.registry import PHASES, modules
from tasks.chunks import TABLE
from tasks.critic import read_values_of
from tasks.dataset import read_set
from tasks.encode import encode_batches, read_encodings
from tasks.jepa import ENCODER, train_encoder
from tasks.language import fill_in, language_of, with_tasks
from tasks.recipe import Recipe, jsonable
from tasks.relabel import proposed
from tasks.stages import Work, ensure
from tasks.training import LOG_EVERY, Job, trained

if TYPE_CHECKING:
    import numpy as np

    from data.loader import ChunkSource
    from models.policy import Policy


BC, CHUNK_POLICY, FLOW_MATCHING = "bc", "chunk_policy", "flow_matching"
EFFECTIVE, ADVANTAGES = "pictures/effective_samples.png", "pictures/advantages.png"


def train_checkpoint(recipe: Recipe, dataset: Ref, frames: list[Ref], chunks: list[Ref]) -> Ref:
    """The recipe's policy, cloned; of a recipe that has `represent`, by the encoder that is learnt before it."""
    if recipe.represent:
        return _act_by_encoder(recipe, dataset, frames, chunks)
    policy = jsonable(recipe.policy)
    upstream = [dataset, *frames, *chunks, *language_of(policy, dataset)]
    return train_phase(BC, {}, policy, jsonable(recipe.fit), recipe.chunks.horizon, upstream, label=recipe.policy.parts)


def _act_by_encoder(recipe: Recipe, dataset: Ref, frames: list[Ref], chunks: list[Ref]) -> Ref:
    encoder = train_encoder(recipe, dataset, frames, chunks)
    encodings = encode_batches(recipe, encoder, frames, chunks)
    return train_phase(
        FLOW_MATCHING,
        {},
        jsonable(recipe.policy),
        jsonable(recipe.fit),
        recipe.chunks.horizon,
        [dataset, *frames, *chunks, encoder, *encodings],
        label=f"{recipe.policy.head} on a frozen {recipe.policy.backbone}",
    )


def continue_cloning(recipe: Recipe, parent: Ref, dataset: Ref, frames: list[Ref], chunks: list[Ref]) -> Ref:
    """What improvement is measured against: cloning goes on for as many steps, on the same data."""
    assert recipe.improve is not None
    upstream = [parent, dataset, *frames, *chunks]
    return train_phase(BC, {}, *_of(parent, recipe), upstream, label="cloning, continued")


def improve_checkpoint(
    recipe: Recipe,
    parent: Ref,
    dataset: Ref,
    frames: list[Ref],
    chunks: list[Ref],
    critic: Ref,
    proposals: list[Ref],
) -> Ref:
    """The parent's weights, trained on chunks by what the critic thinks of them."""
    assert recipe.improve is not None
    loss = recipe.improve.policy_loss
    ranked = proposals if loss.imitate == "best_of_k" else []
    upstream = [parent, dataset, *frames, *chunks, critic, *ranked]
    return train_phase(
        CHUNK_POLICY, jsonable(loss), *_of(parent, recipe), upstream, label=f"offline RL, {loss.imitate}"
    )


def _of(parent: Ref, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any], int]:
    """The policy and horizon of the parent's weights, and how long they train."""
    assert recipe.improve is not None
    if not parent.digest:  # foreseen only (--explain): the recipe's own is about to be made
        return jsonable(recipe.policy), jsonable(recipe.improve.fit), recipe.chunks.horizon
    made = Store().manifest(parent)["params"]
    return made["policy"], jsonable(recipe.improve.fit), made["horizon"]


def train_phase(
    phase: str,
    options: dict[str, Any],
    policy: dict[str, Any],
    fit: dict[str, Any],
    horizon: int,
    upstream: list[Ref],
    *,
    label: str,
    log_every: int = LOG_EVERY,
) -> Ref:
    """A policy trained by the registered `phase`.

    `upstream` has the dataset, its frame stores and chunk tables in step, and what the phase needs beside them: a
    parent's checkpoint, a critic, proposals.
    """
    return ensure(
        "train",
        {"policy": policy, "fit": fit, "horizon": horizon, "phase": phase, "options": options},
        upstream,
        label=label,
        parts=(*modules(policy), PHASES.module(phase)),
        execution={"log_every": log_every},
    )


def train_policy(build: Build, work: Work) -> None:
    """The body of the `train` stage."""
    effective = _Curve(build.work / "effective.jsonl")
    final = trained(
        build,
        work,
        train_job,
        note=lambda metrics: f"loss {metrics['loss']:.4f}",
        on_point=lambda step, metrics: effective.add(step, metrics.get("ess")),
    )
    shutil.copytree(final, build.out, dirs_exist_ok=True)  # all of it: later training may go on from its state
    if work.upstream("critic"):
        _draw(build.out, work, effective.points())


def _draw(out: Path, work: Work, effective: list[tuple[int, float]]) -> None:
    """How unequally the chunks counted: which advantages there are, and how many samples of a batch were in effect."""
    import numpy as np

    from models.critic_pictures import plot_advantages, plot_effective_samples

    judged = read_values_of(work.upstream("critic")[0], len(work.upstream("chunks")))
    (out / EFFECTIVE).parent.mkdir()
    plot_effective_samples(effective, out / EFFECTIVE)
    beta, max_weight = work.params["options"]["beta"], work.params["options"]["max_weight"]
    plot_advantages(np.concatenate([v.advantage for v in judged]), beta, max_weight, out / ADVANTAGES)


def train_job(job: Job, on_metrics: Callable[[int, dict[str, float]], None]) -> Path:
    """One rank's part of a training."""
    from data.loader import batches
    from models.fit import fit
    from models.types import Transition

    params, config, source = job.params, job.fit, _source(job)
    dataset, parents = job.upstream("dataset")[0], job.upstream("train")
    rewarded = issubclass(PHASES.resolve(params["phase"]).reads, Transition)
    return fit(
        _policy(job),
        lambda step: batches(source, config.batch_size, seed=config.seed, start_step=step, with_next=rewarded),
        config,
        job.folder,
        phase_name=params["phase"],
        phase_options=params["options"],
        on_metrics=on_metrics,
        provenance={"dataset": dataset.digest} | ({"parent": parents[0].digest} if parents else {}),
    )


class _Curve:
    """Points that outlive a kill: what is drawn in the end is what an undisturbed run would draw."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, step: int, value: float | None) -> None:
        if value is not None:
            with self.path.open("a") as file:
                file.write(f"\n[{step}, {value!r}]")  # a line torn by a kill stays alone

    def points(self) -> list[tuple[int, float]]:
        """In order; a step done again after a kill came out the same and counts once. A torn line was done again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        pairs = [json.loads(line) for line in lines if line.startswith("[") and line.endswith("]")]
        return sorted({step: value for step, value in pairs}.items())


def _policy(job: Job) -> "Policy":
    """The parent's weights and normalisation, or a new policy fitted to the training set."""
    from models.checkpoint import load_encoder, load_policy
    from models.encoder import policy_on
    from models.policy import Policy, PolicySpec

    params, whole = job.params, read_set(job.upstream("dataset")[0])
    if parents := job.upstream("train"):
        return load_policy(parents[0].dir, fits=whole.schema)
    if encoders := job.upstream("jepa"):
        encoder = load_encoder(encoders[0].dir / ENCODER, fits=whole.schema)
        config = PolicyConfig.from_json(params["policy"])
        return policy_on(encoder, config, horizon=params["horizon"], seed=params["fit"]["seed"])
    language = job.upstream("language")
    config = with_tasks(PolicyConfig.from_json(params["policy"]), language)
    spec = PolicySpec(config=config, schema=whole.schema, horizon=params["horizon"])
    policy = Policy.build(spec, whole.stats, seed=params["fit"]["seed"])
    fill_in(policy, language)
    return policy


def _source(job: Job) -> "ChunkSource":
    from data.loader import ChunkSource

    members = read_set(job.upstream("dataset")[0]).members
    frames, chunks = job.upstream("frames"), job.upstream("chunks")
    source = ChunkSource.open(
        [f.dir for f in frames],
        [c.dir / TABLE for c in chunks],
        episodes=[m.train for m in members],
        beside=_beside(job),
    )
    return source.without_pictures() if job.upstream("encode") else source


def _beside(job: Job) -> "list[dict[str, np.ndarray]] | None":
    """What the phase's kind of batch has beside the chunks of each collection; None for cloning."""
    if encodings := job.upstream("encode"):
        return [{"z": read_encodings(ref)} for ref in encodings]
    proposals = job.upstream("relabel")
    if not job.upstream("critic"):
        return [{"proposals": proposed(ref)} for ref in proposals] or None
    columns = []
    for i, values in enumerate(read_values_of(job.upstream("critic")[0], len(job.upstream("chunks")))):
        columns.append({"advantage": values.advantage})
        if proposals:
            assert values.best is not None and values.agreed is not None, "the critic ranked what it was given"
            best = proposed(proposals[i])[range(len(values.best)), values.best]
            columns[-1] |= {"best": best, "agreed": values.agreed}
    return columns
