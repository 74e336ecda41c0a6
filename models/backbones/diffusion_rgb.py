"""Diffusion policy's eyes: crop, a residual network, spatial softmax; K keypoints per camera become 2K features.

```
 picture --scale, crop--> trunk --> K maps --softmax--> [K 2] --Linear, ReLU--> 2K --+
 state -----------------------------------------------------------------------------+--> [state, camera, camera, ...]
```
| preset                 | trunk                                          | map of a 96 px picture | for   |
|------------------------|------------------------------------------------|------------------------|-------|
| tiny                   | 4x4 stride 2, 3x3 stride 2                     | 16 x 24 x 24           | tests |
| small                  | 8x8 stride 4, 3x3 stride 2, 3x3                | 64 x 12 x 12           | CPU   |
| resnet18, 34, 50, 101  | torchvision's without its pooling              | 512 or 2048 x 3 x 3    | GPU   |

All with GroupNorm, except on pretrained weights, which know batch norm only: there its statistics stand still.

Chi et al. 2023 (arXiv 2303.04137). The spatial softmax is LeRobot's; weights have the names of its DiffusionRgbEncoder,
which itself is not used for what it cannot do: a narrow trunk for a CPU, pretrained weights from a file, and a random
crop per picture. Its crop is one for a whole batch and drawn from a global generator. Here the crop is the middle one,
and the policy's `shift` moves each picture beforehand: `shift` = half of what the crop leaves away is the published
random crop. InternManip freezes the trunk even when its weights are random; here only pretrained ones can be frozen.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import BadInput
from models.backbones.resnet import IMAGENET_MEAN, IMAGENET_STD
from models.types import Context, Observation

# per preset: output channels, kernel, stride, padding of each convolution
TRUNKS = {
    "tiny": ((16, 4, 2, 1), (16, 3, 2, 1)),
    "small": ((32, 8, 4, 2), (64, 3, 2, 1), (64, 3, 1, 1)),
}
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of a resnet, in order


@dataclass(frozen=True, kw_only=True)
class DiffusionRgbConfig:
    """Options of the `diffusion_rgb` backbone."""

    preset: Literal["tiny", "small", "resnet18", "resnet34", "resnet50", "resnet101"] = "small"  # see the table above
    keypoints: int = 32  # per camera; each gives two features
    crop: tuple[int, int] | None = None  # rows and columns that are kept, in the middle; None = all
    shared: bool = False  # one encoder for all cameras, instead of one for each
    pretrained: str = ""  # safetensors file with torchvision's weights of the preset; empty = from scratch
    freeze: bool = False  # keep the pretrained trunk as it is

    def __post_init__(self) -> None:
        if self.pretrained and self.preset in TRUNKS:
            raise BadInput(f"backbone diffusion_rgb: no pretrained weights for preset {self.preset}; use a resnet")
        if self.freeze and not self.pretrained:
            raise BadInput(
                "backbone diffusion_rgb: freeze without pretrained would keep random weights; name the weights"
            )


class DiffusionRgb(nn.Module):
    """Pictures and state to one vector. Tasks in words are not read."""

    Config: ClassVar[type] = DiffusionRgbConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled"})
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: DiffusionRgbConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        """Raises `BadInput` for a crop larger than the pictures."""
        super().__init__()
        self.config, self.cameras = config, cameras
        self.size = config.crop or image_size
        if not all(0 < kept <= there for kept, there in zip(self.size, image_size, strict=True)):
            raise BadInput(f"backbone diffusion_rgb: crop {self.size} does not fit into pictures of {image_size}")
        self.width = state_width + 2 * config.keypoints * len(cameras)
        self.encoders = nn.ModuleList(_Encoder(config, self.size) for _ in cameras[: 1 if config.shared else None])
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        pictures = [self._scaled(observation.images[name]) for name in self.cameras]
        if self.config.shared:
            features = self.encoders[0](torch.cat(pictures)).chunk(len(pictures))
        else:
            features = [encoder(images) for encoder, images in zip(self.encoders, pictures, strict=True)]
        return Context(pooled=torch.cat([observation.state, *features], dim=1))

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for a file that is not such weights."""
        if not self.config.pretrained:
            return
        trunks = [cast(_Encoder, encoder).backbone for encoder in self.encoders]
        weights = _trunk_weights(Path(self.config.pretrained), trunks[0].state_dict())
        for trunk in trunks:
            trunk.load_state_dict(weights)

    def _scaled(self, images: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, "b 3 h w"]:
        """The middle, on the scale of ImageNet."""
        (rows, columns), (h, w) = images.shape[-2:], self.size
        top, left = round((rows - h) / 2), round((columns - w) / 2)  # as torchvision's CenterCrop
        return (images[..., top : top + h, left : left + w] - self.mean) / self.std


class _Encoder(nn.Module):
    """One camera's 2K features."""

    def __init__(self, config: DiffusionRgbConfig, size: tuple[int, int]) -> None:
        super().__init__()
        from lerobot.policies.diffusion.modeling_diffusion import SpatialSoftmax
        from lerobot.policies.utils import get_output_shape

        self.backbone = _plain(config) if config.preset in TRUNKS else _resnet(config)
        self.backbone.requires_grad_(not config.freeze)
        self.pool = SpatialSoftmax(get_output_shape(self.backbone, (1, 3, *size))[1:], num_kp=config.keypoints)
        self.out = nn.Linear(2 * config.keypoints, 2 * config.keypoints)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k2"]:
        return self.out(self.pool(self.backbone(images)).flatten(1)).relu()


def _plain(config: DiffusionRgbConfig) -> nn.Sequential:
    layers, channels = [], 3
    for out, kernel, stride, padding in TRUNKS[config.preset]:
        convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        layers += [convolution, nn.GroupNorm(out // 8, out), nn.ReLU(inplace=True)]
        channels = out
    return nn.Sequential(*layers)


def _resnet(config: DiffusionRgbConfig) -> nn.Sequential:
    from torchvision.models import get_model
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if config.pretrained else lambda channels: nn.GroupNorm(channels // 16, channels)
    resnet = get_model(config.preset, weights=None, norm_layer=norm)
    return nn.Sequential(*(resnet.get_submodule(stage) for stage in STAGES))


def _trunk_weights(path: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's weights under the trunk's names: `layer1` is its fifth part."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise BadInput(f"{path}: cannot be read as safetensors ({fault}); name torchvision's resnet") from None
    found = {}
    for name, tensor in wanted.items():
        place, _, rest = name.partition(".")
        published = f"{STAGES[int(place)]}.{rest}"
        if published not in weights or weights[published].shape != tensor.shape:
            raise BadInput(f"{path}: {published} is missing or of another shape; name the weights of this resnet")
        found[name] = weights[published]
    return found
