"""The scan's Triton kernels: their arithmetic in Triton's interpreter, their code by its compiler, without a GPU."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_policy import generator

from models.layers.scan import portable_scan

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
FLOATS = {"x_", "delta_", "B_", "C_", "gate_", "y_", "dy_", "dx_", "ddelta_", "dgate_"}  # in the model's precision
SIZES = [(1, 40, 8), (16, 24, 8), (35, 40, 5)]  # length (whole blocks and parts of one), channels, states


def differences() -> None:
    """Print the largest relative error of the output and of each gradient."""
    from models.layers.scan_triton import triton_scan

    for length, d, n in SIZES:
        draw = generator("triton", length)
        shapes = [(2, length, d), (2, length, d), (d, n), (2, length, n), (2, length, n), (d,), (2, length, d)]
        x, delta, A, B, C, D, gate = (torch.randn(shape, generator=draw) for shape in shapes)
        given = [t.requires_grad_() for t in (x, 8 * delta, -8 * A.abs(), B, C, D, gate)]  # softplus at both its ends
        answers = []
        for scan in (triton_scan, portable_scan):
            y = scan(*given)
            dy = torch.randn(y.shape, generator=generator("dy"))
            answers.append([y, *torch.autograd.grad(y, given, dy)])
        errors = [(a - e).abs().max() / e.abs().max().clamp(min=1e-30) for a, e in zip(*answers, strict=True)]
        print(*(f"{float(error):.1e}" for error in errors))


def test_forward_and_backward_are_the_portable_scan_s():
    """In a process of its own: Triton asks for its interpreter once, when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = [[float(e) for e in line.split()] for line in done.stdout.splitlines()]
    assert len(errors) == len(SIZES)
    assert all(len(row) == 8 and max(row) < 1e-5 for row in errors), errors


@pytest.mark.parametrize("direction", ["forward_kernel", "backward_kernel"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_compiles_for_hopper_and_keeps_everything_in_registers(tmp_path, direction, precision):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module("models.layers.scan_triton"), direction)
    constants = {"N": 16, "WIDE": 32, "BLOCK": 16}
    types = {name: f"*{precision}" if name in FLOATS else "*fp32" for name in kernel.arg_names}
    types |= dict.fromkeys(("length", "d", "n"), "i32") | dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, types, constexprs=places), target=GPUTarget("cuda", 90, 32))
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.check_output([dump, "--dump-resource-usage", tmp_path / "kernel.cubin"], text=True)
    assert "STACK:0" in usage and "LOCAL:0" in usage  # nothing spilt


if __name__ == "__main__":
    differences()
