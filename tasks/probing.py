"""Probes of an encoder while it learns: what its z says of where things are, and which checkpoint says most.

```
 <work>/probes/00000500.json    what was found at step 500; 0 is the encoder before it learnt anything
 <work>/best/step-00000500/     a copy of the checkpoint that has the best score so far
```
Where things are is known to the simulator alone (`data.sim.privileged`). Of data that was recorded elsewhere it is not;
there z is asked for the state that it was given.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import BadInput
from data.store import MANIFEST
from tasks.chunks import TABLE
from tasks.dataset import read_set
from tasks.recipe import rebuild
from tasks.stages import Work
from tasks.training import Job

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from data.loader import ChunkSource
    from data.training_set import Member
    from models.encoder import Encoder
    from models.probe import Probe

ROWS = 2000  # observations to fit a probe on, and at most as many to score it on
EPISODES = 200  # that the former are drawn from
STILL = 1e-3  # of a component: with a deviation below it there is nothing to be said


class Probing:
    """The probes of one training, and what they chose."""

    def __init__(self, folder: Path, job: Job | Work) -> None:
        """`folder` is the training's work folder, which outlives a kill."""
        self.job, self.checkpoints = job, folder / "checkpoints"
        self.records, self.bests = folder / "probes", folder / "best"

    def begin(self, encoder: "Encoder") -> None:
        """Probe the untrained encoder, and the newest checkpoint if a kill came between it and its probe."""
        from models.checkpoint import latest, verify

        if not self._record(0).exists():
            self._note(0, self._probe(encoder))
        newest = latest(self.checkpoints)
        if newest and not self._record(step := verify(newest)["step"]).exists():
            self.look(step)

    def look(self, step: int) -> dict[str, float]:
        """Probe the checkpoint of `step`, keep it if it is the best so far; what to draw."""
        from models.checkpoint import load_encoder

        checkpoint = self.checkpoints / f"step-{step:08d}"
        found = self._probe(load_encoder(checkpoint))
        others = [r["score"] for r in self._found() if 0 < r["step"] != step]
        if not others or found.score > max(others):
            self._keep(checkpoint)
        self._note(step, found)
        self._drop_worse()
        return {"probe_r2": found.score, "probe_rank": found.rank}

    def best(self) -> Path:
        """The checkpoint with the best score."""
        return self.bests / f"step-{self._chosen():08d}"

    def summary(self) -> dict[str, Any]:
        """Every probe, and the step that was chosen."""
        untrained, *trained = self._found()
        return {"untrained": untrained, "trained": trained, "best": self._chosen()}

    def _chosen(self) -> int:
        return max(self._found()[1:], key=lambda record: record["score"])["step"]

    def _probe(self, encoder: "Encoder") -> "Probe":
        from models.devices import best_device
        from models.probe import encode, probe

        encoder, asked = encoder.to(best_device()), self._questions
        fitted, scored = asked.fitted, asked.scored
        return probe(encode(encoder, fitted.source), fitted.y, encode(encoder, scored.source), scored.y)

    def _keep(self, checkpoint: Path) -> None:
        part = self.bests / f".{checkpoint.name}.part"
        for old in (part, self.bests / checkpoint.name):
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(checkpoint, part)
        part.rename(self.bests / checkpoint.name)

    def _drop_worse(self) -> None:
        for kept in self.bests.glob("step-*"):
            if kept != self.best():
                shutil.rmtree(kept)

    def _note(self, step: int, found: "Probe") -> None:
        record = self._record(step)
        record.parent.mkdir(exist_ok=True)
        part = record.with_suffix(".part")
        r2 = dict(zip(self._questions.names, found.r2, strict=True))
        part.write_text(json.dumps({"step": step, "score": found.score, "rank": found.rank, "r2": r2}))
        part.rename(record)

    def _record(self, step: int) -> Path:
        return self.records / f"{step:08d}.json"

    def _found(self) -> list[dict[str, Any]]:
        """In the order of the steps; of equal scores the first counts."""
        return [json.loads(path.read_text()) for path in sorted(self.records.glob("*.json"))]

    @cached_property
    def _questions(self) -> "Questions":
        return questions(self.job)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Observations, and what is true of them."""

    source: "ChunkSource"
    y: "Float[np.ndarray, 'n k']"


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What z is asked."""

    names: tuple[str, ...]  # of the components of y
    fitted: Part  # of training episodes
    scored: Part  # of held-out ones


