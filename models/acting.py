"""A trained policy as what a rollout asks: arrays in, chunks out, noise a function of (seed, step)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from data.schema import Schema
from models.checkpoint import load_policy
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
        noise = torch.stack([self._noise(seed, step) for seed, step in zip(seeds, steps, strict=True)])
        one_by_one = self.policy.device.type == "cpu"
        size = 1 if one_by_one else len(asked)
        with torch.inference_mode(), threads(1):
            chunks = [
                self.policy.act(asked.rows(slice(i, i + size)), noise=noise[i : i + size])
                for i in range(0, len(asked), size)
            ]
        return torch.cat(chunks).cpu().numpy()

    def _noise(self, seed: int, step: int) -> torch.Tensor:
        """Drawn on the CPU, so that every device starts from the same."""
        generator = torch.Generator().manual_seed(derive("act", seed, step))
        return torch.randn(self.policy.head.noise_shape, generator=generator)


def acting_policy(path: Path | str, digest: str, schema: Schema) -> ActingPolicy:
    """The averaged weights of a checkpoint folder, on the best device here, ready to act on observations of `schema`.

    Raises `BadInput` when the checkpoint is damaged or was trained on another schema.
    """
    policy = load_policy(path, fits=schema, whose="the environment")
    return ActingPolicy(policy.to(best_device()), digest)
