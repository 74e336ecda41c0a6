"""Proposals executed: an episode is repeated up to a moment, and from there goes another way, for a reward of its own.

```
 recorded     a0 a1 a2 a3 a4 a5 ...            seed s
 branch       a0 a1 a2 | p0 p1 .. pH-1 | what the policy does next ...      the same seed, so the same o_3
                       ^ o_3 must be what was recorded, to the last bit
```
The simulator is a function of the seed and the actions, so nothing but these is saved. Compared is the state vector:
recorded pictures went through a video codec.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from jaxtyping import Float32

from data.episode import Episode
from data.errors import BadInput
from data.lerobot import Dataset
from data.relabel import Proposals
from data.schema import ACTION, STATE
from data.sim.config import SimConfig
from data.sim.policies import Policy
from data.sim.rollout import rollout

_BRANCH = 0xB4A7C4  # a stream of randomness of its own, see `data.sim.policies`


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """Where an episode goes another way."""

    seed: int  # of the episode
    prefix: Float32[np.ndarray, "t a"]  # actions executed before, as recorded
    state: Float32[np.ndarray, " s"]  # observation.state at step t, as recorded
    proposal: Float32[np.ndarray, "h a"]  # what is executed from step t on
    sample: int = 0  # which of the proposals it is


class BranchPolicy:
    """Implements the rollout's protocol, for one question at a time and chunks executed whole."""

    def __init__(self, branches: Sequence[Branch], then: Policy, *, replan: int | None = None) -> None:
        """`then` acts after the proposal; `replan` of its actions at a time, None is a whole chunk."""
        self.branches = {branch.seed: branch for branch in branches}
        self.then = then
        self.replan = replan
        self.digest = f"branch:{then.digest}"

    def reset(self, lane: int, seed: int) -> None:
        self.then.reset(lane, seed)

    def act(
        self, observation: dict[str, np.ndarray], tasks: list[str], seeds: list[int], steps: list[int]
    ) -> np.ndarray:
        [seed], [step] = seeds, steps
        branch = self.branches[seed]
        if step < len(branch.prefix):
            return branch.prefix[None, step:]
        if step == len(branch.prefix):
            _refuse_another_moment(branch, observation[STATE][0])
            return branch.proposal[None]
        return self.then.act(observation, tasks, seeds, steps)[:, : self.replan]


def draw_branches(dataset: Dataset, proposals: Proposals, seed: int) -> list[Branch]:
    """One branch per recorded episode: a chunk start and a sample, each equally likely, a function of both seeds.

    Raises `BadInput` for a dataset that was not recorded here: it has no seeds to begin from.
    """
    if dataset.rollouts is None:
        raise BadInput(f"{dataset.path}: not recorded in this simulator, so no proposal can be executed from there")
    branches = []
    for episode, episode_seed in dataset.rollouts.select("episode_index", "seed").iter_rows():
        random = np.random.default_rng([_BRANCH, seed, episode_seed])
        row = int(random.choice(np.flatnonzero(proposals.episode == episode)))
        sample = int(random.integers(proposals.meta.samples))
        steps = dataset.steps.filter(pl.col("episode_index") == episode)
        t = int(proposals.t[row])
        branches.append(
            Branch(
                seed=episode_seed,
                prefix=steps[ACTION].to_numpy()[:t],
                state=steps[STATE].to_numpy()[t],
                proposal=proposals.array[row, sample],
                sample=sample,
            )
        )
    return branches


def execute_branches(
    config: SimConfig,
    branches: Sequence[Branch],
    then: Policy,
    *,
    replan: int | None = None,
    num_envs: int = 2,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Episode]:
    """One episode per branch, with true rewards, in the order of `branches`; each seed at most once.

    Raises `BadInput` when the simulator does not reproduce what was recorded.
    """
    policy, config = BranchPolicy(branches, then, replan=replan), replace(config, expert=False)
    return rollout(config, policy, [branch.seed for branch in branches], num_envs=num_envs, on_step=on_step)


def _refuse_another_moment(branch: Branch, state: np.ndarray) -> None:
    if not np.array_equal(state, branch.state):
        worst = float(np.abs(state - branch.state).max())
        raise BadInput(
            f"seed {branch.seed}: step {len(branch.prefix)} is not as recorded (state differs by {worst:.2g}); "
            "the simulator or its configuration has changed, collect the batch again"
        )
