"""What PaliGemma's language model and pi0's action expert share: transformers' Gemma, the prefix, the mask.

```
              P  P  S  A  A       P prefix: pictures and words     S state     A actions
 P            x  x                computed once, by the backbone: nothing of it depends on S or A
 S            x  x  x             computed by the head, at every step of the sampler,
 A            x  x  x  x  x       from the prefix's keys and values, layer by layer
```
Physical Intelligence 2024 (arXiv 2410.24164). LeRobot and openpi train on the joint sequence, which is the same sums:
what a token sees decides what becomes of it, and the two experts share no weight.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.errors import BadInput
from models.types import Layer, LayerShape

Attention = Literal["eager", "sdpa", "flex"]  # as a sum of matrices; PyTorch's kernels; compiled, GPU only
IMPLEMENTATIONS = {"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}  # transformers' names


def gemma_config(shape: LayerShape, *, width: int, mlp: int, attention: Attention, **more: Any) -> Any:
    """transformers' configuration of a Gemma whose tokens all see each other, unless a mask says otherwise."""
    from transformers.models.gemma import GemmaConfig

    make: Any = GemmaConfig  # a decorator hides its fields from type checkers
    config = make(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.queries,
        num_key_value_heads=shape.groups,
        head_dim=shape.width,
        initializer_range=width**-0.5,  # Gemma's own 0.02 suits its own width; the embedding is multiplied by √width
        use_bidirectional_attention=True,
        **more,
    )
    config._attn_implementation = IMPLEMENTATIONS[attention]
    return config


def refuse_unless_runs(attention: Attention, device: torch.device) -> None:
    if attention == "flex" and device.type != "cuda":
        raise BadInput(f"attention flex is compiled for GPUs, not for {device.type}; use attention sdpa")


def additive(seen: Bool[Tensor, "b q k"], like: Tensor) -> Float[Tensor, "b 1 q k"]:
    """What is added to the scores: 0 where a key is seen."""
    from lerobot.policies.common.vla_utils import prepare_attention_masks_4d

    return prepare_attention_masks_4d(seen, dtype=like.dtype)


def suffix_mask(prefix_is_pad: Bool[Tensor, "b p"], begins: tuple[bool, ...]) -> Bool[Tensor, "b s n"]:
    """Who sees whom: each of s tokens the prefix's that count, and those of its own block and of earlier ones.

    begins: per token of the suffix, whether a new block begins with it. n = p + s.
    """
    (b, p), s = prefix_is_pad.shape, len(begins)
    block = torch.tensor(begins, device=prefix_is_pad.device).cumsum(0)
    own = block[None] <= block[:, None]
    return torch.cat([~prefix_is_pad[:, None].expand(b, s, p), own.expand(b, s, s)], dim=2)


class Kept:
    """Stands in for transformers' cache: the keys and values of each layer, after rotation, as they are made."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Layer:
        self.layers.append((keys, values))
        return keys, values


class Prefix:
    """Stands in for transformers' cache: keys and values that are read and never grow."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Layer:
        """What attention reads: the prefix, then the tokens at hand."""
        before_keys, before_values = self.layers[layer]
        return torch.cat([before_keys, keys], dim=-2), torch.cat([before_values, values], dim=-2)
