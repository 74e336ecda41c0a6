"""The selective scan's recurrence for a CPU, compiled by the machine's own C compiler when it is first asked for.

```
 channels      0 ... 15 | 16 ... 31 | ...        WIDE of them in one vector register, their states beside it
 t             0 ... 15 | 16 ... 31 | ...        as in `scan`: h kept before each block, backward does the block again
```
Five times as fast as what plain PyTorch reaches: a state is read and written where it is, not once per operation. One
file per number of states, kept in `.flywheel/kernels` under the digest of this text, the compiler and the processor.
Sequences are shared out among torch's threads; a sum over channels has one order: the same input, the same bits.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.paths import state_dir

BLOCK = 16  # steps between two states that are kept
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi", "-lm")
SOURCE = r"""
#include <stdlib.h>
#include <string.h>

#define WIDE 16
typedef float lanes __attribute__((vector_size(4 * WIDE)));
typedef int ints __attribute__((vector_size(4 * WIDE)));

static inline lanes load(const float *from, long wide) {
    lanes v = {0};
    if (wide == WIDE) memcpy(&v, from, sizeof v);
    else memcpy(&v, from, 4 * wide);
    return v;
}

static inline void store(float *to, lanes v, long wide) {
    if (wide == WIDE) memcpy(to, &v, sizeof v);
    else memcpy(to, &v, 4 * wide);
}

static inline float sum(lanes v) {
    float s = 0;
    for (int i = 0; i < WIDE; i++) s += v[i];
    return s;
}

