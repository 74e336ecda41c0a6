"""A flow-matching head: a small mixer denoises a whole chunk, conditioned on the context by adaptive layer norm.

The observation is read once; each of the Euler steps, and each of the `draws` of noise per training sample, costs only
the mixer. Lipman et al. 2023 (arXiv 2210.02747) for the loss, Peebles & Xie 2023 (arXiv 2212.09748) for the
zero-initialised gates.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.flow import CONVENTIONS, euler
from models.layers.embedding import sequence_positions, sinusoid
from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Options of the `flow` head."""

    convention: Literal["noise_at_1", "data_at_1"] = "noise_at_1"  # where on the time axis the noise lies
    time: Literal["beta", "uniform"] = "beta"  # distribution of training times
    steps: int = 10  # Euler steps when acting
    draws: int = 2  # (noise, time) pairs per training sample; the backbone runs once for all
    dim: int = 128  # width of the mixer
    layers: int = 3  # mixer blocks
    expansion: int = 2  # width between a block's two linear maps, in dims


class FlowHead(nn.Module):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = FlowConfig
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    likes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: FlowConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.convention = CONVENTIONS[config.convention]
        self.noise_shape = (sizes.horizon, sizes.action)
        self.context = nn.Linear(sizes.context, config.dim)
        self.time = nn.Sequential(nn.Linear(config.dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim))
        self.of_action = nn.Linear(sizes.action, config.dim)
        self.blocks = nn.ModuleList(_Block(config, sizes.horizon) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.velocity_of = nn.Linear(config.dim, sizes.action)
        self.register_buffer("places", sequence_positions(sizes.horizon, config.dim), persistent=False)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error of the velocity, a mean over valid entries and draws."""
        draws, b = self.config.draws, len(action)
        action = action.expand(draws, *action.shape)
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        t = self.convention.sample_time((draws, b), generator, self.config.time)
        x_t = self.convention.interpolate(noise, action, t)
        target = self.convention.velocity(noise, action)
        condition = self.condition(context).repeat(draws, 1)
        predicted = self.velocity(x_t.flatten(0, 1), t.flatten(), condition)
        errors = (predicted - target.flatten(0, 1)) ** 2
        loss = masked_mean(errors, mask.repeat(draws, 1, 1)).view(draws, b).mean(dim=0)
        return loss, {"velocity_mse": loss.mean().detach()}

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        condition = self.condition(context)
        return euler(self.convention, lambda x, t: self.velocity(x, t, condition), noise, self.config.steps)

    def condition(self, context: Context) -> Float[Tensor, "b d"]:
        return self.context(context.pooled)

    def velocity(
        self, x_t: Float[Tensor, "b h a"], t: Float[Tensor, " b"], condition: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b h a"]:
        """dx/dt at x_t, under the head's own convention."""
        condition = condition + self.time(sinusoid(t, self.config.dim, longest=4.0, shortest=4e-3))
        x = self.of_action(x_t) + self.places
        for block in self.blocks:
            x = block(x, condition)
        return self.velocity_of(self.norm(x))


class _Block(nn.Module):
    """Mix over the chunk's steps, then over features; the condition scales, shifts and gates both."""

    def __init__(self, config: FlowConfig, horizon: int) -> None:
        super().__init__()
        dim = config.dim
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.over_steps = _mlp(horizon, config.expansion * horizon)
        self.over_features = _mlp(dim, config.expansion * dim)
        modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(modulation.weight)  # every block begins as the identity
        nn.init.zeros_(modulation.bias)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Float[Tensor, "b h d"], condition: Float[Tensor, "b d"]) -> Float[Tensor, "b h d"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.over_steps((self.norms[0](x) * (1 + scale1) + shift1).mT).mT
        return x + gate2 * self.over_features(self.norms[1](x) * (1 + scale2) + shift2)


def _mlp(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
