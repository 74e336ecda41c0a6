"""Who acts: what a rollout asks of a policy, and the two that need no training."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from data.errors import BadInput
from data.sim import oracle

EXPERT = "expert_action"  # beside the observation when `SimConfig.expert`: privileged, a learned policy must not look

# Streams of randomness. A simulator draws its scene from the seed alone, and numpy pads seeds with zeros
# (default_rng(7) is default_rng([7, 0])), so what is drawn here begins with a word of its own.
_RANDOM, _NOISE = 0x7A11, 0x0E11


class Policy(Protocol):
    """Anything that acts. State, if it keeps any, is per episode and begins anew at `reset`."""

    digest: str  # who acted, for the provenance of data and scores

    def reset(self, lane: int, seed: int) -> None:
        """Lane `lane` begins the episode of `seed`: perhaps again, if its worker died."""

    def act(
        self, observation: dict[str, np.ndarray], tasks: list[str], seeds: list[int], steps: list[int]
    ) -> np.ndarray:
        """Answer n questions with a chunk of H actions each: float32 [n, H, A], in the environment's units.

        `observation` has the environment's keys, each with a leading axis n. `seeds` name the episodes, `steps` count
        from 0 in each. Randomness must be a function of (seed, step), or an episode cannot be done again. The arrays
        are the lanes' own memory: copy what you keep.
        """
        ...


class RandomPolicy:
    """Uniform in [-1, 1]: what nobody should lose to.

    What it does at a step follows from the seed and the step, whatever the length of its chunks.
    """

    digest = "random"

    def __init__(self, action_dims: int = 8, horizon: int = 10) -> None:
        self.action_dims = action_dims
        self.horizon = horizon

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(
        self, observation: dict[str, np.ndarray], tasks: list[str], seeds: list[int], steps: list[int]
    ) -> np.ndarray:
        def chunk(seed: int, step: int) -> np.ndarray:
            episode = np.random.default_rng([_RANDOM, seed]).uniform(-1, 1, (step + self.horizon, self.action_dims))
            return episode[step:]

        return np.array([chunk(seed, step) for seed, step in zip(seeds, steps, strict=True)], np.float32)


class OraclePolicy:
    """The scene's scripted expert, its arm disturbed so that the data also shows how to recover.

    `noise` is the standard deviation in action units (1 is the largest motion of one step); the gripper is left alone.
    """

    def __init__(self, noise: float = 0.0) -> None:
        if not noise >= 0:
            raise BadInput(f"oracle noise is {noise}; use a standard deviation of at least 0, in action units")
        self.noise = noise
        self.digest = f"oracle:{_expert_digest(noise)}"

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(
        self, observation: dict[str, np.ndarray], tasks: list[str], seeds: list[int], steps: list[int]
    ) -> np.ndarray:
        if EXPERT not in observation:
            raise BadInput("the oracle policy has no expert to ask; set `expert=True` in the simulator's configuration")
        action = np.array(observation[EXPERT], np.float32)
        for row, seed, step in zip(action, seeds, steps, strict=True):
            row[:-1] += np.random.default_rng([_NOISE, seed, step]).normal(0, self.noise, len(row) - 1)
        return np.clip(action, -1, 1)[:, None]


def _expert_digest(noise: float) -> str:
    """Short digest of how the expert acts: the noise, and the code of all scenes' experts, which share parts."""
    digest = hashlib.sha256(repr(float(noise)).encode())
    folder = Path(oracle.__file__).parent
    for path in [folder / "oracle.py", *sorted((folder / "scenes").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
