"""A Gaussian over chunks: mean and standard deviation of every action component at every step, from one vector.

The chunk-level offline RL design's policy. Its likelihood is closed, which an entropy term needs; its one mode is its
limit: of two ways around an obstacle it takes the mean.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes

SMALLEST = 1e-6  # standard deviation, normalised units


@dataclass(frozen=True, kw_only=True)
class GaussianConfig:
    """Options of the `gaussian` head."""

    dim: int = 256  # width of the hidden layers


class GaussianHead(nn.Module):
    """Samples mean + std · noise."""

    Config: ClassVar[type] = GaussianConfig
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    likes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: GaussianConfig, sizes: Sizes) -> None:
        super().__init__()
        self.noise_shape = (sizes.horizon, sizes.action)
        self.mean, self.spread = (
            nn.Sequential(
                nn.Linear(sizes.context, config.dim), nn.ReLU(), nn.Linear(config.dim, sizes.horizon * sizes.action)
            )
            for _ in range(2)
        )

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """-log π(A|x), a mean over the entries that count."""
        nll = -self.log_prob(context, action, mask)
        return nll, {"nll": nll.mean().detach()}

    def log_prob(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"]
    ) -> Float[Tensor, " b"]:
        """Mean over the entries where `mask` is true: nats per dimension, whatever the chunk's size."""
        mean, std = self.moments(context)
        log_density = -0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        return masked_mean(log_density, mask)

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        mean, std = self.moments(context)
        return mean + std * noise

    def moments(self, context: Context) -> tuple[Float[Tensor, "b h a"], Float[Tensor, "b h a"]]:
        """Mean and standard deviation, normalised units."""
        mean, spread = (of(context.pooled).unflatten(-1, self.noise_shape) for of in (self.mean, self.spread))
        return mean, softplus(spread) + SMALLEST