def questions(job: Job | Work) -> Questions:
    """Where bodies were, or what the state was. Raises `BadInput` where no episode is held out."""
    import numpy as np

    members = read_set(job.upstream("dataset")[0]).members
    every = -(-sum(len(m.train) for m in members) // EPISODES)
    episodes = [m.train[i % every :: every] for i, m in enumerate(members)], [m.held_out for m in members]
    if not any(episodes[1]):
        raise BadInput("represent: no episode is held out to probe the encoder on; raise dataset.held_out")
    sources = [_source(job, chosen) for chosen in episodes]
    names, truth = _truth(job, members, [[*a, *b] for a, b in zip(*episodes, strict=True)])
    y = [_rows_of(source, truth) for source in sources]
    moving = np.flatnonzero(y[1].std(axis=0) > STILL)
    fitted, scored = (Part(source=s, y=rows[:, moving]) for s, rows in zip(sources, y, strict=True))
    return Questions(names=tuple(names[i] for i in moving), fitted=fitted, scored=scored)


def _source(job: Job | Work, episodes: "Sequence[Sequence[int]]") -> "ChunkSource":
    """At most `ROWS` chunks of these episodes, evenly spaced."""
    import numpy as np

    from data.loader import ChunkSource

    frames, chunks = job.upstream("frames"), job.upstream("chunks")
    whole = ChunkSource.open([f.dir for f in frames], [c.dir / TABLE for c in chunks], episodes)
    return whole.rows(np.linspace(0, len(whole) - 1, min(ROWS, len(whole))).astype(np.int64))


def _rows_of(source: "ChunkSource", truth: "Sequence[np.ndarray]") -> "Float[np.ndarray, 'n k']":
    """`truth` has a row per frame of each member."""
    import numpy as np

    return np.stack([truth[member][start] for member, start in zip(source.member, source.start, strict=True)])


def _truth(
    job: Job | Work, members: "Sequence[Member]", episodes: Sequence[Sequence[int]]
) -> "tuple[tuple[str, ...], list[np.ndarray]]":
    """Components, and for each member a row per frame; only those of `episodes` are filled in."""
    import numpy as np

    if any(member.stage != "collect" for member in members):
        from data.frames import open_frames

        stores = [open_frames(ref.dir) for ref in job.upstream("frames")]
        return tuple(c.name for c in stores[0].schema.state), [store.state for store in stores]
    where = [_positions(member, chosen) for member, chosen in zip(members, episodes, strict=True)]
    bodies = sorted(set.intersection(*(set(found) for found in where if found)))
    names = tuple(f"{body}.{axis}" for body in bodies for axis in "xyz")
    empty = [np.empty((0, 3))] * len(bodies)
    return names, [np.concatenate([found[body] for body in bodies] if found else empty, axis=1) for found in where]


def _positions(member: "Member", episodes: Sequence[int]) -> "dict[str, np.ndarray]":
    """Metres, per body and frame of the member; NaN in other episodes."""
    import numpy as np

    from data.sim.config import SimConfig
    from data.sim.privileged import body_positions
    from data.training_set import open_member

    dataset, found = open_member(member), {}
    made = json.loads((dataset.path / MANIFEST).read_text())["params"]
    config = rebuild(SimConfig, made["sim"])
    for episode in episodes:
        _, start, length = dataset.episodes.row(episode)
        for body, where in body_positions(config, dataset.read_episode(episode, images=False)).items():
            found.setdefault(body, np.full((member.steps, 3), np.nan))[start : start + length] = where
    return found
