"""An encoder that foretells its own next state, probed at every checkpoint; the one that knows most is published.

```
 step      0 ........ save_every ........ 2 save_every ........ steps
 probe     random     R² of what z says of where things are, on held-out episodes; the best of these is `encoder`
```
The loss cannot choose: its target moves with it, and is easiest to hit by an encoder that has collapsed.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.refs import Ref
from data.store import Build
from models.config import ReaderConfig
from models.registry import BACKBONES, PHASES
from tasks.actors import artefact_in
from tasks.chunks import TABLE
from tasks.dataset import read_set
from tasks.language import fill_in, language_of, with_tasks
from tasks.probing import Probing
from tasks.recipe import Recipe, jsonable
from tasks.stages import Work, ensure
from tasks.training import Job, trained

if TYPE_CHECKING:
    from data.loader import ChunkSource
    from models.encoder import Encoder

PHASE = "jepa"
ENCODER, LAST = "encoder", "last"  # checkpoints: the one that the probe chose, and the one that training ended with
PROBES, CURVE = "probes.json", "probes.png"


def train_encoder(recipe: Recipe, dataset: Ref, frames: list[Ref], chunks: list[Ref]) -> Ref:
    """The encoder of the recipe's `represent`: the one it starts from, or a new one."""
    asked = recipe.represent
    assert asked is not None
    if asked.start:
        return artefact_in(asked.start, "represent.start", made_by="jepa")
    policy = jsonable(recipe.policy)
    return ensure(
        "jepa",
        {
            "encoder": {f.name: policy[f.name] for f in fields(ReaderConfig)},
            "loss": jsonable(asked.loss),
            "fit": jsonable(asked.fit),
        },
        [dataset, *frames, *chunks, *language_of(policy, dataset)],
        label=f"{recipe.policy.backbone}, temporal JEPA",
        parts=(BACKBONES.module(recipe.policy.backbone), PHASES.module(PHASE)),
    )


def read_probes(ref: Ref) -> dict[str, Any]:
    """What each checkpoint's z said of where things are, and an untrained encoder's."""
    return json.loads((ref.dir / PROBES).read_text())


def learn_encoder(build: Build, work: Work) -> None:
    """The body of the `jepa` stage."""
    from models.probe_pictures import plot_probes

    final = trained(build, work, encoder_job, note=lambda m: f"loss {m['loss']:.4f}, rank {m['jepa_rank']:.1f}")
    probing = Probing(build.work, work)
    shutil.copytree(probing.best(), build.out / ENCODER)
    shutil.copytree(final, build.out / LAST)
    found = probing.summary()
    (build.out / PROBES).write_text(json.dumps(found, indent=1, sort_keys=True))
    plot_probes(found, build.out / CURVE)


def encoder_job(job: Job, on_metrics: Callable[[int, dict[str, float]], None]) -> Path:
    """One rank's part of the training; the first one probes."""
    from data.loader import batches
    from models.fit import fit

    params, config, dataset = job.params, job.fit, job.upstream("dataset")[0]
    source, encoder = one_step(_source(job)), _new(job)
    probing = Probing(job.folder, job) if os.environ.get("RANK", "0") == "0" else None

    def after(step: int, metrics: dict[str, float]) -> None:
        if probing and (step % config.save_every == 0 or step == config.steps):
            metrics = metrics | probing.look(step)
        on_metrics(step, metrics)

    if probing:
        probing.begin(encoder)
    return fit(
        encoder,
        lambda step: batches(source, config.batch_size, seed=config.seed, start_step=step, with_next=True),
        config,
        job.folder,
        phase_name=PHASE,
        phase_options=params["loss"] | {"total_steps": config.steps},
        on_metrics=after,
        provenance={"dataset": dataset.digest},
    )


def one_step(source: "ChunkSource") -> "ChunkSource":
    """The first action of each chunk, and the observation right after it. An episode's last action has none."""
    import numpy as np

    moved = source.rows(np.flatnonzero(source.next > source.start))
    return replace(moved, horizon=1, next=moved.start + 1, h=np.ones_like(moved.h))


def _source(job: Job) -> "ChunkSource":
    from data.loader import ChunkSource

    members = read_set(job.upstream("dataset")[0]).members
    frames, chunks = job.upstream("frames"), job.upstream("chunks")
    return ChunkSource.open([f.dir for f in frames], [c.dir / TABLE for c in chunks], [m.train for m in members])


def _new(job: Job) -> "Encoder":
    from models.encoder import Encoder, EncoderSpec

    whole, language = read_set(job.upstream("dataset")[0]), job.upstream("language")
    config = with_tasks(ReaderConfig(**job.params["encoder"]), language)
    spec = EncoderSpec(config=config, schema=whole.schema, horizon=1)
    encoder = Encoder.build(spec, whole.stats, seed=job.fit.seed)
    fill_in(encoder, language)
    return encoder
