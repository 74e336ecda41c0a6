"""A transformer that is told in each layer where its tokens are (DETR): places join queries and keys, never values.

```
 tokens + places --queries, keys--+
 tokens ---------------values-----+--> Encoder --> memory --values------------+
                                                   memory + places --keys-----+--> Decoder --> one vector per query
                                                   queries + their places-----+
```
Carion et al. 2020 (arXiv 2005.12872), as in ACT. Parameters have the names of LeRobot's ACTEncoder and ACTDecoder: its
weights fit, and a test compares the two. They are not used themselves for what they cannot do: their decoder knows no
padded tokens, both compute attention weights that nobody reads, and to import them takes a process that acts four times
as long as all else it imports.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

TEMPERATURE = 1e4  # ratio of the longest period to the shortest


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Of every layer of a stack."""

    dim: int  # width of a token
    heads: int  # attention heads
    feedforward: int  # width between a layer's two linear maps
    dropout: float = 0.0  # share
    pre_norm: bool = False  # normalise what a block reads, instead of the sum behind it


class _Layer(nn.Module):
    """What both kinds of layers have."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__()
        self.pre_norm = size.pre_norm
        self.self_attn = _attention(size)
        self.linear1 = nn.Linear(size.dim, size.feedforward)
        self.linear2 = nn.Linear(size.feedforward, size.dim)
        self.norm1 = nn.LayerNorm(size.dim)
        self.norm2 = nn.LayerNorm(size.dim)
        self.dropout = nn.Dropout(size.dropout)

    def residual(
        self, x: Float[Tensor, "b n d"], norm: nn.Module, block: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "b n d"]:
        if self.pre_norm:
            return x + self.dropout(block(norm(x)))
        return norm(x + self.dropout(block(x)))

    def feed(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.linear2(self.dropout(self.linear1(x).relu()))

    def attend(self, x: Tensor, places: Tensor | None, is_pad: Tensor | None = None) -> Float[Tensor, "b n d"]:
        """To its own tokens."""
        placed = _at(x, places)
        return self.self_attn(placed, placed, x, key_padding_mask=is_pad, need_weights=False)[0]


class EncoderLayer(_Layer):
    """Self-attention, feed-forward."""

    def forward(self, x: Tensor, places: Tensor | None, is_pad: Tensor | None) -> Float[Tensor, "b n d"]:
        x = self.residual(x, self.norm1, lambda y: self.attend(y, places, is_pad))
        return self.residual(x, self.norm2, self.feed)


class DecoderLayer(_Layer):
    """Self-attention, attention to the memory, feed-forward."""

    def __init__(self, size: LayerSize) -> None:
        super().__init__(size)
        self.multihead_attn = _attention(size)
        self.norm3 = nn.LayerNorm(size.dim)

    def forward(
        self, x: Tensor, memory: Tensor, query_places: Tensor | None, places: Tensor | None, is_pad: Tensor | None
    ) -> Float[Tensor, "b h d"]:
        keys = _at(memory, places)

        def read(y: Tensor) -> Tensor:
            query = _at(y, query_places)
            return self.multihead_attn(query, keys, memory, key_padding_mask=is_pad, need_weights=False)[0]

        x = self.residual(x, self.norm1, lambda y: self.attend(y, query_places))
        x = self.residual(x, self.norm2, read)
        return self.residual(x, self.norm3, self.feed)


class Encoder(nn.Module):
    """Layers over one set of tokens; a last norm if they have theirs before their blocks."""

    def __init__(self, size: LayerSize, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(size) for _ in range(layers))
        self.norm = nn.LayerNorm(size.dim) if size.pre_norm else nn.Identity()

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        places: Float[Tensor, "n d"] | None = None,
        is_pad: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        for layer in self.layers:
            tokens = layer(tokens, places, is_pad)
        return self.norm(tokens)


class Decoder(nn.Module):
    """Queries read the memory layer by layer; a last norm."""

    def __init__(self, size: LayerSize, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(size) for _ in range(layers))
        self.norm = nn.LayerNorm(size.dim)

    def forward(
        self,
        queries: Float[Tensor, "b h d"],
        memory: Float[Tensor, "b n d"],
        *,
        query_places: Float[Tensor, "h d"] | None = None,
        places: Float[Tensor, "n d"] | None = None,
        is_pad: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h d"]:
        """`places` and `is_pad` are the memory's."""
        for layer in self.layers:
            queries = layer(queries, memory, query_places, places, is_pad)
        return self.norm(queries)


def picture_places(height: int, width: int, dim: int) -> Float[Tensor, "n d"]:
    """One embedding per cell, row by row: the first half says which row, the second which column.

    Cells count from 1, and the last is at 2π; sine and cosine take turns.
    """
    rows, columns = (_interleaved(torch.arange(1, n + 1) / (n + 1e-6) * 2 * math.pi, dim // 2) for n in (height, width))
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def chain_places(length: int, dim: int) -> Float[Tensor, "n d"]:
    """One embedding per place 0 .. length-1; sine and cosine take turns."""
    return _interleaved(torch.arange(length), dim)


def _interleaved(angle: Float[Tensor, " n"], dim: int) -> Float[Tensor, "n d"]:
    angles = angle[:, None].double() / TEMPERATURE ** (torch.arange(0, dim, 2, device=angle.device) / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()


def _attention(size: LayerSize) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(size.dim, size.heads, dropout=size.dropout, batch_first=True)


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x + places
