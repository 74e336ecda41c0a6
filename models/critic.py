"""Q(x, A) and V(x) over action chunks: what a decision of H actions is worth, and what the moment is worth.

```
 pictures, state --backbone--+
                             +--> x [b d] ------+----> V(x)        an encoder of its own for Q and for V,
 task's words ---------------+                  |                  or one for both (`joint`)
                                                +----> Q1, Q2 (x, A)
 chunk, which steps of it are real --> [b d] ---+
```
The task enters: on many tasks at once a picture alone does not say what earns anything. Two Q heads, because the
smaller of two errs less upwards (Fujimoto et al. 2018, arXiv 1802.09477).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data.normalize import Normalizer, Stats
from data.schema import Schema
from models.config import CriticConfig
from models.layers.words import Words
from models.reading import Reader, Spec, make_backbone
from models.registry import BACKBONES
from models.types import Context, Observation

WORDS = 32  # width of a task's vector


@dataclass(frozen=True, kw_only=True)
class CriticSpec(Spec[CriticConfig]):
    """All that decides a critic's architecture and meaning."""

    @property
    def kind(self) -> str:
        return "critic"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "CriticSpec":
        return cls(
            horizon=value["horizon"],
            config=CriticConfig(**value["config"]),
            schema=Schema.from_json(value["schema"]),
        )


class Critic(Reader):
    """Twin Q and V, published and loaded as a policy is."""

    Spec = CriticSpec

    def __init__(self, spec: CriticSpec, *, state: Normalizer, action: Normalizer, trunk: nn.Module | None) -> None:
        """`trunk` is a backbone to share with a policy; None makes the critic's own."""
        super().__init__(spec, state=state, action=action)
        config = spec.config
        self.twin = TwinQ(spec, trunk)
        encoder = None if config.joint else Encoder(spec, trunk)
        self.value = Value(encoder, config)

    @classmethod
    def build(
        cls, spec: CriticSpec, stats: Mapping[str, Stats], *, seed: int = 0, trunk: nn.Module | None = None
    ) -> "Critic":
        """A new critic, its weights a function of `seed`. Raises `BadInput` as `Policy.build` does."""
        mode = spec.config.normalization
        return cls._assemble(spec, {name: Normalizer(stats=stats[name], mode=mode) for name in stats}, seed, trunk)

    @classmethod
    def restore(cls, spec: CriticSpec, normalizers: Mapping[str, Normalizer]) -> "Critic":
        """The architecture of `spec`, for weights that a checkpoint is about to fill in."""
        return cls._assemble(spec, normalizers, seed=0, trunk=None)

    @classmethod
    def _assemble(
        cls, spec: CriticSpec, normalizers: Mapping[str, Normalizer], seed: int, trunk: nn.Module | None
    ) -> "Critic":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(spec, state=normalizers["state"], action=normalizers["action"], trunk=trunk)

    def q(self, seen: Observation, chunk: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]) -> Float[Tensor, "b 2"]:
        """`seen` as `prepare`, `chunk` as `normalised` makes it."""
        return self.twin(seen, chunk, mask)

    def v(self, seen: Observation) -> Float[Tensor, " b"]:
        return self.value(seen, self.twin.encoder)

    def ranked(self, seen: Observation, proposals: Float[Tensor, "b k h a"]) -> Float[Tensor, "b k 2"]:
        """Q of k whole chunks per observation, which is read once. `proposals` in the schema's units."""
        mask = self.mask(torch.zeros(proposals.shape[:3], dtype=torch.bool, device=proposals.device))
        return self.twin.of_many(seen, self.normalised(proposals, mask), mask)


class TwinQ(nn.Module):
    """Two estimates of what a chunk is worth, from one encoding of the observation. Its copy is the target network."""

    def __init__(self, spec: CriticSpec, trunk: nn.Module | None) -> None:
        super().__init__()
        config, width = spec.config, spec.config.width
        self.encoder = Encoder(spec, trunk)
        self.chunk = mlp(spec.horizon * (spec.action_width + 1), width, width, config.layers)
        self.heads = nn.ModuleList(mlp(2 * width, width, 1, config.layers) for _ in range(2))

    def forward(
        self, seen: Observation, chunk: Float[Tensor, "b h w"], mask: Bool[Tensor, "b h w"]
    ) -> Float[Tensor, "b 2"]:
        return self._heads(self.encoder(seen), chunk, mask)

    def of_many(
        self, seen: Observation, chunks: Float[Tensor, "b k h w"], mask: Bool[Tensor, "b k h w"]
    ) -> Float[Tensor, "b k 2"]:
        b, k = chunks.shape[:2]
        x = self.encoder(seen).repeat_interleave(k, dim=0)
        return self._heads(x, chunks.flatten(0, 1), mask.flatten(0, 1)).unflatten(0, (b, k))

    def _heads(self, x: Tensor, chunk: Tensor, mask: Tensor) -> Tensor:
        real = mask.any(dim=-1, keepdim=True).to(chunk.dtype)  # a zero that was executed is not one that was not
        decision = self.chunk(torch.cat([chunk, real], dim=-1).flatten(1))
        return torch.cat([head(torch.cat([x, decision], dim=-1)) for head in self.heads], dim=-1)


class Value(nn.Module):
    """What the moment is worth."""

    def __init__(self, encoder: nn.Module | None, config: CriticConfig) -> None:
        super().__init__()
        self.encoder = encoder  # None: that of Q
        self.head = mlp(config.width, config.width, 1, config.layers)

    def forward(self, seen: Observation, of_q: nn.Module) -> Float[Tensor, " b"]:
        return self.head((self.encoder or of_q)(seen)).squeeze(-1)


class Encoder(nn.Module):
    """Pictures, state and words to one vector."""

    def __init__(self, spec: CriticSpec, trunk: nn.Module | None) -> None:
        super().__init__()
        self.backbone: Any = trunk if trunk is not None else make_backbone(spec, reads_best(spec.config.backbone))
        self.words = Words(WORDS)
        self.vector = nn.Sequential(
            nn.Linear(self.backbone.width + WORDS, spec.config.width), nn.LayerNorm(spec.config.width), nn.GELU()
        )

    def forward(self, seen: Observation) -> Float[Tensor, "b d"]:
        return self.vector(torch.cat([as_vector(self.backbone(seen)), self.words(seen.tasks)], dim=-1))


def reads_best(backbone: str) -> frozenset[str]:
    """The one field of a Context to ask of a backbone whose answer is to be one vector."""
    gives = BACKBONES.resolve(backbone).gives
    return frozenset({"pooled"}) & gives or frozenset({"tokens"})


def as_vector(context: Context) -> Float[Tensor, "b d"]:
    """The pooled vector, or the mean of the tokens that count."""
    if context.pooled is not None:
        return context.pooled
    tokens, is_pad = context.tokens, context.token_is_pad
    assert tokens is not None, "a backbone gives a vector or tokens"
    if is_pad is None:
        return tokens.mean(dim=1)
    counts = (~is_pad).to(tokens.dtype)[..., None]
    return (tokens * counts).sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def mlp(width: int, hidden: int, out: int, layers: int) -> nn.Sequential:
    """`layers` hidden layers with layer norm, which keeps a Q-function from running away off the data."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU()]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, out))
