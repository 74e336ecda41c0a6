"""Action chunking with transformers: H learnt queries read the context and answer with H actions.

```
                     training: [CLS, state, executed actions] --style encoder--> N(mean, variance) --+
                     acting: 0 ----------------------------------------------------------------------+--> style, 32
 [style, tokens of the context] --encoder--> memory --H queries, decoder--> H vectors --Linear--> chunk
```
| preset    | dim | heads | feedforward | encoder, decoder, style layers | dropout | style | queries   | for   |
|-----------|-----|-------|-------------|--------------------------------|---------|-------|-----------|-------|
| tiny      |  32 |   2   |      64     | 1, 1, 1                        | 0       | no    | tokens    | tests |
| small     | 128 |   4   |     256     | 1, 1, 2                        | 0       | no    | tokens    | CPU   |
| published | 512 |   8   |    3200     | 4, 1, 4                        | 0.1     | yes   | positions | GPU   |

Zhao et al. 2023 (arXiv 2304.13705). Its code means 7 decoder layers and uses the first alone; hence 1. The loss is L1
over valid entries, plus the style's KL towards N(0, 1) summed over its components. Weights have the names of LeRobot's
ACT inside `encoder`, `decoder` and `style.encoder` (`models.layers.detr` says why those are not LeRobot's own).

What differs from LeRobot's ACT:
* The loss is per sample. The original takes the mean over padded steps too, which under-weights short tails.
* Padded tokens of a context are read by nobody: vision-language backbones pad their prompts.
* Any backbone with tokens will do: positions that it gives apart join queries and keys in each layer, those that it has
  added to its tokens stay there.
* Without a style there is no map of it either, whose answer to zero is a constant; that constant is a token of its own.
* Queries may enter the decoder as its tokens. With few tokens to read, as of the `resnet` backbone, positions alone
  leave them little to differ by.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from data.errors import BadInput
from models.layers.detr import Decoder, Encoder, LayerSize, chain_places
from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes


@dataclass(frozen=True, kw_only=True)
class _Size:
    dim: int
    heads: int
    feedforward: int
    encoder_layers: int
    decoder_layers: int
    vae_layers: int
    dropout: float = 0.0
    use_vae: bool = False
    queries: Literal["tokens", "positions"] = "tokens"


PRESETS = {
    "tiny": _Size(dim=32, heads=2, feedforward=64, encoder_layers=1, decoder_layers=1, vae_layers=1),
    "small": _Size(dim=128, heads=4, feedforward=256, encoder_layers=1, decoder_layers=1, vae_layers=2),
    "published": _Size(
        dim=512,
        heads=8,
        feedforward=3200,
        encoder_layers=4,
        decoder_layers=1,
        vae_layers=4,
        dropout=0.1,
        use_vae=True,
        queries="positions",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ActConfig:
    """Options of the `act` head. None: as the preset has it."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above
    dim: int | None = None  # width of the transformer
    heads: int | None = None  # attention heads
    feedforward: int | None = None  # width between a layer's two linear maps
    encoder_layers: int | None = None  # over the context's tokens; 0 = the queries read them as they are
    decoder_layers: int | None = None  # over the queries
    dropout: float | None = None  # share; drawing the masks costs a CPU a tenth of the step
    queries: Literal["tokens", "positions"] | None = None  # what the decoder begins with: the queries, or zeros (DETR)
    pre_norm: bool = False  # normalise what a layer's blocks read, instead of the sums behind them
    use_vae: bool | None = None  # latent style; for demonstrations by people, a scripted expert has one style
    latent: int = 32  # width of the style
    vae_layers: int | None = None  # of the style's encoder
    kl_weight: float = 10.0  # of the KL term beside the L1 term
    environment: int = 0  # how many of the state's last components the style does not read, as they are no robot's

    def __post_init__(self) -> None:
        if self.size.dim % (2 * self.size.heads):
            raise BadInput(f"head act: dim {self.size.dim} must be a multiple of 2 x heads, which is {self.size.heads}")

    @property
    def size(self) -> _Size:
        """The preset with what is given instead."""
        given = {f.name: getattr(self, f.name) for f in fields(_Size)}
        return replace(PRESETS[self.preset], **{name: v for name, v in given.items() if v is not None})

    @property
    def layer(self) -> LayerSize:
        size = self.size
        return LayerSize(
            dim=size.dim,
            heads=size.heads,
            feedforward=size.feedforward,
            dropout=size.dropout,
            pre_norm=self.pre_norm,
        )


