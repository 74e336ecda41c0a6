"""ACT's eyes: every cell of a camera's feature map is a token, beside one for the state and one for the environment.

```
 picture --scale--> trunk --> h x w cells --1x1 convolution--+                        places (DETR): row and column
 state ------------------------------------------Linear------+--> [state, (environment), cells, cells, ...]
 its last components, of the environment --------Linear------+                        places: learnt
```
| preset    | trunk    | dim | encoder: layers, heads, feedforward | tokens of a 64 px camera | for   |
|-----------|----------|-----|-------------------------------------|--------------------------|-------|
| tiny      | tiny     |  32 | 1, 2, 64                            | 256 (16 at 16 px)        | tests |
| small     | small    | 128 | 1, 4, 256                           | 64                       | CPU   |
| published | resnet18 | 512 | 4, 8, 3200                          | 4                        | GPU   |

Zhao et al. 2023 (arXiv 2304.13705). One trunk for all cameras, as there. InternManip's documentation takes the mean
over the cells, which loses where things are; here the one vector (`pooled`) is the first token, the state's, behind an
encoder in which it has read all the others with their places. The head `act` brings an encoder of its own, because its
style is one of the encoder's tokens: it asks for the places apart, and this backbone has no encoder unless told so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from models.layers.detr import Encoder, LayerSize, picture_places
from models.layers.trunks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PictureScale,
    Trunk,
    fill_trunks,
    make_trunk,
    map_shape,
    refuse_unfit_weights,
)
from models.types import Context, Observation


@dataclass(frozen=True, kw_only=True)
class _Size:
    trunk: Trunk
    layer: LayerSize
    layers: int


PRESETS = {
    "tiny": _Size(trunk="tiny", layer=LayerSize(dim=32, heads=2, feedforward=64), layers=1),
    "small": _Size(trunk="small", layer=LayerSize(dim=128, heads=4, feedforward=256), layers=1),
    "published": _Size(trunk="resnet18", layer=LayerSize(dim=512, heads=8, feedforward=3200, dropout=0.1), layers=4),
}


@dataclass(frozen=True, kw_only=True)
class ActConfig:
    """Options of the `act` backbone."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above
    trunk: Trunk | None = None  # if not the preset's
    dim: int | None = None  # width of a token, if not the preset's
    encoder_layers: int | None = None  # None = the preset's, or 0 for a head that asks for places
    environment: int = 0  # how many of the state's last components are the environment's: a token of their own
    picture_mean: tuple[tuple[float, float, float], ...] = (IMAGENET_MEAN,)  # of colours in [0, 1]; one, or per camera
    picture_std: tuple[tuple[float, float, float], ...] = (IMAGENET_STD,)
    pretrained: str = ""  # safetensors file with torchvision's weights of the trunk; empty = from scratch
    freeze: bool = False  # keep the pretrained trunk as it is
    frozen_norm: bool = False  # batch norm that stands still, for a policy's weights; pretrained ones have it anyhow

    def __post_init__(self) -> None:
        size = PRESETS[self.preset]
        refuse_unfit_weights("act", self.trunk or size.trunk, self.pretrained, self.freeze)
        if self.dim is not None and self.dim % max(4, size.layer.heads):
            raise BadInput(f"backbone act: dim {self.dim} must be a multiple of {max(4, size.layer.heads)}")

    @property
    def width(self) -> int:
        return self.dim or PRESETS[self.preset].layer.dim


class ActBackbone(nn.Module):
    """Pictures and state to tokens. Tasks in words are not read."""

    Config: ClassVar[type] = ActConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens", "places"})
    fixed: Tensor

    def __init__(
        self,
        config: ActConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        """Raises `BadInput` for nothing to see, one vector without an encoder, and a state that is too short."""
        super().__init__()
        if not cameras and not config.environment:
            raise BadInput("backbone act: neither a camera nor a state of the environment to see; give one of them")
        self.config, self.cameras, self.give, self.width = config, cameras, give, config.width
        self.robot = state_width - config.environment
        if self.robot < 0:
            raise BadInput(f"backbone act: environment {config.environment} of {state_width} components of the state")
        self.encoder = self._encoder()
        if cameras:
            self._make_eyes(image_size)
        if self.robot:
            self.state = nn.Linear(self.robot, self.width)
        if config.environment:
            self.environment = nn.Linear(config.environment, self.width)
        learnt = (self.robot > 0) + (config.environment > 0)
        self.state_places = nn.Parameter(torch.randn(learnt, self.width) * 0.02)

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        tokens, places = self._tokens(observation), self._places()
        apart = "places" in self.give
        tokens = self.encoder(tokens, places) if apart else self.encoder(tokens + places)
        return Context(
            pooled=tokens[:, 0] if "pooled" in self.give else None,
            tokens=tokens if "tokens" in self.give else None,
            places=places if apart else None,
        )

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for a file that is not such weights."""
        if self.config.pretrained and self.cameras:
            fill_trunks([self.trunk], Path(self.config.pretrained))

    def _encoder(self) -> Encoder:
        preset, layers = PRESETS[self.config.preset], self.config.encoder_layers
        if layers is None:
            layers = 0 if "places" in self.give else preset.layers
        if not layers and "pooled" in self.give:
            raise BadInput("backbone act: without an encoder one token has not read the others; give encoder_layers 1")
        return Encoder(LayerSize(**{**vars(preset.layer), "dim": self.width}), layers)

    def _make_eyes(self, image_size: tuple[int, int]) -> None:
        config = self.config
        frozen_norm = bool(config.pretrained) or config.frozen_norm
        self.scale = PictureScale(config.picture_mean, config.picture_std, len(self.cameras))
        self.trunk = make_trunk(config.trunk or PRESETS[config.preset].trunk, frozen_norm=frozen_norm)
        self.trunk.requires_grad_(not config.freeze)
        channels, rows, columns = map_shape(self.trunk, image_size)
        self.picture = nn.Conv2d(channels, self.width, kernel_size=1)
        places = picture_places(rows, columns, self.width).repeat(len(self.cameras), 1)
        self.register_buffer("fixed", places, persistent=False)

    def _tokens(self, observation: Observation) -> Float[Tensor, "b n d"]:
        state, tokens = observation.state, []
        if self.robot:
            tokens.append(self.state(state[:, : self.robot])[:, None])
        if self.config.environment:
            tokens.append(self.environment(state[:, self.robot :])[:, None])
        if self.cameras:
            scaled = [self.scale(observation.images[name], i) for i, name in enumerate(self.cameras)]
            cells = self.picture(self.trunk(torch.cat(scaled))).flatten(2).mT
            tokens += cells.chunk(len(self.cameras))
        return torch.cat(tokens, dim=1)

    def _places(self) -> Float[Tensor, "n d"]:
        return torch.cat([self.state_places, self.fixed]) if self.cameras else self.state_places
