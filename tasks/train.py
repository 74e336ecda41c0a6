"""Training: a policy from the training set, followed live in MLflow, resumed after a kill where it stopped."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from data.refs import Ref
from data.store import Build
from models.config import FitConfig, PolicyConfig
from models.registry import BACKBONES, HEADS, PHASES
from tasks.chunks import TABLE
from tasks.dataset import read_set
from tasks.nights import phase_run
from tasks.progress import progress
from tasks.recipe import Recipe
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from data.loader import ChunkSource

PHASE = "bc"  # behaviour cloning
LOG_EVERY = 20  # optimizer steps between two points of a curve


def train_checkpoint(recipe: Recipe, dataset: Ref, frames: list[Ref], chunks: list[Ref]) -> Ref:
    """The recipe's policy, trained."""
    whole = recipe.to_json()
    return ensure(
        "train",
        {"policy": whole["policy"], "fit": whole["fit"], "horizon": recipe.chunks.horizon},
        [dataset, *frames, *chunks],
        label=f"{recipe.policy.backbone} + {recipe.policy.head}",
        parts=_parts(recipe.policy),
    )


def _parts(policy: PolicyConfig) -> tuple[str, ...]:
    """The modules that a policy's names stand for. Raises `BadInput` with a did-you-mean."""
    return BACKBONES.module(policy.backbone), HEADS.module(policy.head), PHASES.module(PHASE)


def train_policy(build: Build, work: Work) -> None:
    """The body of the `train` stage."""
    from data.loader import batches
    from models.fit import fit
    from models.policy import Policy, PolicySpec

    params, dataset = work.params, work.upstream("dataset")[0]
    whole, config = read_set(dataset), FitConfig(**params["fit"])
    spec = PolicySpec(config=PolicyConfig(**params["policy"]), schema=whole.schema, horizon=params["horizon"])
    source = _source(work)
    with (
        phase_run(work, datasets=[dataset]) as run,
        progress(work.label, config.steps, "steps") as advance,
    ):
        shown = 0

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            nonlocal shown
            if step % LOG_EVERY == 0 or step == config.steps:
                run.log(step, metrics)
            advance(step - shown, note=f"loss {metrics['loss']:.4f}")  # the first may follow a checkpoint
            shown = step

        final = fit(
            Policy.build(spec, whole.stats, seed=config.seed),
            lambda step: batches(source, config.batch_size, seed=config.seed, start_step=step),
            config,
            build.work,
            phase_name=PHASE,
            on_metrics=on_metrics,
            provenance={"dataset": dataset.digest},
        )
    _take(final, build.out)


def _source(work: Work) -> "ChunkSource":
    from data.loader import ChunkSource

    members = read_set(work.upstream("dataset")[0]).members
    frames, chunks = work.upstream("frames"), work.upstream("chunks")
    return ChunkSource.open(
        [f.dir for f in frames],
        [c.dir / TABLE for c in chunks],
        episodes=[m.train for m in members],
    )


def _take(checkpoint: Path, out: Path) -> None:
    """The final checkpoint, all of it: later training may go on from its state."""
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
