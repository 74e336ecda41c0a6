"""What a policy costs here: parameters, training samples/s, ms per chunk, peak memory. Measured, never cached.

Each policy is measured in a process of its own, so that its peak is its own and the next begins anew; on noise in the
shape of its schema, because its arithmetic does not depend on what is in the pictures.
"""

import multiprocessing as mp
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from data.refs import Ref
from models.config import FitConfig

ROUNDS = 5  # of a training step and of a chunk, after one that is not counted


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Of one policy on one machine."""

    device: str
    parameters: int
    trained: int  # of them, those that a gradient reaches
    samples_per_s: float  # training: forward, backward, optimizer, batch ready in memory; median of the rounds
    chunk_ms: float  # acting: one observation to one chunk, one thread, as a rollout asks; median of the rounds
    peak_mb: int  # training: above what the process held before, or of the device's memory

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def profile(checkpoint: Ref, fit: FitConfig) -> Profile:
    """The policy of a `train` artefact at the batch size and the threads of `fit`."""
    ours, theirs = mp.get_context("spawn").Pipe()
    process = mp.get_context("spawn").Process(target=_measure, args=(checkpoint.dir, fit, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{checkpoint.dir}: measuring it ended with code {process.exitcode}") from None
    process.join()
    return found


def _measure(folder: Path, fit: FitConfig, pipe: Any) -> None:
    import torch

    from data.loader import fake_batch
    from models.acting import ActingPolicy
    from models.checkpoint import load_policy
    from models.devices import best_device, threads, usable_threads
    from models.types import Batch

    device = best_device()
    policy = load_policy(folder).to(device)
    batch = fake_batch(policy.spec.schema, batch_size=fit.batch_size, horizon=policy.spec.horizon)
    learnt = Batch.of(batch).to(device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    chunk_ms = _chunk_ms(ActingPolicy(load_policy(folder).to(device), "measured"), batch)
    before = _peak_mb(device)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    generator = torch.Generator(device).manual_seed(0)

    def step() -> None:
        loss, _ = policy.loss(learnt, generator)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    policy.train()
    with threads(fit.threads or usable_threads()):
        seconds = _seconds(step, device)
    pipe.send(
        Profile(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type),
            parameters=sum(p.numel() for p in policy.parameters()),
            trained=sum(p.numel() for p in trained),
            samples_per_s=round(fit.batch_size / seconds, 1),
            chunk_ms=round(chunk_ms, 2),
            peak_mb=round(_peak_mb(device) - before),
        )
    )


def _chunk_ms(actor: Any, batch: dict[str, Any]) -> float:
    asked = {name: v[:1] for name, v in batch.items() if name.startswith("observation.")}
    return 1000 * _seconds(lambda: actor.act(asked, batch["task"][:1], [0], [0]), actor.policy.device)


def _seconds(work: Any, device: Any) -> float:
    import torch

    rounds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append(time.perf_counter() - began)
    return median(rounds[1:])


def _peak_mb(device: Any) -> float:
    """So far: of this process alone (getrusage would give it its parent's), or of the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
