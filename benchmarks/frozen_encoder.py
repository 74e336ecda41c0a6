"""StateVLA's phase 2 by encodings that were made once, beside the same training with the frozen encoder in the loop.

    python benchmarks/frozen_encoder.py [--preset published] [--samples 64] [--batch 64] [--rounds 5] [--json]

A step gathers a batch from the frame store and takes its loss, its gradients and the optimizer's step. `in_loop` clones
with the backbone frozen, which reads two pictures per sample; `ours` reads z and no picture. Their losses must be equal
to 1e-5, step by step, before anything is timed. `once` is what the encodings cost per sample, and never again.

CPU seconds of one thread, median of interleaved rounds; `spread` is (max - min) / median. The target is 20.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import polars as pl
import torch

from data.frames import Frames
from data.loader import ChunkSource
from data.normalize import fit
from data.schema import Component, Schema
from models.config import PolicyConfig, ReaderConfig
from models.devices import threads
from models.encoder import Encoder, EncoderSpec, policy_on
from models.pair import Pair
from models.phases.bc import BehaviourCloning
from models.phases.flow_matching import FlowMatching, Z
from models.probe import encode
from models.types import NoOptions, Phase

HORIZON, IMAGE, TOLERANCE = 10, 128, 1e-5
CAMERAS, TASK = ("agentview", "eye_in_hand"), "pick up the butter"


def source(samples: int) -> ChunkSource:
    """Noise as one recorded episode: joints and fingers, end-effector deltas and the gripper's sign."""
    rng, n = np.random.default_rng(0), samples + HORIZON
    action = rng.uniform(-1, 1, (n, 7)).astype(np.float32)
    action[:, 6] = np.sign(action[:, 6])
    frames = Frames(
        path=Path("noise"),
        schema=Schema(
            cameras=CAMERAS,
            image_size=(IMAGE, IMAGE),
            state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(9)),
            action=tuple(Component(name=name, unit="1") for name in ("x", "y", "z", "rx", "ry", "rz", "gripper")),
            fps=20,
            control_mode="delta_ee_pose",
        ),
        images={camera: rng.integers(0, 256, (n, IMAGE, IMAGE, 3), np.uint8) for camera in CAMERAS},
        state=rng.uniform(-1, 1, (n, 9)).astype(np.float32),
        action=action,
        rows=pl.DataFrame({"episode_index": [0] * n, "frame_index": range(n), "task": [TASK] * n}),
    )
    start, zeros = np.arange(samples, dtype=np.uint32), np.zeros(samples, np.uint32)
    return ChunkSource(
        members=(frames,),
        tasks=(TASK,),
        horizon=HORIZON,
        member=zeros,
        start=start,
        next=start + HORIZON,
        h=np.full(samples, HORIZON, np.uint32),
        reward=zeros.astype(np.float32),
        discount=zeros.astype(np.float32),
        task=zeros,
    )


def untrained(preset: str, whole: ChunkSource) -> Encoder:
    reads = ReaderConfig(
        backbone="statevla", backbone_options={"preset": preset}, normalization="mean_std_signs", shift=0
    )
    (frames,) = whole.members
    stats = {"state": fit(frames.state), "action": fit(frames.action)}
    return Encoder.build(EncoderSpec(config=reads, schema=whole.schema, horizon=1), stats)


def acting_by(encoder: Encoder, preset: str) -> Pair:
    config = PolicyConfig(head="statevla", head_options={"preset": preset, "gripper": -1})
    return policy_on(encoder, config, horizon=HORIZON)


def phases(encoder: Encoder, preset: str) -> dict[str, Phase]:
    """The same head twice."""
    in_loop = acting_by(encoder, preset)
    in_loop.backbone.requires_grad_(False)
    return {
        "ours": FlowMatching(acting_by(encoder, preset), NoOptions()),
        "in_loop": BehaviourCloning(in_loop, NoOptions()),
    }


def trainer(phase: Phase, source: ChunkSource, batch: int) -> Callable[[], float]:
    """A function that trains for one step, and returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in phase.parameters() if p.requires_grad], lr=1e-4)
    buffers, steps = source.buffers(batch), count()

    def step() -> float:
        number = next(steps)
        index = np.sort(np.random.default_rng(number).choice(len(source), batch, replace=False))
        seen = phase.reads.of(source.gather(index, buffers))
        loss, _ = phase(seen, torch.Generator().manual_seed(number))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.mean().item()

    return step


def measure(preset: str, samples: int, batch: int, rounds: int) -> dict[str, Any]:
    whole = source(samples)
    encoder = untrained(preset, whole)
    began = time.process_time()
    z = encode(encoder, whole)
    once = time.process_time() - began
    blind = replace(whole.without_pictures(), beside={Z: z})
    steps = {
        name: trainer(phase, blind if name == "ours" else whole, batch)
        for name, phase in phases(encoder, preset).items()
    }
    error = 0.0
    for _ in range(2):
        ours, in_loop = (step() for step in steps.values())
        error = max(error, abs(ours - in_loop) / abs(in_loop))
    if not error < TOLERANCE:
        raise SystemExit(f"losses differ by {error:.1e}; nothing was timed")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    middle = {name: median(times) for name, times in seconds.items()}
    return {
        "preset": preset,
        "in_loop_ratio": round(middle["in_loop"] / middle["ours"], 1),
        "error": error,
        "samples_per_cpu_second": {name: round(batch / s, 1) for name, s in middle.items()},
        "once_per_cpu_second": round(samples / once, 1),
        "spread": {name: round((max(t) - min(t)) / median(t), 2) for name, t in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("small", "published"), default="published")
    parser.add_argument("--samples", type=int, default=64, help="of the data set")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    with threads(1):
        result = measure(args.preset, args.samples, args.batch, args.rounds)
    print(f"StateVLA's phase 2, preset {args.preset}, batches of {args.batch}: losses equal to {result['error']:.0e}")
    for name, rate in result["samples_per_cpu_second"].items():
        noisy = "   (noisy: spread over 20 %)" if result["spread"][name] > 0.2 else ""
        print(f"  {name:8s} {rate:8.1f} samples/CPU-s{noisy}")
    print(f"  ours x{result['in_loop_ratio']}; encoding, once: {result['once_per_cpu_second']} samples/CPU-s")
    if args.json:
        print(json.dumps({"benchmark": "frozen_encoder", **result, "versions": {"torch": version("torch")}}))


if __name__ == "__main__":
    main()
