"""Q and V over chunks of a world small enough to solve exactly, learnt by the real phase from a real chunk table.

```
 position  0   1   2   3   4        actions -1, +1; reaching 3 pays once, 4 ends the task, 7 steps end the recording
```
The state says where one is and whether 3 has paid, so the world is Markov and dynamic programming over the recorded
chunks is the truth for every one of them: whole chunks, tails, the last of a truncated and of a terminated episode.
"""

from collections import defaultdict

import numpy as np
import polars as pl
import pytest
import torch

from data.chunk_config import ChunkConfig
from data.chunks import build_chunks
from data.normalize import fit as fit_stats
from data.schema import Component, Schema
from models.checkpoint import load_critic
from models.config import CriticConfig, FitConfig
from models.critic import Critic, CriticSpec
from models.fit import fit
from models.types import Observation, Transition

H, GAMMA, LONGEST, PLACES = 3, 0.9, 7, 5
SCHEMA = Schema(
    cameras=(),
    image_size=(1, 1),
    state=tuple(Component(name=f"at_{i}", unit="1") for i in range(2 * PLACES)),
    action=(Component(name="move", unit="1"),),
    fps=10,
    control_mode="delta_qpos",
)


def episodes(count: int = 24) -> pl.DataFrame:
    """Random walks from anywhere but the end, one row per step."""
    rng, rows = np.random.default_rng(3), []
    for episode in range(count):
        place, paid = int(rng.integers(0, 4)), False
        for step in range(LONGEST):
            move = int(rng.choice([-1, 1], p=[0.35, 0.65]))
            after = max(0, place + move)
            event = after == 3 and not paid
            ended = after == 4
            rows.append(
                (episode, step, place + PLACES * paid, move, int(event), ended, step == LONGEST - 1 and not ended)
            )
            place, paid = after, paid or event
            if ended:
                break
    names = ("episode_index", "frame_index", "state", "move", "event", "terminated", "truncated")
    return pl.DataFrame(rows, schema=names, orient="row")


@pytest.fixture(scope="module")
def world() -> tuple[pl.DataFrame, Transition]:
    steps = episodes()
    config = ChunkConfig(horizon=H, gamma=GAMMA, reward_mode="discounted")
    table = build_chunks(steps.lazy(), config).collect()
    assert table["terminal"].any() and table["truncated"].any() and (table["n_pad"] > 0).any()
    state, move = np.eye(2 * PLACES, dtype=np.float32)[steps["state"].to_numpy()], steps["move"].to_numpy()
    start, h, after = (table[c].to_numpy().astype(int) for c in ("start", "h", "next"))
    k = np.arange(H)
    rows = start[:, None] + np.minimum(k, h[:, None] - 1)

    def observation(at: np.ndarray) -> Observation:
        return Observation(images={}, state=torch.from_numpy(state[at]), tasks=("walk",) * len(at))

    batch = Transition(
        observation=observation(start),
        action=torch.from_numpy(move[rows].astype(np.float32))[..., None],
        action_is_pad=torch.from_numpy(k >= h[:, None]),
        next=observation(after),
        reward=torch.from_numpy(table["reward"].to_numpy()),
        discount=torch.from_numpy(table["discount"].to_numpy()),
    )
    decisions = [tuple(move[s : s + n]) for s, n in zip(start, h, strict=True)]
    names = steps["state"].to_numpy()
    table = table.with_columns(x=pl.Series(names[start]), y=pl.Series(names[after]), decision=pl.Series(decisions))
    return table, batch


def solve(table: pl.DataFrame, expectile: float) -> tuple[dict, dict]:
    """Dynamic programming over the recorded chunks: V of every state, Q of every (state, decision)."""
    rows = [(x, tuple(a), r, d, y) for x, a, r, d, y in table[["x", "decision", "reward", "discount", "y"]].iter_rows()]
    v: dict[int, float] = defaultdict(float)
    q: dict[tuple, float] = {}
    for _ in range(500):
        outcomes = defaultdict(list)
        for x, a, r, d, y in rows:
            outcomes[x, a].append(r + d * v[y])
        q = {key: float(np.mean(values)) for key, values in outcomes.items()}
        seen = defaultdict(list)
        for x, a, *_ in rows:
            seen[x].append(q[x, a])
        v = defaultdict(float, {x: expectile_of(np.array(values), expectile) for x, values in seen.items()})
    return q, v


def expectile_of(values: np.ndarray, tau: float) -> float:
    """The m with Σ |τ - 1(x < m)| (x - m) = 0."""
    m = values.mean()
    for _ in range(200):
        weights = np.where(values < m, 1 - tau, tau)
        m = (weights * values).sum() / weights.sum()
    return float(m)


@pytest.mark.parametrize("expectile", [0.5, 0.8])
def test_learned_values_are_those_of_dynamic_programming(world, expectile, tmp_path):
    table, batch = world
    stats = {"state": fit_stats(batch.observation.state.numpy()), "action": fit_stats(np.array([[-1.0], [1.0]]))}
    spec = CriticSpec(config=CriticConfig(width=64, layers=1), schema=SCHEMA, horizon=H)
    critic = Critic.build(spec, stats, seed=1)
    config = FitConfig(
        steps=700, batch_size=len(batch), lr=5e-3, min_lr_ratio=0.001, warmup_steps=20, save_every=700,
        ema_decay=0.99, weight_decay=0.0, grad_clip=10.0, betas=(0.9, 0.99), threads=1,
    )  # fmt: skip
    folder = fit(
        critic, lambda step: iter(lambda: batch, None), config, tmp_path,
        phase_name="chunk_critic", phase_options={"expectile": expectile, "tau": 0.05},
    )  # fmt: skip
    critic = load_critic(folder)
    seen, mask = critic.prepare(batch.observation), critic.mask(batch.action_is_pad)
    with torch.no_grad():
        q, v = critic.q(seen, critic.normalised(batch.action, mask), mask), critic.v(seen)
    want_q, want_v = solve(table, expectile)
    for kind, chosen in {
        "whole": (pl.col("n_pad") == 0) & ~pl.col("terminal"),
        "tail": pl.col("n_pad") > 0,
        "truncated": pl.col("truncated"),
        "terminal": pl.col("terminal"),
    }.items():
        rows = table.with_row_index().filter(chosen)
        assert len(rows) > 5, kind
        for i, x, decision in rows[["index", "x", "decision"]].iter_rows():
            assert q[i].numpy() == pytest.approx(want_q[x, tuple(decision)], abs=1e-2), (kind, x, decision)
            assert v[i].item() == pytest.approx(want_v[x], abs=1e-2), (kind, x)
