"""A Mamba block on the CPU, forward and backward: ours beside mamba-ssm's reference loop, transformers and mambapy.

    python benchmarks/scan.py [--malloc default tuned] [--rounds 5] [--json]

B = 8, L = 395, width 256, state 16, expansion 2, float32: StateVLA's encoder layer. Two jobs: `layer`, the whole block
with the gradients of its input and of every parameter, and `scan`, the recurrence with its skip and gate. `portable`
is ours without a C compiler, `reference` our block around mamba-ssm's reference loop, `transformers` MambaMixer's path
without kernels, `mambapy` the same with its parallel scan (left out where it is not installed), `products` the block's
matrix products and convolution alone: the limit of any scan. Outputs and gradients must be equal to 1e-5 before
anything is timed.

Every implementation runs in a process of its own (so that its peak memory is its own) on one thread, and all of them
answer round by round in turn. The peers spend most of their time on fresh memory, so everything is measured twice:
with glibc's malloc as it is, and `tuned` to hold on to what it has. CPU seconds, median of the rounds; `spread` is
(max - min) / median.
"""

import argparse
import json
import multiprocessing as mp
import os
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

B, L, WIDTH, STATE, INNER = 8, 395, 256, 16, 512
TOLERANCE = 1e-5  # largest error of a tensor, relative to its largest entry
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
TUNED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "500000000"}
MALLOC = {"default": {}, "tuned": TUNED}


def reference_scan(x, delta, A, B, C, D, gate):
    """The loop of mamba-ssm's selective_scan_ref: all decays and inputs first, then one indexed step after the other.

    Each index is a view of the whole sequence, whose gradient is as long as the sequence: backward is quadratic.
    """
    import torch
    import torch.nn.functional as F

    delta = F.softplus(delta)
    decay = torch.exp(torch.einsum("bld,dn->bdln", delta, A))
    arriving = torch.einsum("bld,bln,bld->bdln", delta, B, x)
    h, y = decay.new_zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        h = decay[:, :, t] * h + arriving[:, :, t]
        y.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return (torch.stack(y, dim=1) + D * x) * F.silu(gate)


def our_block():
    import torch

    from models.layers.mamba import Mamba, MambaConfig

    torch.manual_seed(0)
    return Mamba(MambaConfig(dim=WIDTH, state=STATE))


def ours_layer():
    block = our_block()
    return block, block


def reference_layer():
    return ours_around(reference_scan)


def portable_layer():
    from models.layers.scan import portable_scan

    return ours_around(portable_scan)


def ours_around(scan):
    from models.layers import mamba

    mamba.selective_scan = scan  # in this process alone
    return ours_layer()


def transformers_layer(use_mambapy: bool = False):
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer
    from transformers.utils import logging

    logging.set_verbosity_error()  # that it has no kernels here is what is measured

    sizes = {"hidden_size": WIDTH, "state_size": STATE, "time_step_rank": our_block().config.dt_rank}
    config = MambaConfig.from_dict(sizes | {"use_mambapy": use_mambapy})
    block = MambaMixer(config, layer_idx=0).train()
    block.load_state_dict(our_block().state_dict())
    return block, block.slow_forward


def mambapy_layer():
    return transformers_layer(use_mambapy=True)


def products_layer():
    """The block with nothing for a scan, but with every gradient that the products need."""
    return ours_around(lambda x, delta, A, B, C, D, gate: x + delta + gate + (B + C).sum() + A.sum() + D)


LAYERS = {
    "ours": ours_layer,
    "portable": portable_layer,
    "reference": reference_layer,
    "transformers": transformers_layer,
    "mambapy": mambapy_layer,
    "products": products_layer,
}
SCANS = ("ours", "portable", "reference")


def work_of(name: str, job: str, length: int):
    """A function that computes output and gradients once: name -> tensor."""
    import torch

    draw = torch.Generator().manual_seed(1)
    if job == "layer":
        block, forward = LAYERS[name]()
        inputs = {"tokens": torch.randn(B, length, WIDTH, generator=draw, requires_grad=True)}
        given, width = inputs | dict(block.named_parameters()), WIDTH
    else:
        from models.layers.scan import portable_scan, selective_scan

        inputs = {
            "x": torch.randn(B, length, INNER, generator=draw),
            "delta": torch.randn(B, length, INNER, generator=draw) - 4,  # its softplus is about 0.02, as in a new block
            "A": -torch.arange(1.0, STATE + 1).repeat(INNER, 1),
            "B": torch.randn(B, length, STATE, generator=draw),
            "C": torch.randn(B, length, STATE, generator=draw),
            "D": torch.ones(INNER),
            "gate": torch.randn(B, length, INNER, generator=draw),
        }
        given, width = {key: tensor.requires_grad_() for key, tensor in inputs.items()}, INNER
        forward = {"ours": selective_scan, "portable": portable_scan, "reference": reference_scan}[name]
    dy = torch.randn(B, length, width, generator=draw)

    def work():
        y = forward(*inputs.values())
        return {"output": y, **dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))}

    return work


