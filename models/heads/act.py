"""Action chunking with transformers: H learnt queries read the context and answer with H actions.

Zhao et al. 2023 (arXiv 2304.13705). The loss is L1 over valid entries; with `use_vae`, a latent style is inferred from
the executed actions while training, kept near N(0, 1) by a KL term, and 0 when acting.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.layers.embedding import sequence_positions
from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes


@dataclass(frozen=True, kw_only=True)
class ActConfig:
    """Options of the `act` head. The paper's: dim 512, feedforward 3200, 4 encoder and 1 decoder layers."""

    dim: int = 128  # width of the transformer
    heads: int = 4  # attention heads
    feedforward: int = 256  # width between a layer's two linear maps
    encoder_layers: int = 1  # over the context's tokens; 0 = the queries read them as they are
    decoder_layers: int = 1  # over the queries
    dropout: float = 0.0  # share (0.1 in the paper); drawing the masks costs a CPU a tenth of the step
    use_vae: bool = False  # latent style; for demonstrations by people, a scripted expert has one style
    latent: int = 32  # width of the style
    vae_layers: int = 2  # of the style's encoder
    kl_weight: float = 10.0  # of the KL term beside the L1 term


class ActHead(nn.Module):
    """Deterministic: the same context gives the same chunk."""

    Config: ClassVar[type] = ActConfig
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    likes: ClassVar[frozenset[str]] = frozenset()
    noise_shape = (0,)

    def __init__(self, config: ActConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        layer = {
            "d_model": config.dim,
            "nhead": config.heads,
            "dim_feedforward": config.feedforward,
            "dropout": config.dropout,
            "batch_first": True,
        }
        self.context = nn.Linear(sizes.context, config.dim)
        if config.encoder_layers:
            self.encoder = _encoder(layer, config.encoder_layers)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), config.decoder_layers)
        self.queries = nn.Parameter(torch.randn(sizes.horizon, config.dim) * 0.02)
        self.action = nn.Linear(config.dim, sizes.action)
        if config.use_vae:
            self.style = _Style(config, layer, horizon=sizes.horizon, action_width=sizes.action)
            self.of_style = nn.Linear(config.latent, config.dim)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        if not self.config.use_vae:
            l1 = masked_mean((self._decode(context, None) - action).abs(), mask)
            return l1, {"l1": l1.mean().detach()}
        mean, log_variance = self.style(action, mask)
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        l1 = masked_mean((self._decode(context, mean + (log_variance / 2).exp() * noise) - action).abs(), mask)
        kl = gaussian_kl(mean, log_variance)
        return l1 + self.config.kl_weight * kl, {"l1": l1.mean().detach(), "kl": kl.mean().detach()}

    def sample(self, context: Context, noise: Float[Tensor, "b 0"]) -> Float[Tensor, "b h a"]:
        style = noise.new_zeros(len(noise), self.config.latent) if self.config.use_vae else None
        return self._decode(context, style)

    def _decode(self, context: Context, style: Float[Tensor, "b z"] | None) -> Float[Tensor, "b h a"]:
        tokens, is_pad = self.context(context.tokens), context.token_is_pad
        if style is not None:
            tokens = torch.cat([self.of_style(style)[:, None], tokens], dim=1)
            is_pad = None if is_pad is None else nn.functional.pad(is_pad, (1, 0), value=False)
        memory = self.encoder(tokens, src_key_padding_mask=is_pad) if self.config.encoder_layers else tokens
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.action(self.decoder(queries, memory, memory_key_padding_mask=is_pad))


class _Style(nn.Module):
    """Reads [CLS, actions] and answers with the mean and log variance of the latent."""

    places: Tensor

    def __init__(self, config: ActConfig, layer: dict, *, horizon: int, action_width: int) -> None:
        super().__init__()
        self.action = nn.Linear(action_width, config.dim)
        self.cls = nn.Parameter(torch.randn(config.dim) * 0.02)
        self.encoder = _encoder(layer, config.vae_layers)
        self.moments = nn.Linear(config.dim, 2 * config.latent)
        self.register_buffer("places", sequence_positions(1 + horizon, config.dim), persistent=False)

    def forward(
        self, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"]
    ) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        tokens = torch.cat([self.cls.expand(len(action), 1, -1), self.action(action)], dim=1)
        is_pad = nn.functional.pad(~mask.any(-1), (1, 0), value=False)
        read = self.encoder(tokens + self.places, src_key_padding_mask=is_pad)[:, 0]
        mean, log_variance = self.moments(read).chunk(2, dim=-1)
        return mean, log_variance


def _encoder(layer: dict, layers: int) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), layers, enable_nested_tensor=False)


def gaussian_kl(mean: Float[Tensor, "b z"], log_variance: Float[Tensor, "b z"]) -> Float[Tensor, " b"]:
    """KL(N(mean, exp(log_variance)) | N(0, 1)), summed over the latent."""
    return -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(dim=-1)
