"""A convolutional trunk per camera, spatial softmax for where things are, a small MLP for the state.

| preset   | trunk                                                  | map of a 96 px picture | for            |
|----------|--------------------------------------------------------|------------------------|----------------|
| small    | 8x8 stride 4, 3x3 stride 2, 3x3; GroupNorm, ReLU       | 64 x 12 x 12           | CPU            |
| resnet18 | torchvision's, GroupNorm for BatchNorm unless pretrained | 512 x 3 x 3          | GPU            |
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from data.errors import BadInput
from models.layers.embedding import grid_positions
from models.layers.spatial_softmax import SpatialSoftmax
from models.types import Context, Observation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATE_FEATURES = 64


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Options of the `resnet` backbone."""

    preset: Literal["small", "resnet18"] = "small"  # see the table above
    width: int = 128  # d of the context
    keypoints: int = 32  # per camera
    grid: int = 4  # rows and columns of picture tokens per camera; 0 = keypoints only
    pretrained: str = ""  # safetensors file with torchvision's resnet18 weights; empty = from scratch
    freeze: bool = False  # keep the pretrained trunk as it is

    def __post_init__(self) -> None:
        if self.pretrained and self.preset != "resnet18":
            raise BadInput(f"backbone resnet: preset {self.preset} has no pretrained weights; use preset resnet18")
        if self.freeze and not self.pretrained:
            raise BadInput("backbone resnet: freeze without pretrained would keep random weights; name the weights")


class ResNet(nn.Module):
    """Pictures and state to a vector and tokens. Tasks in words are not read."""

    Config: ClassVar[type] = ResNetConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens"})

    def __init__(
        self,
        config: ResNetConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        super().__init__()
        self.config, self.cameras, self.give, self.width = config, cameras, give, config.width
        make, channels = (_small, 64) if config.preset == "small" else (_resnet18, 512)
        self.trunks = nn.ModuleList(make(config) for _ in cameras)
        self.trunks.requires_grad_(not config.freeze)
        self.keypoints = nn.ModuleList(SpatialSoftmax(channels, config.keypoints) for _ in cameras)
        self.state = nn.Sequential(
            nn.Linear(state_width, STATE_FEATURES), nn.ReLU(), nn.Linear(STATE_FEATURES, STATE_FEATURES)
        )
        if "pooled" in give:
            self.pooled = nn.Sequential(
                nn.Linear(2 * config.keypoints * len(cameras) + STATE_FEATURES, 2 * config.width),
                nn.ReLU(),
                nn.Linear(2 * config.width, config.width),
                nn.LayerNorm(config.width),
            )
        if "tokens" in give:
            self.tokens = _Tokens(config, channels=channels, cameras=len(cameras))

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        maps = [trunk(observation.images[name]) for trunk, name in zip(self.trunks, self.cameras, strict=True)]
        keypoints = [where(m).flatten(1) for where, m in zip(self.keypoints, maps, strict=True)]
        state = self.state(observation.state)
        return Context(
            pooled=self.pooled(torch.cat([*keypoints, state], dim=1)) if "pooled" in self.give else None,
            tokens=self.tokens(maps, keypoints, state) if "tokens" in self.give else None,
        )

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for a file that is not such weights."""
        if not self.config.pretrained:
            return
        path = Path(self.config.pretrained)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as fault:
            raise BadInput(f"{path}: cannot be read as safetensors ({fault}); name torchvision's resnet18") from None
        trunks = [cast(nn.Sequential, trunk)[1] for trunk in self.trunks]  # torchvision's part of `_resnet18`
        wanted = trunks[0].state_dict()
        weights = {name: w for name, w in weights.items() if name in wanted}
        for name, w in wanted.items():
            if name not in weights or weights[name].shape != w.shape:
                raise BadInput(f"{path}: {name} is missing or of another shape; name torchvision's resnet18 weights")
        for trunk in trunks:
            trunk.load_state_dict(weights)


class _Tokens(nn.Module):
    """One token for the state, one per camera for its keypoints, `grid`² per camera for what is where."""

    def __init__(self, config: ResNetConfig, *, channels: int, cameras: int) -> None:
        super().__init__()
        self.grid, width = config.grid, config.width
        self.of_state = nn.Linear(STATE_FEATURES, width)
        self.of_keypoints = nn.ModuleList(nn.Linear(2 * config.keypoints, width) for _ in range(cameras))
        if config.grid:
            self.of_cell = nn.ModuleList(nn.Linear(channels, width) for _ in range(cameras))
            self.register_buffer("places", grid_positions(config.grid, config.grid, width), persistent=False)

    def forward(
        self,
        maps: list[Float[Tensor, "b c _ _"]],
        keypoints: list[Float[Tensor, "b k"]],
        state: Float[Tensor, "b s"],
    ) -> Float[Tensor, "b n d"]:
        single = [self.of_state(state), *(of(k) for of, k in zip(self.of_keypoints, keypoints, strict=True))]
        tokens = [torch.stack(single, dim=1)]
        if self.grid:
            for of, m in zip(self.of_cell, maps, strict=True):
                tokens.append(of(adaptive_avg_pool2d(m, self.grid).flatten(2).mT) + self.places)
        return torch.cat(tokens, dim=1)


def _small(_: ResNetConfig) -> nn.Module:
    # NCHW: on a CPU the convolutions prefer channels-last by a tenth, but GroupNorm is four times slower in it
    return nn.Sequential(_block(3, 32, 8, 4, 2), _block(32, 64, 3, 2, 1), _block(64, 64, 3, 1, 1))


def _block(channels: int, out: int, kernel: int, stride: int, padding: int) -> nn.Module:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, out), nn.ReLU(inplace=True))


def _resnet18(config: ResNetConfig) -> nn.Module:
    from torchvision.models import resnet18
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if config.pretrained else lambda channels: nn.GroupNorm(channels // 16, channels)
    trunk = IntermediateLayerGetter(resnet18(weights=None, norm_layer=norm), return_layers={"layer4": "map"})
    return nn.Sequential(_ImageNetScale(), trunk, _Only("map"))


class _ImageNetScale(nn.Module):
    """[0, 1] to the scale torchvision's weights were trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return (images - self.mean) / self.std


class _Only(nn.Module):
    """One entry of a dictionary."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, outputs: dict[str, Tensor]) -> Tensor:
        return outputs[self.key]
