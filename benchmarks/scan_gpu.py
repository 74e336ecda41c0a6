"""Mamba's recurrence on a GPU with its gradients: our Triton kernel, mamba-ssm's where installed, the portable one.

    python benchmarks/scan_gpu.py [--rounds 5] [--bandwidth 4.8] [--json]

The sizes of `benchmarks/scan.py`, in float32 and in bf16. In float32 outputs and gradients must be equal to 1e-5 before
anything is timed. `share` is the part of the memory's bandwidth that would be needed if every input and gradient were
moved once. Seconds of a call that is waited for, median of interleaved rounds. Without a GPU nothing is measured.
"""

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

import torch
from scan import INNER, STATE, TOLERANCE, B, L
from torch import Tensor

from models.layers.scan import portable_scan, scan_on
from models.layers.scan_triton import triton_scan

Work = Callable[[], list[Tensor]]


def works(dtype: torch.dtype, device: str, length: int) -> dict[str, Work]:
    """Per implementation, a function that computes the output and the gradients of all inputs once."""
    draw = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device).to(dtype)

    A = -torch.arange(1.0, STATE + 1, device=device).repeat(INNER, 1)
    wide, narrow = (B, length, INNER), (B, length, STATE)
    x, delta, gate, dy = noise(*wide), noise(*wide) - 4, noise(*wide), noise(*wide)
    given = [x, delta, A, noise(*narrow), noise(*narrow), torch.ones(INNER, device=device), gate]
    given = [t.requires_grad_() for t in given]

    def work(scan: Callable[..., Tensor]) -> list[Tensor]:
        y = scan(*given)
        return [y.detach(), *torch.autograd.grad(y, given, dy)]

    scans = {"ours": triton_scan, "portable": portable_scan}
    if find_spec("mamba_ssm"):
        scans["mamba_ssm"] = scan_on("cuda")
    return {name: lambda scan=scan: work(scan) for name, scan in scans.items()}


def measure(dtype: torch.dtype, rounds: int, bandwidth: float, device: str = "cuda", length: int = L) -> dict:
    """bandwidth: of the device's memory, TB/s."""
    work = works(dtype, device, length)
    answers = {name: compute() for name, compute in work.items()}
    errors = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(answer, answers["portable"], strict=True))
        for name, answer in answers.items()
    }
    if dtype == torch.float32 and (wrong := [name for name, error in errors.items() if not error < TOLERANCE]):
        raise SystemExit(f"{', '.join(wrong)} differs from the portable scan, {errors}; nothing was timed")
    times = {name: [] for name in work}
    for _ in range(rounds):
        for name, compute in work.items():
            times[name].append(seconds_of(compute, device))
    seconds = {name: median(values) for name, values in times.items()}
    # forward x, delta, gate, y; backward the first three, dy and three slopes; B and C and their slopes
    moved = (11 * B * length * INNER + 6 * B * length * STATE) * dtype.itemsize
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": str(dtype).removeprefix("torch."),
        "ratios": {name: round(s / seconds["ours"], 2) for name, s in seconds.items() if name != "ours"},
        "seconds": seconds,
        "share": {name: round(moved / s / bandwidth / 1e12, 3) for name, s in seconds.items()},
        "spread": {name: round((max(t) - min(t)) / median(t), 2) for name, t in times.items()},
        "errors": errors,
    }


def seconds_of(compute: Work, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    compute()
    wait()
    return time.perf_counter() - began


def report(result: dict) -> None:
    print(f"\n{result['device']}, {result['dtype']}")
    for name, seconds in result["seconds"].items():
        noisy = "   (noisy: spread over 20 %)" if result["spread"][name] > 0.2 else ""
        ratio, share = f"x{result['ratios'].get(name, 1):.1f}", f"{result['share'][name]:.1%} of the bandwidth"
        print(f"  {name:10s} {1e3 * seconds:9.3f} ms  {ratio:>8s}   {share}{noisy}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the GPU's memory, TB/s (4.8: H200)")
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    results = [measure(dtype, args.rounds, args.bandwidth) for dtype in (torch.float32, torch.bfloat16)]
    for result in results:
        report(result)
    if args.json:
        ratios = {f"{name}_{r['dtype']}_ratio": ratio for r in results for name, ratio in r["ratios"].items()}
        said = {"results": results, "versions": {name: version(name) for name in ("torch", "triton")}}
        print(json.dumps({"benchmark": "scan_gpu", **ratios, **said}))


if __name__ == "__main__":
    main()
