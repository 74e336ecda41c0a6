"""Flow matching: the two conventions as data, the schedule of training times, one Euler integrator.

```
 noise_at_1   t   0 ------------------- 1        x_t = t·ε + (1-t)·a       v = dx/dt = ε - a     sampled 1 -> 0
                  action            noise        pi0, pi0.5, SmolVLA, F1, StateVLA (pi0's paper says the opposite)
 data_at_1    t   0 ------------------- 1        x_t = (1-t)·ε + t·a       v = dx/dt = a - ε     sampled 0 -> 1
                  noise            action        GR00T, InternManip, FQL
```
One is the other with t' = 1-t and v' = -v. A head carries its convention as data, because weights trained under one
are garbage under the other while every shape fits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

BETA = 1.5  # times are drawn from Beta(1.5, 1), which favours the noisy end (pi0, appendix B)
SPAN = 0.999  # of the time axis, so that no sample is pure data


@dataclass(frozen=True, kw_only=True)
class Convention:
    """Where on the time axis the noise lies."""

    noise_at: float  # 0 or 1

    def interpolate(
        self, noise: Float[Tensor, "*b h a"], action: Float[Tensor, "*b h a"], t: Float[Tensor, " *b"]
    ) -> Float[Tensor, "*b h a"]:
        """x_t on the straight line between the two."""
        share = self._noise_share(t)[..., None, None]
        return share * noise + (1 - share) * action

    def velocity(self, noise: Tensor, action: Tensor) -> Tensor:
        """dx/dt, the regression target; the same at every t."""
        return noise - action if self.noise_at else action - noise

    def sample_time(
        self, shape: tuple[int, ...], generator: torch.Generator, distribution: Literal["beta", "uniform"]
    ) -> Float[Tensor, "..."]:
        """Training times in [0, 1].

        "beta" has mean .6·.999 + .001 = .6004 (pi0), or (.999 - .6) / .999 = .3994 at data_at_1 (GR00T N1).
        Beta(α, 1) is u^(1/α): its distribution function is x^α. GR00T's formula goes below 0 by .001; clamped here.
        """
        u = torch.rand(shape, generator=generator, device=generator.device)
        if distribution == "uniform":
            return u
        beta = u ** (1 / BETA)
        return beta * SPAN + (1 - SPAN) if self.noise_at else ((SPAN - beta) / SPAN).clamp(min=0)

    def _noise_share(self, t: Tensor) -> Tensor:
        return t if self.noise_at else 1 - t


CONVENTIONS = {"noise_at_1": Convention(noise_at=1.0), "data_at_1": Convention(noise_at=0.0)}


def euler(
    convention: Convention,
    field: Callable[[Float[Tensor, "b h a"], Float[Tensor, " b"]], Float[Tensor, "b h a"]],
    noise: Float[Tensor, "b h a"],
    steps: int,
) -> Float[Tensor, "b h a"]:
    """Follow the velocity `field(x_t, t)` from the noise to the action in `steps` equal steps."""
    start, direction = convention.noise_at, -1 if convention.noise_at else 1
    x = noise
    for k in range(steps):
        t = torch.full((len(noise),), start + direction * k / steps, dtype=noise.dtype, device=noise.device)
        x = x + direction / steps * field(x, t)
    return x
