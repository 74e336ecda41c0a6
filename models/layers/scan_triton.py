"""The selective scan as one kernel for each direction, for CUDA without mamba-ssm.

A program owns `WIDE` channels of one sequence and walks along the time with their states in registers, so that of the
[b l d n] of states only one in `BLOCK` steps ever reaches memory. Backward does each block again from the state kept
before it, into a scratch of `BLOCK` states, and walks it from the right:

    t        0 ... 15 | 16 ... 31 | 32 ... 47        ->  forward: h in registers, kept at every |
             ^          ^           ^  h kept        <-  backward: the block anew into scratch, then dh from the right

Softplus, skip and gate are done on the way: every input is read once per direction. What several programs add to (B's
and C's gradients) is written apart and summed afterwards, so that the same input gives the same bits.

mamba-ssm's kernel does the same with a parallel scan in CUDA C++; this one needs no compiler at installation. Float32
inside, and the types of the inputs outside.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDE = 32  # channels of a program
BLOCK = 16  # steps between two states that are kept


@triton.jit
def _step(x, delta, A, B_row, h):
    """The state after one token: `delta` after its softplus [w], `B_row` [n], h [w n]."""
    return tl.exp(delta[:, None] * A) * h + (delta * x)[:, None] * B_row[None, :]


@triton.jit
def _softplus(v):
    return tl.where(v > 20.0, v, tl.log(1.0 + tl.exp(tl.minimum(v, 20.0))))


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def forward_kernel(x_, delta_, A_, B_, C_, D_, gate_, y_, kept_, length, d, n,
                   N: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, channels, states = tl.program_id(0), tl.program_id(1) * WIDE + tl.arange(0, WIDE), tl.arange(0, N)
    real, some = channels < d, states < n
    both = real[:, None] & some[None, :]
    cells = channels[:, None] * n + states[None, :]
    A = tl.load(A_ + cells, mask=both, other=0.0)
    D = tl.load(D_ + channels, mask=real, other=0.0)
    h = tl.zeros((WIDE, N), tl.float32)
    blocks = (length + BLOCK - 1) // BLOCK
    for t in range(length):
        if t % BLOCK == 0:
            tl.store(kept_ + (b * blocks + t // BLOCK) * d * n + cells, h, mask=both)
        row, narrow = (b * length + t) * d + channels, (b * length + t) * n + states
        x = tl.load(x_ + row, mask=real, other=0.0).to(tl.float32)
        delta = _softplus(tl.load(delta_ + row, mask=real, other=0.0).to(tl.float32))
        gate = tl.load(gate_ + row, mask=real, other=0.0).to(tl.float32)
        h = _step(x, delta, A, tl.load(B_ + narrow, mask=some, other=0.0).to(tl.float32), h)
        C = tl.load(C_ + narrow, mask=some, other=0.0).to(tl.float32)
        y = (tl.sum(h * C[None, :], axis=1) + D * x) * gate * _sigmoid(gate)
        tl.store(y_ + row, y, mask=real)


@triton.jit
def backward_kernel(x_, delta_, A_, B_, C_, D_, gate_, kept_, scratch_, dy_,
                    dx_, ddelta_, dA_, dB_, dC_, dD_, dgate_, length, d, n,
                    N: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    b, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    channels, states = part * WIDE + tl.arange(0, WIDE), tl.arange(0, N)
    real, some = channels < d, states < n
    both = real[:, None] & some[None, :]
    cells = channels[:, None] * n + states[None, :]
    A = tl.load(A_ + cells, mask=both, other=0.0)
    D = tl.load(D_ + channels, mask=real, other=0.0)
    later = tl.zeros((WIDE, N), tl.float32)  # what the loss says of h_t through later steps
    dA, dD = tl.zeros((WIDE, N), tl.float32), tl.zeros((WIDE,), tl.float32)
    blocks = (length + BLOCK - 1) // BLOCK
    for back in range(blocks):
        block = blocks - 1 - back
        start, here = block * BLOCK, tl.minimum(BLOCK, length - block * BLOCK)
        h = tl.load(kept_ + (b * blocks + block) * d * n + cells, mask=both, other=0.0)
        for k in range(here):  # h_{t-1} of every step of the block
            tl.store(scratch_ + (b * BLOCK + k) * d * n + cells, h, mask=both)
            row, narrow = (b * length + start + k) * d + channels, (b * length + start + k) * n + states
            x = tl.load(x_ + row, mask=real, other=0.0).to(tl.float32)
            delta = _softplus(tl.load(delta_ + row, mask=real, other=0.0).to(tl.float32))
            h = _step(x, delta, A, tl.load(B_ + narrow, mask=some, other=0.0).to(tl.float32), h)
        tl.debug_barrier()  # what one thread stored, another loads
        for k in range(here):
            t = start + here - 1 - k
            row, narrow = (b * length + t) * d + channels, (b * length + t) * n + states
            x = tl.load(x_ + row, mask=real, other=0.0).to(tl.float32)
            raw = tl.load(delta_ + row, mask=real, other=0.0).to(tl.float32)
            gate = tl.load(gate_ + row, mask=real, other=0.0).to(tl.float32)
            dy = tl.load(dy_ + row, mask=real, other=0.0).to(tl.float32)
            B = tl.load(B_ + narrow, mask=some, other=0.0).to(tl.float32)
            C = tl.load(C_ + narrow, mask=some, other=0.0).to(tl.float32)
            before = tl.load(scratch_ + (b * BLOCK + t - start) * d * n + cells, mask=both, other=0.0)
            delta = _softplus(raw)
            decay = tl.exp(delta[:, None] * A)
            h = decay * before + (delta * x)[:, None] * B[None, :]
            open_ = _sigmoid(gate)
            inner = tl.sum(h * C[None, :], axis=1) + D * x
            tl.store(dgate_ + row, dy * inner * open_ * (1.0 + gate * (1.0 - open_)), mask=real)
            dinner = dy * gate * open_
            dD += dinner * x
            dh = dinner[:, None] * C[None, :] + later
            through = dh * decay * before  # of the exponent delta·A
            dA += through * delta[:, None]
            du = tl.sum(dh * B[None, :], axis=1)  # of u = delta·x
            tl.store(dx_ + row, dinner * D + du * delta, mask=real)
            ddelta = du * x + tl.sum(through * A, axis=1)
            tl.store(ddelta_ + row, ddelta * _sigmoid(raw), mask=real)
            share = ((b * parts + part) * length + t) * n + states
            tl.store(dB_ + share, tl.sum(dh * (delta * x)[:, None], axis=0), mask=some)
            tl.store(dC_ + share, tl.sum(h * dinner[:, None], axis=0), mask=some)
            later = dh * decay
        tl.debug_barrier()  # the scratch is written anew
    tl.store(dA_ + b * d * n + cells, dA, mask=both)
    tl.store(dD_ + b * d + channels, dD, mask=real)


# as callables with a grid, which Triton's types do not know
_forward: Any = forward_kernel
_backward: Any = backward_kernel


def triton_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
    """`models.layers.scan.selective_scan` on CUDA."""
    return _Scan.apply(x, delta, A, B, C, D, gate)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        given = [t.contiguous() for t in (x, delta, A.float(), B, C, D.float(), gate)]
        (b, length, d), n = x.shape, A.shape[1]
        y = torch.empty_like(given[0])
        kept = x.new_empty(b, -(-length // BLOCK), d, n, dtype=torch.float32)
        _forward[_grid(b, d)](*given, y, kept, length, d, n, **_sizes(n))
        ctx.save_for_backward(*given, kept)
        ctx.types = A.dtype, D.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        *given, kept = ctx.saved_tensors
        x, delta, A, B, C, _, gate = given
        (b, length, d), n = x.shape, A.shape[1]
        b_, parts = _grid(b, d)
        dx, ddelta, dgate = torch.empty_like(x), torch.empty_like(delta), torch.empty_like(gate)
        dA, dD, scratch = kept.new_empty(b, d, n), kept.new_empty(b, d), kept.new_empty(b, BLOCK, d, n)
        dB, dC = kept.new_empty(2, b, parts, length, n)
        outputs = (dx, ddelta, dA, dB, dC, dD, dgate)
        _backward[(b_, parts)](*given, kept, scratch, dy.contiguous(), *outputs, length, d, n, **_sizes(n))
        of_A, of_D = ctx.types
        return (dx, ddelta, dA.sum(0).to(of_A), dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype), dD.sum(0).to(of_D), dgate)


def _grid(b: int, d: int) -> tuple[int, int]:
    return b, -(-d // WIDE)


def _sizes(n: int) -> dict[str, Any]:
    return {"N": triton.next_power_of_2(n), "WIDE": WIDE, "BLOCK": BLOCK}
