"""A diffusion transformer as GR00T has it: tokens that read a context they cannot change, told the time at every norm.

```
                          time --waves, MLP--> condition
 x -+- norm(condition) - cross-attention -(+)-+- norm - MLP -(+)-     block 0, 2, ...: or every block
    `-----------------------^--------------'  `---------------'
 x -+- norm(condition) - self-attention --(+)-+- norm - MLP -(+)-     block 1, 3, ...
                            |
          keys and values of the context, computed once: for all draws of noise, and for all steps of an integrator
```
Peebles & Xie 2023 (arXiv 2212.09748), without the gates; GR00T N1 (arXiv 2503.14734). Parameters are named and shaped
as in GR00T and LeRobot, whose weights load here. Why LeRobot's DiT and SelfAttentionTransformer are not used:
* Both drop the mask of the padded context tokens (`encoder_attention_mask=None`), so padding is attended to.
* They project the context to keys and values again for every draw and every step: with several hundred tokens, most of
  an answer's work.
* Dropout on an attention's answer comes twice there; here once, with the same share of zeros.
* Their module takes ten seconds to import, in every process that acts.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from models.layers.embodiment import waves
from models.types import Layer

BUCKETS = 1000  # of the time axis
WAVES = 256  # numbers that tell the time before the MLP
EXPANSION = 4  # width between an MLP's linear maps, in widths


@dataclass(frozen=True, kw_only=True)
class DiTSize:
    """All numbers that decide the weights' shapes."""

    layers: int
    heads: int
    head: int  # width of a head
    out: int  # width of what it answers
    dropout: float = 0.0  # share
    interleave: bool = True  # every second block is one of self-attention

    @property
    def width(self) -> int:
        return self.heads * self.head


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What the blocks need of a context, whatever is asked of it."""

    layers: tuple[Layer | None, ...]  # keys and values; None for a block of self-attention
    attends: Bool[Tensor, "b 1 1 n"] | None  # False for padding; None = every token counts


class DiT(nn.Module):
    """Answers one vector per token."""

    transformer_blocks: Any  # an nn.ModuleList of Block

    def __init__(self, size: DiTSize, context: int) -> None:
        """context: width of the tokens that are read."""
        super().__init__()
        width = size.width
        self.timestep_encoder = _Time(width)
        self.transformer_blocks = nn.ModuleList(
            Block(
                width,
                size.heads,
                context=None if size.interleave and i % 2 else context,
                dropout=size.dropout,
                adaptive=True,
            )
            for i in range(size.layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, size.out)

    def remember(self, tokens: Float[Tensor, "b n c"], is_pad: Bool[Tensor, "b n"] | None) -> Memory:
        """The context, for `forward`."""
        layers = (block.attn1.remember(tokens) if block.crosses else None for block in self.transformer_blocks)
        return Memory(layers=tuple(layers), attends=None if is_pad is None else ~is_pad[:, None, None])

    def forward(self, x: Float[Tensor, "r t d"], bucket: Int[Tensor, " r"], memory: Memory) -> Float[Tensor, "r t o"]:
        """r = b·k rows for a context of b: each sample k times in a row. `bucket` is a time, see `bucket_of`."""
        condition = self.timestep_encoder(bucket)
        for block, layer in zip(self.transformer_blocks, memory.layers, strict=True):
            x = block(x, condition, layer, memory.attends if block.crosses else None)
        shift, scale = self.proj_out_1(silu(condition))[:, None].chunk(2, dim=-1)
        return self.proj_out_2(self.norm_out(x) * (1 + scale) + shift)


class SelfAttentionTransformer(nn.Module):
    """Context tokens read each other; padded ones are read by none."""

    def __init__(self, width: int, *, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            Block(width, heads, context=None, dropout=dropout, adaptive=False) for _ in range(layers)
        )

    def forward(self, x: Float[Tensor, "b n d"], is_pad: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n d"]:
        attends = None if is_pad is None else ~is_pad[:, None, None]
        for block in self.transformer_blocks:
            x = block(x, attends=attends)
        return x


class Block(nn.Module):
    """Attention, to a context or to its own tokens, and an MLP."""

    def __init__(self, width: int, heads: int, *, context: int | None, dropout: float, adaptive: bool) -> None:
        """context: width of what it attends to, None for its own tokens. adaptive: its first norm is told the time."""
        super().__init__()
        self.crosses = context is not None
        self.norm1 = AdaLayerNorm(width) if adaptive else nn.LayerNorm(width)
        self.attn1 = Attention(width, heads, context=context or width, dropout=dropout)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=not adaptive)
        self.ff = _FeedForward(width, dropout)

    def forward(
        self,
        x: Float[Tensor, "r t d"],
        condition: Float[Tensor, "r d"] | None = None,
        layer: Layer | None = None,
        attends: Bool[Tensor, "b 1 1 n"] | None = None,
    ) -> Float[Tensor, "r t d"]:
        normed = self.norm1(x) if condition is None else self.norm1(x, condition)
        x = x + self.attn1(normed, layer or self.attn1.remember(normed), attends)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Queries of x to keys and values that were computed before."""

    def __init__(self, width: int, heads: int, *, context: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context, width)
        self.to_v = nn.Linear(context, width)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(1 - (1 - dropout) ** 2))

    def remember(self, tokens: Float[Tensor, "b n c"]) -> Layer:
        return self._heads(self.to_k(tokens)), self._heads(self.to_v(tokens))

    def forward(
        self, x: Float[Tensor, "r t d"], layer: Layer, attends: Bool[Tensor, "b 1 1 n"] | None
    ) -> Float[Tensor, "r t d"]:
        """Each sample's k rows are asked as one longer row: a query's answer does not depend on the other queries."""
        keys, values = layer
        queries = self._heads(self.to_q(x).reshape(len(keys), -1, x.shape[-1]))
        seen = scaled_dot_product_attention(queries, keys, values, attn_mask=attends)
        return self.to_out(seen.transpose(1, 2).reshape(x.shape))

    def _heads(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b g n f"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class AdaLayerNorm(nn.Module):
    """A norm whose scale and shift the condition decides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Float[Tensor, "r t d"], condition: Float[Tensor, "r d"]) -> Float[Tensor, "r t d"]:
        scale, shift = self.linear(silu(condition))[:, None].chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class _FeedForward(nn.Module):
    """As diffusers' with "gelu-approximate"."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        widen, narrow = nn.Linear(width, EXPANSION * width), nn.Linear(EXPANSION * width, width)
        first = nn.Sequential(OrderedDict(proj=widen))
        self.net = nn.ModuleList([first, nn.Dropout(dropout), narrow, nn.Dropout(dropout)])

    def forward(self, x: Float[Tensor, "r t d"]) -> Float[Tensor, "r t d"]:
        widen, between, narrow, after = self.net
        return after(narrow(between(gelu(widen(x), approximate="tanh"))))


class _Time(nn.Module):
    """A bucket of the time axis to what the norms are told; as diffusers', cosines first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = nn.Sequential(
            OrderedDict(linear_1=nn.Linear(WAVES, width), act=nn.SiLU(), linear_2=nn.Linear(width, width))
        )

    def forward(self, bucket: Int[Tensor, " r"]) -> Float[Tensor, "r d"]:
        return self.timestep_embedder(waves(bucket, WAVES, WAVES // 2 - 1).roll(WAVES // 2, dims=-1))


def bucket_of(t: Float[Tensor, " r"]) -> Int[Tensor, " r"]:
    """Times in [0, 1] to 0 .. 999; the last bucket takes 1 in."""
    return (t * BUCKETS).long().clamp(0, BUCKETS - 1)
