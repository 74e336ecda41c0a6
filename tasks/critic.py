"""The critic: what every decision in the data was worth, judged once for all that learn from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.refs import Ref
from data.store import Build
from models.config import CriticConfig
from models.registry import BACKBONES, PHASES
from tasks.chunks import TABLE
from tasks.dataset import read_set
from tasks.progress import progress
from tasks.recipe import Recipe, jsonable
from tasks.relabel import proposed
from tasks.stages import Work, ensure
from tasks.training import Job, trained

if TYPE_CHECKING:
    from data.loader import ChunkSource
    from data.values import Values

PHASE = "chunk_critic"
CRITIC, SUMMARY = "critic", "critic.json"  # the checkpoint's folder, and numbers for people
CALIBRATION, FILM = "calibration.png", "value_film.png"


def train_critic(recipe: Recipe, dataset: Ref, frames: list[Ref], chunks: list[Ref], proposals: list[Ref]) -> Ref:
    """The critic of the recipe's `improve` over all of `dataset`, and its judgement of every chunk."""
    asked = recipe.improve
    assert asked is not None
    return ensure(
        "critic",
        {
            "critic": jsonable(asked.critic),
            "loss": jsonable(asked.critic_loss),
            "fit": jsonable(asked.critic_fit),
            "horizon": recipe.chunks.horizon,
        },
        [dataset, *frames, *chunks, *proposals],
        label=f"{asked.critic_loss.algorithm} over {len(frames)} batches",
        parts=(BACKBONES.module(asked.critic.backbone), PHASES.module(PHASE)),
    )


def read_values_of(critic: Ref, count: int) -> "list[Values]":
    """What it thinks of the chunks of each of `count` tables, in the order it was given them."""
    from data.values import read_values

    return [read_values(critic.dir / _values(i)) for i in range(count)]


def read_critic(ref: Ref) -> dict[str, float]:
    """How well its Q foretells what followed, and how much its advantages differ."""
    return json.loads((ref.dir / SUMMARY).read_text())


def learn_critic(build: Build, work: Work) -> None:
    """The body of the `critic` stage."""
    from models.checkpoint import load_critic

    checkpoint = trained(build, work, critic_job, note=lambda m: f"Q loss {m['q_loss']:.4f}, V {m['v']:.2f}")
    critic = load_critic(checkpoint)
    shutil.copytree(checkpoint, build.out / CRITIC, dirs_exist_ok=True)
    sources = [_source(work, only=i) for i in range(len(work.upstream("frames")))]
    judged = _judge(build, work, critic, sources)
    numbers = _pictures(build.out, work, judged)
    (build.out / SUMMARY).write_text(json.dumps(numbers, indent=1, sort_keys=True))


def critic_job(job: Job, on_metrics: Callable[[int, dict[str, float]], None]) -> Path:
    """One rank's part of the training."""
    from data.loader import batches
    from models.critic import Critic, CriticSpec
    from models.fit import fit

    params, dataset, config = job.params, job.upstream("dataset")[0], job.fit
    whole, source = read_set(dataset), _source(job)
    spec = CriticSpec(config=CriticConfig(**params["critic"]), schema=whole.schema, horizon=params["horizon"])
    return fit(
        Critic.build(spec, whole.stats, seed=config.seed),
        lambda step: batches(source, config.batch_size, seed=config.seed, start_step=step, with_next=True),
        config,
        job.folder,
        phase_name=PHASE,
        phase_options=params["loss"],
        on_metrics=on_metrics,
        provenance={"dataset": dataset.digest},
    )


def _source(work: Work | Job, only: int | None = None) -> "ChunkSource":
    """The training episodes of all batches, or everything in one of them; proposals beside them if there are."""
    from data.loader import ChunkSource

    members = read_set(work.upstream("dataset")[0]).members
    frames, chunks, proposals = (work.upstream(stage) for stage in ("frames", "chunks", "relabel"))
    which = range(len(frames)) if only is None else [only]
    return ChunkSource.open(
        [frames[i].dir for i in which],
        [chunks[i].dir / TABLE for i in which],
        episodes=[members[i].train for i in which] if only is None else None,
        beside=[{"proposals": proposed(proposals[i])} for i in which] if proposals else None,
    )


