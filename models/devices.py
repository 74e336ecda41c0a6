"""What this machine computes with: device, arithmetic, threads. Said once, so that training and acting agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models.config import Precision


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bfloat16. On a CPU "auto" means fp32: most emulate bfloat16, slowly."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bf16"


def usable_threads() -> int:
    """CPU threads this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads: a sum split among another number of threads rounds differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
