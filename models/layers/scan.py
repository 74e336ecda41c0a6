"""Mamba's selective scan: a linear recurrence whose decay, input and output depend on the token.

    h_t = exp(δ_t A) h_{t-1} + (δ_t x_t) B_t        y_t = (C_t h_t + D x_t) silu(gate_t)        h_{-1} = 0

for each of d channels, each with n states: A [d n] < 0, B_t and C_t [n] shared by the channels, δ_t = softplus(delta_t)
[d]. Gu & Dao 2023 (arXiv 2312.00752), algorithm 2, as in mamba-ssm.

On CUDA mamba-ssm's kernel does it where that is installed (extra `cuda`), ours in Triton (`scan_triton`) where it is
not; on a CPU ours in C (`scan_c`) where there is a compiler; everywhere else `portable_scan`. Their results are the
same to rounding. Which one, is said once in the log.

The portable one goes block by block, so that what it works on stays in the processor's cache and of all states only
one per block is kept:

    t        0 ... 15 | 16 ... 31 | 32 ... 47        forward: the states of one block at a time, from the left
             ^          ^           ^  h_{t-1} kept   backward: each block again from the kept h, from the right
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers import scan_c

BLOCK = 16  # steps; memory is length / BLOCK + 3 BLOCK states [b n d]

log = logging.getLogger(__name__)


def selective_scan(
    x: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l n"],
    C: Float[Tensor, "b l n"],
    D: Float[Tensor, " d"],
    gate: Float[Tensor, "b l d"],
) -> Float[Tensor, "b l d"]:
    """The whole sequence at once, from h = 0. `delta` is before the softplus. Float32 inside, x's type outside."""
    return scan_on(x.device.type)(x, delta, A, B, C, D, gate)


def selective_step(
    x: Float[Tensor, "b d"],
    delta: Float[Tensor, "b d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b n"],
    C: Float[Tensor, "b n"],
    D: Float[Tensor, " d"],
    gate: Float[Tensor, "b d"],
    h: Float[Tensor, "b d n"],
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d n"]]:
    """One token: what `selective_scan` gives at it, and the h to go on from."""
    delta = F.softplus(delta.to(h.dtype))[:, :, None]
    h = torch.exp(delta * A) * h + delta * x[:, :, None] * B[:, None]
    y = (h * C[:, None]).sum(dim=-1) + D * x
    return (y * F.silu(gate)).to(x.dtype), h


@cache
def scan_on(device: str) -> Callable[..., Tensor]:
    """`selective_scan` for a type of device, by what is installed."""
    if device == "cpu":
        return compiled_scan  # says itself whether it can be
    if device != "cuda":
        log.info("Mamba's scan on %s: portable", device)
        return portable_scan
    try:
        kernel = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError as why:
        log.info("Mamba's scan on cuda: Triton (mamba-ssm, extra `cuda`: %s)", why)
        return importlib.import_module("models.layers.scan_triton").triton_scan
    log.info("Mamba's scan on cuda: mamba-ssm's kernel")

    def with_kernel(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor) -> Tensor:
        x, delta, B, C, gate = (t.to(x.dtype).mT for t in (x, delta, B, C, gate))  # it wants time last, and one type
        return kernel(x, delta, A.float(), B, C, D.float(), z=gate, delta_softplus=True).mT

    return with_kernel


def portable_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Float[Tensor, "b l d"]:
    """`selective_scan` in plain PyTorch on any device."""
    return _around(_Scan.apply, x, delta, A, B, C, D, gate)


def compiled_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, gate: Tensor
) -> Float[Tensor, "b l d"]:
    """`selective_scan` on a CPU, in C if that can be compiled. In float64 the portable one, which is an oracle then."""
    compiled = scan_c.recurrence(A.shape[1]) if x.dtype != torch.float64 else None
    return _around(compiled or _Scan.apply, x, delta, A, B, C, D, gate)


def _around(recurrence: Callable[..., Tensor], x: Tensor, delta: Tensor, A: Tensor, *others: Tensor) -> Tensor:
    """Softplus, skip and gate around y_t = C_t h_t."""
    given, dtype = x.dtype, torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, delta, A, B, C, D, gate = (t.to(dtype) for t in (x, delta, A, *others))
        y = recurrence(x, F.softplus(delta), A, B, C)
        return ((y + D * x) * F.silu(gate)).to(given)


