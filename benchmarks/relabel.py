"""Proposals per second: ours beside a plain loop over LeRobot's predict_action_chunk, same weights, frames and noise.

    python benchmarks/relabel.py [--samples 4] [--horizon 10] [--frames 2] [--width 512] [--depth 6]
                                 [--image 224] [--rounds 5] [--json]

A PI0 of LeRobot's own classes with small widths and random weights, saved and read back as a folder. `lerobot` asks K
times per batch of frames, the only way its policy can be asked; its processors run once. `ours` is what relabelling
asks of a batch, words and pictures included. The noise is the same, and so must be the proposals, to 1e-4, before
anything is timed. The target is 3. The more actions a chunk has, the less of the work is shared: `long` has pi0's own
50, and `base` besides a third camera that is not there, as pi0's base model has it. LeRobot encodes and masks that one.

CPU seconds of one thread, median of interleaved rounds: wall time on a busy machine says little. `spread` is
(max - min) / median. With K = 1 there is nothing to share: what is left is what attention and the cache cost.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_pi0  # pyright: ignore[reportMissingImports] (it lies with the tests)

from data.schema import IMAGE, STATE, Component, Schema
from models import pi0
from models.devices import threads
from models.policy import within_limits
from models.types import Observation

LONG = 50  # actions per chunk, pi0's own
STEPS = 10  # of denoising, pi0's own
TASK = "pick up the red cube"


def schema(image: int) -> Schema:
    return Schema(
        cameras=("head", "wrist"),
        image_size=(image, image),
        state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(8)),
        action=tuple(Component(name=f"joint_{i}.delta", unit="1") for i in range(7)),
        fps=20,
        control_mode="delta_qpos",
    )


def frames(schema: Schema, count: int) -> dict[str, Any]:
    """Batch columns as the loader gives them."""
    rng = np.random.default_rng(0)
    pictures = {IMAGE + c: rng.integers(0, 256, (count, *schema.image_size, 3), np.uint8) for c in schema.cameras}
    return {**pictures, STATE: rng.normal(0, 0.3, (count, len(schema.state))).astype(np.float32)}


def lerobot(folder: Path, policy: Any, columns: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    """[b k h a]: a call per sample."""
    before, after = tiny_pi0.processors(folder, policy.config)
    pictures = {n: torch.as_tensor(v).permute(0, 3, 1, 2) / 255 for n, v in columns.items() if n.startswith(IMAGE)}
    asked = before({STATE: torch.as_tensor(columns[STATE]), "task": [TASK] * len(noise), **pictures})
    chunks = [after(policy.predict_action_chunk(asked, noise=noise[:, k].clone())) for k in range(noise.shape[1])]
    return torch.stack(chunks, dim=1)


def ours(proposer: pi0.Pi0Proposer, columns: dict[str, Any], noise: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return proposer.propose(Observation.of(columns, [TASK] * len(noise)), noise)


def cpu_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def measure(rounds: int, peers: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, float], float]:
    """(median CPU seconds, spread, median ratio lerobot / ours) of interleaved rounds."""
    took = [{name: cpu_seconds(work) for name, work in peers.items()} for _ in range(rounds)]
    middle = {name: median(t[name] for t in took) for name in peers}
    spread = {name: (max(t[name] for t in took) - min(t[name] for t in took)) / middle[name] for name in peers}
    return middle, spread, median(t["lerobot"] / t["ours"] for t in took)


def compare(root: Path, args: argparse.Namespace, samples: int, horizon: int, empty: int) -> dict[str, Any]:
    """One case: equal first, then timed."""
    features, columns = schema(args.image), frames(schema(args.image), args.frames)
    options = {"horizon": horizon, "size": size(args), "empty_cameras": empty}
    folder = tiny_pi0.write(root, "pi0", features, **options)
    proposer = pi0.load(folder, features, digest="tiny", steps=STEPS)
    policy = tiny_pi0.policy("pi0", features, **options)
    policy.config.num_inference_steps = STEPS
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(args.frames, samples, *proposer.noise_shape, generator=generator)
    theirs = within_limits(lerobot(folder, policy, columns, noise), features.action)
    worst = float((theirs - ours(proposer, columns, noise)).abs().max())
    if worst > 1e-4:
        raise SystemExit(f"proposals differ by {worst:.1e} for equal noise; nothing was timed")
    peers = {
        "ours": lambda: ours(proposer, columns, noise),
        "lerobot": lambda: lerobot(folder, policy, columns, noise),
    }
    seconds, spread, ratio = measure(args.rounds, peers)
    rate = {name: args.frames * samples / s for name, s in seconds.items()}
    case = {"samples": samples, "horizon": horizon, "empty_cameras": empty, "largest_difference": worst}
    return {**case, "chunks_per_cpu_s": rate, "spread": spread, "lerobot_ratio": ratio}


def size(args: argparse.Namespace) -> tiny_pi0.Size:
    return tiny_pi0.Size(
        width=args.width, expert=args.width // 2, depth=args.depth, head=64, mlp=4,
        vision=288, vision_depth=9, vision_mlp=1152, image=args.image,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=4, help="K, proposals per frame")
    parser.add_argument("--horizon", type=int, default=10, help="actions per chunk, as of pi05_libero")
    parser.add_argument("--frames", type=int, default=2, help="per batch")
    parser.add_argument("--width", type=int, default=512, help="of the language model; the action expert has half")
    parser.add_argument("--depth", type=int, default=6, help="layers of both")
    parser.add_argument("--image", type=int, default=224, help="pixels per side, two cameras")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    k, h = args.samples, args.horizon
    cases = {"shared": (k, h, 0), "one_sample": (1, h, 0), "long": (k, LONG, 0), "base": (k, LONG, 1)}
    results = {}
    with tempfile.TemporaryDirectory() as root, tiny_pi0.tiny(size(args)), threads(1):
        for name, case in cases.items():
            results[name] = compare(Path(root) / name, args, *case)
            say(results[name])
    if args.json:
        versions = {name: version(name) for name in ("lerobot", "torch", "transformers")}
        first = results.pop("shared")
        content = {"benchmark": "relabel", **vars(args), **first, **results, "steps": STEPS}
        print(json.dumps(content | {"versions": versions}))


def say(result: dict[str, Any]) -> None:
    print(f"K = {result['samples']}, H = {result['horizon']}, empty cameras: {result['empty_cameras']}")
    for name, rate in result["chunks_per_cpu_s"].items():
        noisy = f"  (spread {s:.0%} of the median: a busy machine)" if (s := result["spread"][name]) > 0.2 else ""
        print(f"  {name:8} {rate:6.2f} chunks/CPU-s  {1000 / rate:7.1f} CPU-ms per chunk{noisy}")
    worst = result["largest_difference"]
    print(f"  ours/lerobot {result['lerobot_ratio']:.2f}, largest difference {worst:.0e}", flush=True)


if __name__ == "__main__":
    main()