def peak_mb() -> float:
    """Of this process alone: getrusage would give it its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(name: str, job: str, pipe) -> None:
    """A process that holds one implementation: it answers "values", times "run", and reports its "peak" in MB."""
    work_of(name, job, 8)()  # imports and first-call costs, before anything is measured
    work = work_of(name, job, L)
    before = peak_mb()
    while (order := pipe.recv()) != "end":
        if order == "values":
            pipe.send({key: tensor.detach().numpy() for key, tensor in work().items()})
        elif order == "peak":
            pipe.send(peak_mb() - before)
        else:
            cpu = time.process_time()
            work()
            pipe.send(time.process_time() - cpu)


class Worker:
    """One implementation in a process of its own, which has its malloc from the start."""

    def __init__(self, name: str, job: str, malloc: str) -> None:
        self.pipe, theirs = mp.get_context("spawn").Pipe()
        self.process = mp.get_context("spawn").Process(target=serve, args=(name, job, theirs), daemon=True)
        os.environ.update(MALLOC[malloc])
        self.process.start()
        for variable in MALLOC[malloc]:
            del os.environ[variable]
        theirs.close()  # so that a worker that dies is an EOFError here

    def ask(self, order: str):
        self.pipe.send(order)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()


def names_of(job: str) -> list[str]:
    installed = [name for name in LAYERS if name != "mambapy" or find_spec("mambapy")]
    return [name for name in installed if job == "layer" or name in SCANS]


def compare(job: str) -> dict[str, float]:
    """Stop unless outputs and gradients are equal; each peer's largest error."""
    answers = {}
    for name in names_of(job):
        if name != "products":
            worker = Worker(name, job, "tuned")
            answers[name] = worker.ask("values")
            worker.end()
    ours, errors = answers.pop("ours"), {}
    for name, values in answers.items():
        error = {key: float(np.abs(ours[key] - t).max() / np.abs(t).max()) for key, t in values.items()}
        if differing := [key for key, e in error.items() if not e < TOLERANCE]:
            raise SystemExit(f"{job}: {name} and ours differ in {', '.join(differing)}; nothing was timed")
        errors[name] = max(error.values())
    return errors


def measure(job: str, malloc: str, rounds: int) -> dict:
    workers = {name: Worker(name, job, malloc) for name in names_of(job)}
    seconds = {name: [] for name in workers}
    if malloc == "tuned":
        for worker in workers.values():
            worker.ask("run")  # it then has the memory that it will hold on to
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask("run"))
    peak = {name: worker.ask("peak") for name, worker in workers.items()}
    for worker in workers.values():
        worker.end()
    middle = {name: median(times) for name, times in seconds.items()}
    return {
        "job": job,
        "malloc": malloc,
        "ratios": {name: round(middle[name] / middle["ours"], 2) for name in middle if name != "ours"},
        "cpu_seconds": {name: round(value, 4) for name, value in middle.items()},
        "peak_mb": {name: round(value) for name, value in peak.items()},
        "spread": {name: round((max(t) - min(t)) / median(t), 2) for name, t in seconds.items()},
    }


def report(result: dict) -> None:
    print(f"\n{result['job']}, malloc {result['malloc']}")
    for name, seconds in result["cpu_seconds"].items():
        noisy = "   (noisy: spread over 20 %)" if result["spread"][name] > 0.2 else ""
        ratio = f"x{result['ratios'].get(name, 1):.1f}"
        print(f"  {name:13s} {seconds:9.3f} s   {ratio:>8s}   peak {result['peak_mb'][name]:5d} MB{noisy}", flush=True)


def ratio_key(name: str, result: dict) -> str:
    """`transformers_ratio` is the layer's with malloc as it is."""
    words = [name, result["job"] if result["job"] != "layer" else "", "tuned" if result["malloc"] == "tuned" else ""]
    return "_".join([*filter(None, words), "ratio"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=["tuned", "default"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    os.environ.update(ONE_THREAD)
    results, errors = [], {}
    for job in ("layer", "scan"):
        errors[job] = compare(job)
        print(f"{job}: equal, largest error {max(errors[job].values()):.1e}", flush=True)
    for malloc in args.malloc:
        for job in ("layer", "scan"):
            results.append(measure(job, malloc, args.rounds))
            report(results[-1])
    if args.json:
        ratios = {ratio_key(name, result): ratio for result in results for name, ratio in result["ratios"].items()}
        libraries = {n: version(n) for n in ("torch", "transformers", "mambapy") if n != "mambapy" or find_spec(n)}
        sizes = {"batch": B, "length": L, "width": WIDTH, "state": STATE, "rounds": args.rounds}
        said = {"results": results, "errors": errors, "sizes": sizes, "versions": libraries}
        print(json.dumps({"benchmark": "scan", **ratios, **said}))


if __name__ == "__main__":
    main()