class _Scan(torch.autograd.Function):
    """y_t = C_t h_t. A block's tensors are [k b n d] inside: time first, so that a step is one piece of memory."""

    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        (b, length, d), n = x.shape, A.shape[1]
        A = A.mT.contiguous().mT  # channels side by side, as everywhere here
        decay, states = x.new_empty(2, min(BLOCK, length), b, n, d)
        kept = x.new_zeros(-(-length // BLOCK) + 1, b, n, d)  # h before each block, and the last
        y = torch.empty_like(x)
        for i, block in enumerate(_blocks(length)):
            now = _Block(x, delta, A, B, block, decay, states, kept[i])
            kept[i + 1] = now.states[-1]
            y[:, block] = _by_time(C, block).unsqueeze(2).matmul(now.states).squeeze(2).transpose(0, 1)
        ctx.save_for_backward(x, delta, A, B, C, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        x, delta, A, B, C, kept = ctx.saved_tensors
        (b, length, d), n = x.shape, A.shape[1]
        decay, states, dh = x.new_empty(3, min(BLOCK, length), b, n, d)
        dx, ddelta, dA = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(A.mT)
        dB, dC = torch.empty_like(B), torch.empty_like(C)
        later = x.new_zeros(b, n, d)  # what the loss says of the state that the block ends with, through later steps
        for i, block in reversed(list(enumerate(_blocks(length)))):
            now = _Block(x, delta, A, B, block, decay, states, kept[i])
            g = dh[: len(now.states)]
            dy_, C_ = _by_time(dy, block), _by_time(C, block)
            torch.mul(dy_.unsqueeze(2), C_.unsqueeze(3), out=g)
            for g_t, decay_t in zip(reversed(g.unbind()), reversed(now.decay.unbind()), strict=True):
                later = decay_t.mul_(g_t.add_(later))  # now.decay becomes dh_t exp(δ_t A)
            later = later.clone()
            dC[:, block] = now.states.matmul(dy_.unsqueeze(3)).squeeze(3).transpose(0, 1)
            dB[:, block] = g.matmul(now.u.unsqueeze(3)).squeeze(3).transpose(0, 1)
            du = now.B.unsqueeze(2).matmul(g).squeeze(2)
            dexponent = now.decay  # of exp(δ_t A): times h_{t-1}
            dexponent[1:].mul_(now.states[:-1])
            dexponent[0].mul_(kept[i])
            dA += torch.mul(dexponent, now.delta.unsqueeze(2), out=g).sum(dim=(0, 1))
            d_delta = du * now.x
            for dexponent_n, A_n in zip(dexponent.unbind(dim=2), A.unbind(dim=1), strict=True):
                d_delta.addcmul_(dexponent_n, A_n)
            ddelta[:, block] = d_delta.transpose(0, 1)
            dx[:, block] = (du * now.delta).transpose(0, 1)
        return dx, ddelta, dA.mT, dB, dC


class _Block:
    """The steps `block` of the recurrence from the state `h`, computed into the buffers `decay` and `states`."""

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, block: slice, decay: Tensor, states: Tensor, h: Tensor
    ) -> None:
        self.x, self.delta, self.B = (_by_time(t, block) for t in (x, delta, B))
        self.u = self.delta * self.x
        self.decay, self.states = decay[: len(self.x)], states[: len(self.x)]
        torch.mul(self.delta.unsqueeze(2), A.mT, out=self.decay).exp_()
        torch.mul(self.u.unsqueeze(2), self.B.unsqueeze(3), out=self.states)
        for decay_t, h_t in zip(self.decay.unbind(), self.states.unbind(), strict=True):
            h = h_t.addcmul_(decay_t, h)


def _blocks(length: int) -> list[slice]:
    return [slice(*ends) for ends in pairwise([*range(0, length, BLOCK), length])]


def _by_time(x: Float[Tensor, "b l w"], block: slice) -> Float[Tensor, "k b w"]:
    return x[:, block].transpose(0, 1)
