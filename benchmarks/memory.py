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
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

DOCUMENT_GB = {32: 10, 64: 16, 128: 24, 256: 40}


def phase(number: int, preset: str, size: int) -> tuple[Any, Any]:
    """The untrained phase, of LIBERO's sizes, and a batch of it."""
    import numpy as np
    from frozen_encoder import acting_by, source, untrained

    from models.config import JepaConfig
    from models.phases.flow_matching import FlowMatching, Z
    from models.phases.jepa import Jepa
    from models.types import NoOptions

    whole = source(size)
    encoder, rows = untrained(preset, whole), np.arange(size)
    if number == 1:
        single = replace(whole, horizon=1, next=whole.start + 1, h=np.ones_like(whole.h))
        module: Any = Jepa(encoder, JepaConfig(total_steps=1))
        columns = single.gather(rows, single.buffers(size, with_next=True))
    else:
        blind = replace(whole.without_pictures(), beside={Z: np.zeros((size, encoder.backbone.width), np.float32)})
        module = FlowMatching(acting_by(encoder, preset), NoOptions())
        columns = blind.gather(rows, blind.buffers(size))
    return module, module.reads.of(columns)


def measure(number: int, preset: str, size: int, pipe: Any) -> None:
    import torch

    from models.devices import best_device, uses_bf16

    device = best_device()
    module, seen = phase(number, preset, size)
    module, seen, bf16 = module.to(device).train(), seen.to(device), uses_bf16("auto", device)
    step_of(module, seen.rows(slice(0, 2)), device, bf16)  # first-call costs
    before = peak_mb(device)
    step_of(module, seen, device, bf16)
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
