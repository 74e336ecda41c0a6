"""A policy and batches small enough for every test: 16 px pictures of two cameras, chunks of 4 actions."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from data.normalize import Stats, fit
from data.schema import Component, Schema
from models.config import FitConfig, PolicyConfig
from models.policy import Policy, PolicySpec
from models.seeds import derive
from models.types import Batch

HORIZON, STATE, ACTION, PX = 4, 5, 3, 16

SCHEMA = Schema(
    cameras=("head", "wrist"),
    image_size=(PX, PX),
    state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(STATE)),
    action=(
        Component(name="joint_0.delta", unit="0.1 rad"),
        Component(name="gripper.target", unit="1"),
        Component(name="joint_1.target", unit="rad"),
    ),
    fps=20,
    control_mode="delta_qpos",
)

BACKBONE = {"width": 16, "keypoints": 4, "grid": 2}
HEADS = {
    "act": {"dim": 16, "heads": 2, "feedforward": 32, "decoder_layers": 1},
    "flow": {"dim": 32, "layers": 2, "steps": 4},
}


def config(head: str = "act", **options) -> PolicyConfig:
    return PolicyConfig(backbone_options=BACKBONE, head=head, head_options=HEADS[head], **options)


def with_head_options(head: str, **options) -> PolicyConfig:
    return replace(config(head), head_options=HEADS[head] | options)


def spec(policy: PolicyConfig | None = None) -> PolicySpec:
    return PolicySpec(config=policy or config(), schema=SCHEMA, horizon=HORIZON)


def stats() -> dict[str, Stats]:
    rng = np.random.default_rng(0)
    return {
        "state": fit(rng.normal(1.0, 2.0, (100, STATE))),
        "action": fit(rng.normal(0.1, [0.3, 0.6, 2.0], (100, ACTION))),
    }


def build(policy: PolicyConfig | None = None, seed: int = 0) -> Policy:
    return Policy.build(spec(policy), stats(), seed=seed)


def batch(seed: int = 0, size: int = 8) -> Batch:
    """Random pictures, states and actions; the last sample is a tail chunk with one real step."""
    rng = np.random.default_rng(seed)
    is_pad = np.zeros((size, HORIZON), bool)
    is_pad[-1, 1:] = True
    return Batch.of(
        {
            "observation.images.head": rng.integers(0, 256, (size, PX, PX, 3), np.uint8),
            "observation.images.wrist": rng.integers(0, 256, (size, PX, PX, 3), np.uint8),
            "observation.state": rng.normal(1.0, 2.0, (size, STATE)).astype(np.float32),
            "action": rng.uniform(-1, 1, (size, HORIZON, ACTION)).astype(np.float32),
            "action_is_pad": is_pad,
            "task": ["pick up the cube"] * size,
            "index": np.arange(seed * size, (seed + 1) * size),
        }
    )


def batches(start: int) -> Iterator[Batch]:
    """Another batch at every step, a function of the step."""
    while True:
        yield batch(start)
        start += 1


def generator(*purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive("test", *purpose))


FIT = FitConfig(steps=20, batch_size=8, lr=1e-3, warmup_steps=3, save_every=5, threads=1)
