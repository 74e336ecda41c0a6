"""Each policy beside LeRobot's of the same weights (of GR00T, the action head): forward, with backward, a chunk.

    python benchmarks/policies.py [--models act diffusion pi0 pi05 gr00t] [--batch 8] [--rounds 7] [--json]

LeRobot's policy is made at a middling size with random weights, saved its own way and read back by
`models.published`, so both hold the same numbers. Theirs is given pictures that are scaled already, ours as recorded.
A chunk for the same noise must be the same to 1e-4 before anything is timed. The limit is 0.95: no slower than that of
theirs, anywhere.

Where there is a GPU, the sizes are the published ones and the arithmetic bf16, and `share` is the part of the device's
peak (`--peak`, in TFLOP/s) that forward and backward reach, operations counted by torch. On a CPU: CPU seconds of one
thread, because wall time on a busy machine says little. Median of interleaved rounds; `spread` is (max - min) / median.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import tiny_paligemma  # pyright: ignore[reportMissingImports] (it lies with the tests)
import tiny_pi0  # pyright: ignore[reportMissingImports] (it lies with the tests)

from data.schema import ACTION, IMAGE, STATE, Component, Schema
from models.devices import best_device, threads
from models.heads import flow_matching_1_5
from models.layers import flow_dit
from models.published.loading import load_published
from models.types import ACTION_IS_PAD, Batch, Context, Observation, Sizes

TASK = "pick up the red cube"
CAMERAS, STATES, ACTIONS = ("head", "wrist"), 8, 7
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Side:
    """One implementation."""

    loss: Callable[[], torch.Tensor]  # of a batch, in training mode
    chunk: Callable[[], torch.Tensor]  # for one observation, in the network's own units
    module: torch.nn.Module


def schema(image: int) -> Schema:
    return Schema(
        cameras=CAMERAS,
        image_size=(image, image),
        state=tuple(Component(name=f"state_{i}", unit="") for i in range(STATES)),
        action=tuple(Component(name=f"action_{i}", unit="") for i in range(ACTIONS)),
        fps=20,
        control_mode="?",
    )


def lerobot(kind: str, image: int, folder: Path, options: dict[str, Any]) -> Any:
    """LeRobot's ACT or diffusion policy, written into `folder`."""
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature

    if kind == "act":
        from lerobot.policies.act.configuration_act import ACTConfig as Config
        from lerobot.policies.act.modeling_act import ACTPolicy as Kind
        from lerobot.policies.act.processor_act import make_act_pre_post_processors as processors
    else:
        from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as Config
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as Kind
        from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors as processors
    inputs = {IMAGE + name: PolicyFeature(FeatureType.VISUAL, (3, image, image)) for name in CAMERAS}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (STATES,))
    outputs = {ACTION: PolicyFeature(FeatureType.ACTION, (ACTIONS,))}
    torch.manual_seed(0)
    made = Kind(
        Config(
            device="cpu",
            input_features=inputs,
            output_features=outputs,
            normalization_mapping=dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.MEAN_STD),
            pretrained_backbone_weights=None,
            push_to_hub=False,
            **options,
        )
    )
    shapes = {key: feature.shape for key, feature in (inputs | outputs).items()}
    sizes = {key: (3, 1, 1) if len(shape) == 3 else shape for key, shape in shapes.items()}
    identity = {key: {"mean": torch.zeros(size), "std": torch.ones(size)} for key, size in sizes.items()}
    made.save_pretrained(folder)
    for pipeline in processors(made.config, identity):
        pipeline.save_pretrained(folder)
    return made


def recorded(image: int, b: int, horizon: int) -> tuple[Batch, dict[str, torch.Tensor]]:
    """A batch as recorded, and as LeRobot gets it."""
    draw = torch.Generator().manual_seed(1)
    pictures = {n: torch.randint(0, 256, (b, image, image, 3), dtype=torch.uint8, generator=draw) for n in CAMERAS}
    state, action = torch.rand(b, STATES, generator=draw), torch.rand(b, horizon, ACTIONS, generator=draw)
    is_pad = torch.zeros(b, horizon, dtype=torch.bool)
    seen = Observation(images=pictures, state=state, tasks=(TASK,) * b)
    theirs = {IMAGE + n: p.permute(0, 3, 1, 2).float() / 255 for n, p in pictures.items()}
    theirs |= {STATE: state, ACTION: action, ACTION_IS_PAD: is_pad}
    return Batch(observation=seen, action=action, action_is_pad=is_pad), theirs