class ActHead(nn.Module):
    """Deterministic: the same context gives the same chunk."""

    Config: ClassVar[type] = ActConfig
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    likes: ClassVar[frozenset[str]] = frozenset({"places"})
    noise_shape = (0,)

    def __init__(self, config: ActConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, size, layer = config, config.size, config.layer
        narrow = sizes.context != size.dim
        self.context = nn.Linear(sizes.context, size.dim, bias=False) if narrow else nn.Identity()
        if size.use_vae:
            self.style = _Style(config, sizes)
            self.of_style = nn.Linear(config.latent, size.dim)
        else:
            self.no_style = nn.Parameter(torch.randn(size.dim) * 0.02)
        self.style_place = nn.Parameter(torch.randn(size.dim) * 0.02)
        self.encoder = Encoder(layer, size.encoder_layers)
        self.decoder = Decoder(layer, size.decoder_layers)
        scale = 0.02 if size.queries == "tokens" else 1.0  # as positions they must stand out (DETR)
        self.queries = nn.Parameter(torch.randn(sizes.horizon, size.dim) * scale)
        self.action = nn.Linear(size.dim, sizes.action)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        if not self.config.size.use_vae:
            l1 = masked_mean((self._decode(context, None) - action).abs(), mask)
            return l1, {"l1": l1.mean().detach()}
        mean, log_variance = self.style(context.state, action, mask)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        l1 = masked_mean((self._decode(context, mean + (log_variance / 2).exp() * noise) - action).abs(), mask)
        kl = gaussian_kl(mean, log_variance)
        return l1 + self.config.kl_weight * kl, {"l1": l1.mean().detach(), "kl": kl.mean().detach()}

    def sample(self, context: Context, noise: Float[Tensor, "b 0"]) -> Float[Tensor, "b h a"]:
        style = noise.new_zeros(len(noise), self.config.latent) if self.config.size.use_vae else None
        return self._decode(context, style)

    def _decode(self, context: Context, style: Float[Tensor, "b z"] | None) -> Float[Tensor, "b h a"]:
        tokens, places, is_pad = self._with_style(context, style)
        memory = self.encoder(tokens, places, is_pad)
        queries = self.queries.expand(len(tokens), -1, -1)
        if self.config.size.queries == "tokens":
            decoded = self.decoder(queries, memory, places=places, is_pad=is_pad)
        else:
            start = torch.zeros_like(queries)
            decoded = self.decoder(start, memory, query_places=self.queries, places=places, is_pad=is_pad)
        return self.action(decoded)

    def _with_style(
        self, context: Context, style: Float[Tensor, "b z"] | None
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "n d"] | None, Bool[Tensor, "b n"] | None]:
        """Tokens, places and padding of the context, behind those of the style."""
        tokens, is_pad = self.context(context.tokens), context.token_is_pad
        first = self.no_style.expand(len(tokens), -1) if style is None else self.of_style(style)
        if context.places is None:
            first, places = first + self.style_place, None
        else:
            places = torch.cat([self.style_place[None], self.context(context.places)])
        is_pad = None if is_pad is None else pad(is_pad, (1, 0), value=False)
        return torch.cat([first[:, None], tokens], dim=1), places, is_pad


class _Style(nn.Module):
    """Reads [CLS, state, actions] and answers with the mean and log variance of the latent."""

    places: Tensor

    def __init__(self, config: ActConfig, sizes: Sizes) -> None:
        super().__init__()
        dim, self.robot = config.size.dim, sizes.state - config.environment
        self.cls = nn.Parameter(torch.randn(dim) * 0.02)
        if self.robot:
            self.state = nn.Linear(self.robot, dim)
        self.action = nn.Linear(sizes.action, dim)
        self.encoder = Encoder(config.layer, config.size.vae_layers)
        self.moments = nn.Linear(dim, 2 * config.latent)
        self.before = 2 if self.robot else 1  # tokens before the actions
        self.register_buffer("places", chain_places(self.before + sizes.horizon, dim), persistent=False)

    def forward(
        self, state: Float[Tensor, "b s"], action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"]
    ) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        tokens = [self.cls.expand(len(action), 1, -1), self.action(action)]
        if self.robot:
            tokens.insert(1, self.state(state[:, : self.robot])[:, None])
        is_pad = pad(~mask.any(-1), (self.before, 0), value=False)
        read = self.encoder(torch.cat(tokens, dim=1), self.places, is_pad)[:, 0]
        mean, log_variance = self.moments(read).chunk(2, dim=-1)
        return mean, log_variance


def gaussian_kl(mean: Float[Tensor, "b z"], log_variance: Float[Tensor, "b z"]) -> Float[Tensor, " b"]:
    """KL(N(mean, exp(log_variance)) | N(0, 1)), summed over the latent."""
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=-1)