def _judge(build: Build, work: Work, critic: Any, sources: "list[ChunkSource]") -> "list[Values]":
    from data.values import write_values
    from models.devices import best_device
    from models.judgement import judge

    critic, judged = critic.to(best_device()), []
    with progress(f"{work.label}: judging", sum(map(len, sources)), "chunks") as advance:
        for i, source in enumerate(sources):
            judged.append(judge(critic, source, advance))
            write_values(judged[-1], build.out / _values(i))
    return judged


def _values(i: int) -> str:
    return f"values-{i:04d}.parquet"


def _pictures(out: Path, work: Work, judged: "list[Values]") -> dict[str, float]:
    """Draw what a person looks at; returns the numbers behind it."""
    import numpy as np

    from data.chunks import read_chunks
    from data.values import realised_return
    from models.critic_pictures import plot_calibration

    tables = [read_chunks(ref.dir / TABLE) for ref in work.upstream("chunks")]
    realised = np.concatenate([realised_return(t) for t in tables])
    q = np.concatenate([v.q.min(axis=1) for v in judged])
    advantage = np.concatenate([v.advantage for v in judged])
    plot_calibration(q, realised, out / CALIBRATION)
    _film(out / FILM, work, tables, judged)
    agreed = [v.agreed for v in judged if v.agreed is not None]
    return {
        "chunks": len(q),
        "correlation": float(np.corrcoef(q, realised)[0, 1]),
        "bias": float((q - realised).mean()),
        "advantage_std": float(advantage.std()),
        **({"agreed": float(np.concatenate(agreed).mean())} if agreed else {}),
    }


def _film(path: Path, work: Work, tables: list[Any], judged: "list[Values]") -> None:
    """V along the longest success of the last batch that has one (of any episode if none has)."""
    import polars as pl

    from data.frames import open_frames
    from models.critic_pictures import plot_value_film

    for i in range(len(tables) - 1, -1, -1):
        ends = tables[i].rows.group_by("episode_index").agg(pl.col("terminal").any(), pl.len()).sort("len")
        if ends["terminal"].any() or i == 0:
            break
    wanted = ends.filter(pl.col("terminal")) if ends["terminal"].any() else ends
    episode = wanted["episode_index"][-1]
    frames, rows = open_frames(work.upstream("frames")[i].dir), tables[i].rows
    mine = (rows["episode_index"] == episode).to_numpy()
    camera = frames.schema.cameras[0]
    events = _events(work, i, episode)
    pictures = frames.images[camera][rows.filter(pl.Series(mine))["start"].to_numpy()]
    plot_value_film(pictures, judged[i].v[mine], events, f"V along episode {episode} of batch {i}", path)


def _events(work: Work, batch: int, episode: int) -> dict[str, int]:
    """The step whose action first made each sub-goal true."""
    import polars as pl

    from data.lerobot import open_dataset
    from data.store import Store
    from data.subgoals import EVENT, RisingEdge

    parent = Store().manifest(work.upstream("chunks")[batch])["parents"][0]
    ref, why = Store().find(parent["stage"], parent["key"])
    assert ref is not None, why
    dataset = open_dataset(ref.dir)
    at_reset = dataset.at_reset.fill_null(False)
    steps = RisingEdge()(dataset.steps.lazy(), at_reset).filter(pl.col("episode_index") == episode).collect()
    happened = {
        name: steps["frame_index"].filter(steps[name]) for name in steps.columns if name.startswith(f"{EVENT}.")
    }
    return {name.removeprefix(f"{EVENT}."): int(when[0]) for name, when in happened.items() if len(when)}
