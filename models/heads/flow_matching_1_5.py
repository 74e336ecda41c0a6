"""GR00T N1.5's action head: the head of N1 with an ear for its context; drawing and table in `models.layers.flow_dit`.

```
 Context.tokens --LayerNorm--> self-attention, masked --> what the DiT attends to
```
| preset    | self-attention: layers, heads | extra tokens | for                                       |
|-----------|-------------------------------|--------------|-------------------------------------------|
| tiny      | 1, 2                          | 2            | tests                                     |
| small     | 1, 4                          | 0            | CPU                                       |
| published | 4, 32                         | 32           | GPU; context 2048 wide: 1.07 B parameters |

Self-attention is as wide as the context. The extra tokens, learnt, stand between state and actions: no document of
InternManip's speaks of them, but N1.5's weights hold them ("future_tokens"). The mask of padded tokens, dropped in
the original's self-attention too, is applied.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from models.flow import euler
from models.layers.dit import SelfAttentionTransformer
from models.layers.flow_dit import PRESETS as DIT_PRESETS
from models.layers.flow_dit import FlowDit, FlowDitConfig
from models.types import Context, Sizes


@dataclass(frozen=True, kw_only=True)
class _Size:
    layers: int
    heads: int
    extra: int


PRESETS = {
    "tiny": _Size(layers=1, heads=2, extra=2),
    "small": _Size(layers=1, heads=4, extra=0),
    "published": _Size(layers=4, heads=32, extra=32),
}


@dataclass(frozen=True, kw_only=True)
class FlowMatching15Config(FlowDitConfig):
    """Options of the `flow_matching_1_5` head."""

    expand_batch: int = 0  # (noise, time) pairs per training sample, the backbone runs once for all; 0 = the preset's
    use_vlln: bool = True  # norm and self-attention on the context's tokens


class FlowMatching15Head(FlowDit):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = FlowMatching15Config
    config: FlowMatching15Config

    def __init__(self, config: FlowMatching15Config, sizes: Sizes) -> None:
        """Raises `BadInput` for a context whose width the heads do not divide."""
        size, width = PRESETS[config.preset], sizes.context
        super().__init__(config, sizes, draws=config.expand_batch, extra=size.extra)
        if not config.use_vlln:
            return
        if width % size.heads:
            raise BadInput(f"head flow_matching_1_5: {size.heads} heads do not divide a context {width} wide")
        self.vlln = nn.LayerNorm(width)
        self.vl_self_attention = SelfAttentionTransformer(
            width, layers=size.layers, heads=size.heads, dropout=DIT_PRESETS[config.preset].dropout
        )

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        return euler(self.convention, self.field(context), noise, self.config.steps)

    def read(self, context: Context) -> Float[Tensor, "b n d"]:
        tokens = super().read(context)
        return self.vl_self_attention(self.vlln(tokens), context.token_is_pad) if self.config.use_vlln else tokens