def both(kind: str, image: int, made: Any, folder: Path, b: int, horizon: int, device: torch.device) -> dict[str, Side]:
    """The two implementations, each with a batch of its own form on the device."""
    ours: Any = load_published(folder).to(device)
    theirs = made.to(device)
    batch, raw = recorded(image, b, horizon)
    batch = batch.to(device)
    if kind in ("pi0", "pi05"):
        before, _ = tiny_pi0.processors(folder, made.config)
        raw |= {"task": [TASK] * b}
        kept = raw.pop(ACTION_IS_PAD)
        raw = dict(before(raw)) | {ACTION_IS_PAD: kept}
    raw = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in raw.items()}
    seen = {name: v for name, v in raw.items() if name not in (ACTION, ACTION_IS_PAD)}
    one = {name: v[:1] if isinstance(v, torch.Tensor | list) else v for name, v in seen.items()}
    if kind == "diffusion":
        raw = {n: v[:, None] if n.startswith("observation.") else v for n, v in raw.items()}
        one[STATE] = one[STATE][:, None]
    noise = torch.randn(1, *ours.noise_shape, generator=torch.Generator().manual_seed(2)).to(device)
    generator = torch.Generator(device).manual_seed(3)
    given = {} if kind == "act" else {"noise": noise}
    executed = made.config.n_action_steps  # theirs answers with no more
    return {
        "ours": Side(
            loss=lambda: ours.loss(batch, generator)[0].mean(),
            chunk=lambda: ours.answer(batch.observation.rows(slice(0, 1)), noise[:, None])[:, 0, :executed, :ACTIONS],
            module=ours,
        ),
        "lerobot": Side(
            loss=lambda: theirs.forward(raw)[0],
            chunk=lambda: theirs.predict_action_chunk(dict(one), **given)[..., :ACTIONS],
            module=theirs,
        ),
    }


