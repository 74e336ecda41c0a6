"""Whoever proposes action chunks: a checkpoint of ours, LeRobot's PI0 and PI05, anything that acts.

```
 observation [b] --read once--> prefix --+--> chunk 0          noise [b k ...] in, chunks [b k h a] out:
                                         +--> chunk 1          a function of the observation and the noise alone
                                         +--> chunk k-1
```
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from data.errors import BadInput
from data.relabel import Ask, folder_digest
from data.schema import IMAGE, STATE, Schema
from data.store import canonical
from data.untrusted import fault
from models.checkpoint import INDEX, load_policy, read_json
from models.devices import best_device, threads, usable_threads
from models.pair import Pair
from models.policy import Policy
from models.seeds import derive
from models.types import Observation

if TYPE_CHECKING:
    from data.sim.policies import Policy as Acting

LEROBOT = "config.json"
PI0_KINDS = ("pi0", "pi05")


class Proposer(Protocol):
    """Anything that proposes chunks."""

    digest: str  # of the policy
    horizon: int  # h, its own
    noise_shape: tuple[int, ...]  # per chunk

    def provenance(self) -> dict[str, Any]:
        """kind, policy (digest), steps (of denoising, or None), normalization (digest)."""
        ...

    def propose(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h a"]:
        """Chunks in the environment's units; `observation` as recorded."""
        ...


class CheckpointProposer:
    """A policy of ours: the backbone reads an observation once for all its chunks."""

    def __init__(self, policy: Policy, digest: str) -> None:
        self.policy = policy.eval().requires_grad_(False)
        self.digest = digest
        self.horizon = policy.spec.horizon
        self.noise_shape = policy.noise_shape

    def provenance(self) -> dict[str, Any]:
        norm = hashlib.sha256(canonical(self.policy.norm_to_json()).encode()).hexdigest()
        steps = getattr(_head_config(self.policy), "steps", None)
        return {"kind": self.policy.spec.kind, "policy": self.digest, "steps": steps, "normalization": norm}

    def propose(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h a"]:
        return self.policy.propose(observation, noise)


class ActingProposer:
    """Anything with `act`: chunk k is what it does in the first step of an episode of its own, whose seed is the noise.

    A policy that does not look at the seed proposes the same K times.
    """

    noise_shape = (1,)

    def __init__(self, policy: "Acting", horizon: int) -> None:
        """`horizon` is how many actions `act` answers with."""
        self.policy = policy
        self.digest = policy.digest
        self.horizon = horizon

    def provenance(self) -> dict[str, Any]:
        return {"kind": "act", "policy": self.digest, "steps": None, "normalization": None}

    def propose(self, observation: Observation, noise: Float[Tensor, "b k 1"]) -> Float[Tensor, "b k h a"]:
        columns = {IMAGE + camera: pictures.numpy() for camera, pictures in observation.images.items()}
        columns[STATE] = observation.state.numpy()
        tasks, first = list(observation.tasks), [0] * len(observation)
        chunks = []
        for sample in noise[..., 0].unbind(dim=1):
            seeds = [derive("episode", float(x).hex()) for x in sample]
            chunks.append(torch.from_numpy(self.policy.act(columns, tasks, seeds, first)))
        return torch.stack(chunks, dim=1)


class ProposerPolicy:
    """A proposer as what a rollout asks: one chunk, its noise a function of (seed, step)."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self.digest = proposer.digest

    def reset(self, lane: int, seed: int) -> None:
        """Nothing to begin anew: a chunk is a function of the observation and (seed, step) alone."""

    def act(
        self, observation: dict[str, np.ndarray], tasks: list[str], seeds: list[int], steps: list[int]
    ) -> Float32[np.ndarray, "n h a"]:
        asked = Observation.of(observation, tasks)
        noise = [_noise(self.proposer, "act", seed, step) for seed, step in zip(seeds, steps, strict=True)]
        with torch.inference_mode(), threads(1):  # as `models.acting` does: one by one, whatever the company
            chunks = [self.proposer.propose(asked.rows(slice(i, i + 1)), n[None, None]) for i, n in enumerate(noise)]
        return torch.cat(chunks)[:, 0].cpu().numpy()


def asking(proposer: Proposer, *, samples: int, seed: int) -> Ask:
    """`proposer` as what `data.relabel` asks: the noise of a chunk's sample k follows from (seed, which chunk, k)."""

    def ask(columns: dict[str, Any], which: list[str]) -> Float32[np.ndarray, "b k h a"]:
        noise = [torch.stack([_noise(proposer, "relabel", seed, w, k) for k in range(samples)]) for w in which]
        with torch.inference_mode(), threads(usable_threads()):
            chunks = proposer.propose(Observation.of(columns, columns["task"]), torch.stack(noise))
        return chunks.cpu().numpy()

    return ask


def open_proposer(
    folder: Path | str,
    schema: Schema,
    *,
    digest: str = "",
    steps: int | None = None,
    cameras: Mapping[str, str] | None = None,
    state: tuple[str, ...] = (),
) -> Proposer:
    """Whoever lies in `folder`: a checkpoint of ours, or LeRobot's PI0 or PI05.

    schema: of the observations it will see and the actions it shall propose. digest: the folder's, if it is known.
    steps: of denoising, instead of the policy's own. cameras, state: see `models.pi0.load`.
    Raises `BadInput` for a folder that holds neither, is damaged, or was trained on something else.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return _of_checkpoint(folder, schema, digest or folder_digest(folder), steps)
    if not (folder / LEROBOT).is_file():
        remedy = "`flywheel fetch pi0_libero` gets one"
        raise fault(folder, LEROBOT, f"is missing, and {INDEX} too: neither LeRobot's pi0 nor a checkpoint", remedy)
    kind = read_json(folder / LEROBOT).get("type")
    if kind not in PI0_KINDS:
        raise fault(folder, LEROBOT, f"a LeRobot policy of type {kind!r}", f"use {' or '.join(PI0_KINDS)}")
    from models import pi0  # LeRobot and transformers take seconds to import

    known = digest or folder_digest(folder)
    return pi0.load(folder, schema, digest=known, steps=steps, cameras=cameras, state=state)


def _of_checkpoint(folder: Path, schema: Schema, digest: str, steps: int | None) -> CheckpointProposer:
    policy = load_policy(folder, fits=schema)
    if steps is not None:
        _set_steps(policy, steps)
    return CheckpointProposer(policy.to(best_device()), digest)


def _set_steps(policy: Policy, steps: int) -> None:
    config = _head_config(policy)
    if not hasattr(config, "steps"):
        spec = policy.spec
        what = f"head {spec.config.head!r}" if isinstance(policy, Pair) else f"policy {spec.kind!r}"
        raise BadInput(f"relabel.steps is {steps}, but {what} denoises nothing; leave it out")
    cast(Pair, policy).head.config = replace(config, steps=steps)


def _head_config(policy: Policy) -> Any:
    return getattr(policy.head, "config", None) if isinstance(policy, Pair) else None


def _noise(proposer: Proposer, *purpose: str | int) -> Tensor:
    """Drawn on the CPU, so that every device starts from the same."""
    return torch.randn(proposer.noise_shape, generator=torch.Generator().manual_seed(derive(*purpose)))
