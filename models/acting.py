"""A trained policy as what a rollout asks: arrays in, chunks out, noise a function of (seed, step)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from data.errors import BadInput
from data.schema import Schema
from models.checkpoint import load_critic, load_policy
from models.critic import Critic
from models.devices import best_device, threads
from models.policy import Policy
from models.seeds import derive
from models.types import Observation


class ActingPolicy:
    """Implements the rollout's protocol.

    On a CPU the questions are answered one by one with one thread, so that a chunk's bits do not depend on the company
    it was asked in: a matrix product of another height may round differently. A GPU gets the whole batch.
    """

    def __init__(self, policy: Policy, digest: str) -> None:
        """`digest` is the checkpoint's, and will be written on every episode."""
        self.policy = policy.eval().requires_grad_(False)
        self.digest = digest

    def reset(self, lane: int, seed: int) -> None:
        """Nothing to begin anew: a chunk is a function of the observation and (seed, step) alone."""

    def act(
        self, observation: dict[str, np.ndarray], tasks: Sequence[str], seeds: Sequence[int], steps: Sequence[int]
    ) -> Float32[np.ndarray, "n h a"]:
        """`observation` has dataset column names, each with a leading axis n; `steps` count from 0 in each episode."""
        asked = Observation.of(observation, tasks)
        one_by_one = self.policy.device.type == "cpu"
        size = 1 if one_by_one else len(asked)
        parts = [slice(i, i + size) for i in range(0, len(asked), size)]
        with torch.inference_mode(), threads(1):
            chunks = [self._answer(asked.rows(part), seeds[part], steps[part]) for part in parts]
        return torch.cat(chunks).cpu().numpy()

    def _answer(self, asked: Observation, seeds: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        noise = torch.stack([self._noise(seed, step) for seed, step in zip(seeds, steps, strict=True)])
        return self.policy.predict_action(asked, noise=noise)

    def _noise(self, seed: int, step: int, *proposal: int) -> torch.Tensor:
        """Drawn on the CPU, so that every device starts from the same."""
        generator = torch.Generator().manual_seed(derive("act", seed, step, *proposal))
        return torch.randn(self.policy.noise_shape, generator=generator)


class BestOf(ActingPolicy):
    """Proposes K chunks and executes the one that the critic's smaller Q ranks first (value-guided execution)."""

    def __init__(self, policy: Policy, critic: Critic, digest: str, *, k: int) -> None:
        super().__init__(policy, digest)
        self.critic = critic.eval().requires_grad_(False)
        self.k = k

    def _answer(self, asked: Observation, seeds: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        noise = torch.stack(
            [
                torch.stack([self._noise(seed, step, k) for k in range(self.k)])
                for seed, step in zip(seeds, steps, strict=True)
            ]
        )
        proposals = self.policy.propose(asked, noise)
        asked = asked.to(self.critic.device)
        q = self.critic.ranked(self.critic.prepare(asked), proposals.to(self.critic.device))
        best = q.min(dim=-1).values.argmax(dim=1).to(proposals.device)
        return proposals[torch.arange(len(proposals), device=proposals.device), best]


def acting_policy(
    path: Path | str, digest: str, schema: Schema, *, critic: Path | None = None, best_of: int = 1
) -> ActingPolicy:
    """The averaged weights of a checkpoint folder, on the best device here, ready to act on observations of `schema`.

    best_of: chunks proposed per decision, ranked by the critic in the folder `critic`; 1 asks no critic. Raises
    `BadInput` when a checkpoint is damaged or was trained on another schema.
    """
    policy = load_policy(path, fits=schema, whose="the environment").to(best_device())
    if best_of == 1:
        return ActingPolicy(policy, digest)
    if critic is None:
        raise BadInput(f"best_of {best_of}: no critic to rank by; name one, or use 1")
    judge = load_critic(critic, fits=schema, whose="the environment").to(best_device())
    return BestOf(policy, judge, f"{digest} best of {best_of}", k=best_of)