def act(folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    horizon, image = (100, 224) if large else (20, 96)
    options = {"chunk_size": horizon, "n_action_steps": horizon}
    options |= {} if large else {"dim_model": 256, "dim_feedforward": 1024}
    return both("act", image, lerobot("act", image, folder, options), folder, b, horizon, device)


def diffusion(folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    options = {"n_obs_steps": 1, "horizon": 16, "n_action_steps": 8, "num_inference_steps": 10}
    options |= {"noise_scheduler_type": "DDIM"} | ({} if large else {"down_dims": (128, 256, 512)})
    image = 224 if large else 96
    return both("diffusion", image, lerobot("diffusion", image, folder, options), folder, b, 16, device)


def _pi(kind: str, folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    published = tiny_pi0.Size(
        width=2048, expert=1024, depth=18, head=256, mlp=8, vision=1152, vision_depth=27, vision_mlp=4304, image=224
    )
    middling = tiny_pi0.Size(width=256, expert=128, depth=4, head=32, mlp=4, vision=128, vision_depth=4, vision_mlp=512,
                             image=112)  # fmt: skip
    size = published if large else middling
    with tiny_pi0.tiny(size), tiny_paligemma.published_sizes(size):
        made = tiny_pi0.policy(kind, schema(size.image), horizon=50, size=size)
        tiny_pi0.write(folder, kind, schema(size.image), horizon=50, size=size)
        return both(kind, size.image, made, folder, b, 50, device)


def pi0(folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    return _pi("pi0", folder, b, device, large)


def pi05(folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    return _pi("pi05", folder, b, device, large)


def gr00t(folder: Path, b: int, device: torch.device, large: bool) -> dict[str, Side]:
    """N1.5's action head alone, on tokens as a backbone would give them: LeRobot's of N1.7, set to N1.5."""
    from lerobot.policies.groot.groot_n1_7 import GR00TN17ActionHead, GR00TN17Config
    from transformers.feature_extraction_utils import BatchFeature

    preset, width, count = ("published", 2048, 256) if large else ("small", 256, 64)
    horizon, size, seen = 16, flow_dit.PRESETS[preset], flow_matching_1_5.PRESETS[preset]
    attention = {"positional_embeddings": None, "dropout": size.dropout, "final_dropout": True}
    torch.manual_seed(0)
    theirs: Any = GR00TN17ActionHead(
        GR00TN17Config(
            max_state_dim=STATES,
            max_action_dim=ACTIONS,
            action_horizon=horizon,
            hidden_size=size.hidden,
            input_embedding_dim=size.heads * size.head,
            backbone_embedding_dim=width,
            max_seq_len=size.positions,
            max_num_embodiments=size.robots,
            num_inference_timesteps=4,
            state_dropout_prob=0.0,
            use_alternate_vl_dit=False,
            use_vlln=True,
            diffusion_model_cfg={
                "num_layers": size.layers,
                "num_attention_heads": size.heads,
                "attention_head_dim": size.head,
                "output_dim": size.hidden,
                "norm_type": "ada_norm",
                "interleave_self_attention": True,
                **attention,
            },
            vl_self_attention_cfg={
                "num_layers": seen.layers,
                "num_attention_heads": seen.heads,
                "attention_head_dim": width // seen.heads,
                **attention,
            },
        )
    ).to(device)
    with patch.dict(flow_matching_1_5.PRESETS, {preset: replace(seen, extra=0)}):  # N1.7 has none
        ours = flow_matching_1_5.FlowMatching15Head(
            flow_matching_1_5.FlowMatching15Config(preset=preset, expand_batch=1),
            Sizes(context=width, state=STATES, horizon=horizon, action=ACTIONS),
        ).to(device)
    ours.load_state_dict(theirs.state_dict())
    draw = torch.Generator().manual_seed(1)
    tokens, state = torch.randn(b, count, width, generator=draw), torch.randn(b, STATES, generator=draw)
    tokens, state = tokens.to(device), state.to(device)
    action = torch.rand(b, horizon, ACTIONS, generator=draw).to(device)
    mask = torch.ones_like(action, dtype=torch.bool)

    def asked(n: int, **more: torch.Tensor) -> tuple[Any, Any]:
        real = torch.ones(n, count, dtype=torch.bool, device=device)
        ids = torch.zeros(n, dtype=torch.long, device=device)
        read = {"backbone_features": tokens[:n], "backbone_attention_mask": real, "image_mask": ~real}
        return BatchFeature(data=read), BatchFeature(data={"state": state[:n, None], "embodiment_id": ids, **more})

    def their_chunk() -> torch.Tensor:
        torch.manual_seed(8)  # it draws its own noise
        return theirs.get_action(*asked(1))["action_pred"]

    context, generator = Context(tokens=tokens, state=state), torch.Generator(device)
    one = Context(tokens=tokens[:1], state=state[:1])

    def our_chunk() -> torch.Tensor:
        noise = torch.randn(1, horizon, ACTIONS, generator=generator.manual_seed(8), device=device)
        return ours.sample(one, noise)

    return {
        "ours": Side(loss=lambda: ours.loss(context, action, mask, generator)[0].mean(), chunk=our_chunk, module=ours),
        "lerobot": Side(
            loss=lambda: theirs(*asked(b, action=action, action_mask=mask))["loss"], chunk=their_chunk, module=theirs
        ),
    }


MODELS = {"act": act, "diffusion": diffusion, "pi0": pi0, "pi05": pi05, "gr00t": gr00t}


def equal(sides: dict[str, Side]) -> float:
    """Stop unless both answer with the same chunk; the largest difference."""
    with torch.no_grad():
        ours, theirs = (side.module.eval() and side.chunk().float() for side in sides.values())
    if not ours.numel() or ours.shape != theirs.shape:
        raise SystemExit(f"chunks are {tuple(ours.shape)} and {tuple(theirs.shape)}; nothing was timed")
    error = float((ours - theirs).abs().max())
    if not error < TOLERANCE:
        raise SystemExit(f"chunks differ by {error:.1e}; nothing was timed")
    return error


def jobs(side: Side, device: torch.device, large: bool) -> dict[str, Callable[[], Any]]:
    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, large):
            return side.loss()

    def backward() -> None:
        forward().backward()
        side.module.zero_grad()

    def chunk() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, large):
            return side.chunk()

    return {"forward": forward, "backward": backward, "chunk": chunk}


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """CPU seconds, or wall seconds of a GPU that is waited for."""
    if device.type != "cuda":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def measure(sides: dict[str, Side], rounds: int, device: torch.device, large: bool) -> dict[str, dict[str, Any]]:
    work = {name: jobs(side, device, large) for name, side in sides.items()}
    found = {}
    for job in work["ours"]:
        for side in sides.values():
            side.module.train(job != "chunk")
        times: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(rounds + 1):
            for name in sides:
                took = seconds(work[name][job], device)
                if i:  # the first is not counted
                    times[name].append(took)
        middle = {name: median(values) for name, values in times.items()}
        found[job] = {
            "ratio": round(middle["lerobot"] / middle["ours"], 3),
            "seconds": {name: round(value, 5) for name, value in middle.items()},
            "spread": {name: round((max(t) - min(t)) / median(t), 2) for name, t in times.items()},
        }
    return found


def operations(work: Callable[[], Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", type=float, default=990.0, help="of the GPU in bf16, TFLOP/s (990: H200, dense)")
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    device = best_device()
    large = device.type == "cuda"
    results = {}
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder, threads(1):
            sides = MODELS[name](Path(folder), args.batch, device, large)
            error = equal(sides)
            result: dict[str, Any] = {"error": error, **measure(sides, args.rounds, device, large)}
            if large:
                backward = jobs(sides["ours"], device, large)["backward"]
                result["share"] = operations(backward) / result["backward"]["seconds"]["ours"] / args.peak / 1e12
        results[name] = result
        print(f"{name}: chunks equal to {error:.0e}", flush=True)
        for job in ("forward", "backward", "chunk"):
            row = result[job]
            noisy = "   (noisy: spread over 20 %)" if max(row["spread"].values()) > 0.2 else ""
            print(
                f"  {job:9s} {1000 * row['seconds']['ours']:9.1f} ms   x{row['ratio']:.2f} lerobot{noisy}", flush=True
            )
        if large:
            print(f"  {result['share']:.0%} of the device's peak, forward and backward", flush=True)
    if args.json:
        ratios = {f"{name}_{job}_lerobot_ratio": results[name][job]["ratio"]
                  for name in results for job in ("forward", "backward", "chunk")}  # fmt: skip
        sizes = {"batch": args.batch, "rounds": args.rounds, "device": device.type, "published_sizes": large}
        libraries = {name: version(name) for name in ("torch", "lerobot", "transformers", "diffusers")}
        said = {"results": results, "sizes": sizes, "versions": libraries}
        print(json.dumps({"benchmark": "policies", **ratios, **said}))


if __name__ == "__main__":
    main()
