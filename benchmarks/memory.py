"""What a step of StateVLA takes of memory, per batch size, at the published sizes.

    python benchmarks/memory.py [--phase 1 2] [--batch 8 16 32 64] [--preset published] [--json]

Phase 1 is forward, backward and optimizer step of the JEPA with its target; phase 2 that of the head on cached
encodings. Each size in a process of its own: on a GPU the peak of allocated memory, bf16 where it computes in it; on a
CPU the process's peak less what it held before the step, float32. `document` is what the published guide says of
phase 1.
"""

import argparse
import json
import multiprocessing as mp
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCUMENT_GB = {32: 10, 64: 16, 128: 24, 256: 40}
HORIZON, IMAGE = 10, 128
CAMERAS = ("agentview", "eye_in_hand")


def phase(number: int, preset: str) -> Any:
    """Untrained, of LIBERO's sizes, and a function that makes its batch."""
    import numpy as np

    from data.normalize import fit
    from data.schema import Component, Schema
    from models.config import JepaConfig, PolicyConfig, ReaderConfig
    from models.encoder import Encoder, EncoderSpec, policy_on
    from models.phases.flow_matching import FlowMatching
    from models.phases.jepa import Jepa
    from models.types import NoOptions

    schema = Schema(
        cameras=CAMERAS,
        image_size=(IMAGE, IMAGE),
        state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(9)),
        action=tuple(Component(name=name, unit="1") for name in ("x", "y", "z", "rx", "ry", "rz", "gripper")),
        fps=20,
        control_mode="delta_ee_pose",
    )
    rows = np.random.default_rng(0).uniform(-1, 1, (100, 9)).astype(np.float32)
    action = rows[:, :7].copy()
    action[:, 6] = np.sign(action[:, 6])
    reads = ReaderConfig(
        backbone="statevla", backbone_options={"preset": preset}, normalization="mean_std_signs", shift=0
    )
    spec = EncoderSpec(config=reads, schema=schema, horizon=1)
    encoder = Encoder.build(spec, {"state": fit(rows), "action": fit(action)})
    if number == 1:
        return Jepa(encoder, JepaConfig(total_steps=1))
    head = PolicyConfig(head="statevla", head_options={"preset": preset, "gripper": -1})
    return FlowMatching(policy_on(encoder, head, horizon=HORIZON), NoOptions())


def batch(number: int, module: Any, size: int) -> Any:
    import torch

    from data.loader import fake_batch
    from data.schema import ACTION

    schema = module.policy.spec.schema
    columns = fake_batch(schema, batch_size=size, horizon=1 if number == 1 else HORIZON, with_next=number == 1)
    columns[ACTION][..., 6] = 1.0
    if number == 2:
        columns["z"] = torch.zeros(size, module.policy.backbone.width).numpy()
    return module.reads.of(columns)


def measure(number: int, preset: str, size: int, pipe: Any) -> None:
    import torch

    from models.devices import best_device, uses_bf16

    device = best_device()
    module = phase(number, preset).to(device).train()
    step_of(module, batch(number, module, 2).to(device), device, uses_bf16("auto", device))
    seen, before = batch(number, module, size).to(device), peak_mb(device)
    step_of(module, seen, device, uses_bf16("auto", device))
    pipe.send(peak_mb(device) - (0 if device.type == "cuda" else before))
    pipe.send(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")


def step_of(module: Any, seen: Any, device: Any, bf16: bool) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    with torch.autocast(device.type, torch.bfloat16, bf16):
        loss, _ = module(seen, torch.Generator(device).manual_seed(0))
    loss.mean().backward()
    optimizer.step()


def peak_mb(device: Any) -> float:
    """Of this process alone: getrusage would give it its parent's peak."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--preset", choices=("small", "published"), default="published")
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    context, results, device = mp.get_context("spawn"), [], ""
    for number in args.phase:
        for size in args.batch:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(number, args.preset, size, there))
            process.start()
            there.close()
            try:
                found, device = here.recv(), here.recv()
            except EOFError:
                raise SystemExit(f"phase {number}, batch {size}: ended without an answer; out of memory?") from None
            process.join()
            results.append({"phase": number, "batch": size, "peak_mb": round(found), "mb_per_sample": found / size})
            guide = DOCUMENT_GB.get(size) if number == 1 and args.preset == "published" else None
            beside = f"   document {guide} GB" if guide else ""
            print(f"phase {number}, batch {size:4d}: {found / 1024:6.2f} GB on {device}{beside}", flush=True)
    if args.json:
        said = {"results": results, "device": device, "preset": args.preset, "versions": {"torch": version("torch")}}
        print(json.dumps({"benchmark": "memory", **said}))


if __name__ == "__main__":
    main()