/* exp of v <= 0 as 2^k 2^r with |r| <= 1/2: a Taylor polynomial in r ln 2, k into the exponent's bits. */
static inline lanes decay_of(lanes v) {
    const ints in_range = v > -87.0f;
    const lanes lowest = (lanes){0} - 87.0f;
    v = (lanes)(((ints)v & in_range) | ((ints)lowest & ~in_range));
    const lanes k = (v * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23 leaves no digits behind the point */
    const lanes r = (v * 1.44269504f - k) * 0.69314718f;
    lanes p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (lanes)((__builtin_convertvector(k, ints) + 127) << 23);
}

/* All are of one sequence: x, delta, y [l d], A [N d], B, C [l N], kept [ceil(l / BLOCK) N d]. */
void forward(long l, long d, const float *x, const float *delta, const float *A, const float *B, const float *C,
             float *y, float *kept) {
    for (long c = 0; c < d; c += WIDE) {
        const long wide = d - c < WIDE ? d - c : WIDE;
        lanes a[N], h[N];
        for (int n = 0; n < N; n++) a[n] = load(A + n * d + c, wide), h[n] = (lanes){0};
        for (long t = 0; t < l; t++) {
            if (t % BLOCK == 0)
                for (int n = 0; n < N; n++) store(kept + (t / BLOCK * N + n) * d + c, h[n], wide);
            const lanes step = load(delta + t * d + c, wide), u = step * load(x + t * d + c, wide);
            lanes out = {0};
            for (int n = 0; n < N; n++) {
                h[n] = decay_of(step * a[n]) * h[n] + u * B[t * N + n];
                out += h[n] * C[t * N + n];
            }
            store(y + t * d + c, out, wide);
        }
    }
}

/* dA [N d]. Returns 0, or 1 without memory. */
int backward(long l, long d, const float *x, const float *delta, const float *A, const float *B, const float *C,
             const float *kept, const float *dy, float *dx, float *ddelta, float *dA, float *dB, float *dC) {
    const long vectors = (d + WIDE - 1) / WIDE;
    lanes *whole = aligned_alloc(sizeof(lanes), 2 * vectors * N * sizeof(lanes));
    if (!whole) return 1;
    lanes *later = whole, *da = whole + vectors * N; /* what later blocks say of h, per channel; dA so far */
    memset(whole, 0, 2 * vectors * N * sizeof(lanes));
    for (long first = (l - 1) / BLOCK * BLOCK; first >= 0; first -= BLOCK) {
        const long steps = l - first < BLOCK ? l - first : BLOCK;
        lanes db[BLOCK][N], dc[BLOCK][N];
        memset(db, 0, sizeof db), memset(dc, 0, sizeof dc);
        for (long i = 0; i < vectors; i++) {
            const long c = i * WIDE, wide = d - c < WIDE ? d - c : WIDE;
            lanes a[N], h[BLOCK + 1][N], decay[BLOCK][N], *g = later + i * N, *slope = da + i * N;
            for (int n = 0; n < N; n++)
                a[n] = load(A + n * d + c, wide), h[0][n] = load(kept + (first / BLOCK * N + n) * d + c, wide);
            for (long k = 0; k < steps; k++) {
                const long t = first + k;
                const lanes step = load(delta + t * d + c, wide), u = step * load(x + t * d + c, wide);
                for (int n = 0; n < N; n++) {
                    decay[k][n] = decay_of(step * a[n]);
                    h[k + 1][n] = decay[k][n] * h[k][n] + u * B[t * N + n];
                }
            }
            for (long k = steps - 1; k >= 0; k--) {
                const long t = first + k;
                const lanes out = load(dy + t * d + c, wide), step = load(delta + t * d + c, wide);
                const lanes in = load(x + t * d + c, wide), u = step * in;
                lanes du = {0}, of_step = {0};
                for (int n = 0; n < N; n++) {
                    dc[k][n] += out * h[k + 1][n];
                    g[n] += out * C[t * N + n];
                    db[k][n] += g[n] * u;
                    du += g[n] * B[t * N + n];
                    g[n] *= decay[k][n];
                    const lanes of_exponent = g[n] * h[k][n];
                    of_step += of_exponent * a[n];
                    slope[n] += of_exponent * step;
                }
                store(dx + t * d + c, du * step, wide);
                store(ddelta + t * d + c, of_step + du * in, wide);
            }
        }
        for (long k = 0; k < steps; k++)
            for (int n = 0; n < N; n++) {
                dB[(first + k) * N + n] = sum(db[k][n]);
                dC[(first + k) * N + n] = sum(dc[k][n]);
            }
    }
    for (long c = 0; c < d; c += WIDE)
        for (int n = 0; n < N; n++) store(dA + n * d + c, da[c / WIDE * N + n], d - c < WIDE ? d - c : WIDE);
    free(whole);
    return 0;
}
"""

log = logging.getLogger(__name__)


@cache
def recurrence(states: int) -> Callable[..., Tensor] | None:
    """y_t = C_t h_t for float32 x, delta (after its softplus) [b l d], A [d n], B, C [b l n] with n = `states`.

    None where there is no C compiler, or it will not do; the log says why.
    """
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        log.info("Mamba's scan on cpu: portable; install a C compiler (apt-get install gcc) for one five times as fast")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler, states)))
    except (OSError, subprocess.CalledProcessError) as fault:
        said = getattr(fault, "stderr", "") or str(fault)
        log.warning("Mamba's scan on cpu: portable; %s failed: %s", compiler, said.strip().splitlines()[-1])
        return None
    log.info("Mamba's scan on cpu: compiled by %s", compiler)
    return lambda *given: _Recurrence.apply(library, *given)


def _compiled(compiler: str, states: int) -> Path:
    """The shared library, made once per machine."""
    features = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat"))]
    command = [compiler, *FLAGS, f"-DN={states}", f"-DBLOCK={BLOCK}", "-x", "c", "-"]
    about = "\n".join([SOURCE, *command, *features[:1]])
    made = state_dir() / "kernels" / f"scan-{hashlib.sha256(about.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        part = made.with_suffix(f".{os.getpid()}.part")
        subprocess.run([*command, "-o", str(part)], input=SOURCE, check=True, capture_output=True, text=True)
        part.rename(made)
    return made


class _Recurrence(torch.autograd.Function):
    """Tensors that are [b ...]; a call into C per sequence, which lets other threads run."""

    @staticmethod
    def forward(ctx, library: ctypes.CDLL, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        (b, length, d), n = x.shape, A.shape[1]
        x, delta, A, B, C = x.contiguous(), delta.contiguous(), A.mT.contiguous(), B.contiguous(), C.contiguous()
        y, kept = torch.empty_like(x), x.new_empty(b, -(-length // BLOCK), n, d)
        _each(b, lambda s: library.forward(*_longs(length, d), *_rows(s, x, delta), _at(A), *_rows(s, B, C, y, kept)))
        ctx.save_for_backward(x, delta, A, B, C, kept)
        ctx.library = library
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, kept = ctx.saved_tensors
        (b, length, d), dy = x.shape, dy.contiguous()
        dx, ddelta, dB, dC = (torch.empty_like(t) for t in (x, delta, B, C))
        dA = A.new_empty(b, *A.shape)
        failed = _each(
            b,
            lambda s: ctx.library.backward(
                *_longs(length, d), *_rows(s, x, delta), _at(A), *_rows(s, B, C, kept, dy, dx, ddelta, dA, dB, dC)
            ),
        )
        if any(failed):
            raise MemoryError("no memory for the scan's backward pass")
        return None, dx, ddelta, dA.sum(dim=0).mT, dB, dC


def _each(sequences: int, work: Callable[[int], int]) -> list[int]:
    workers = min(torch.get_num_threads(), sequences)
    return [work(s) for s in range(sequences)] if workers == 1 else list(_pool(workers).map(work, range(sequences)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "scan")


def _longs(*numbers: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(number) for number in numbers]


def _rows(row: int, *tensors: Tensor) -> list[ctypes.c_void_p]:
    """Where row `row` of each contiguous tensor begins."""
    return [ctypes.c_void_p(t.data_ptr() + row * t.stride(0) * t.element_size()) for t in tensors]


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
