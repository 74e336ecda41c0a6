"""Diffusion policy's eyes: crop, a residual network, spatial softmax; K keypoints per camera become 2K features.

```
 picture --resize, crop, scale--> trunk --> K maps --softmax--> [K 2] --Linear, ReLU--> 2K --+
 state --------------------------------------------------------------------------------------+--> [state, 2K per camera,
 task --CLIP's vector, 512--Linear--> 32 (with `language="clip"`) ---------------------------+     32 of the task]
```
The preset is the trunk (`models.layers.trunks`): tiny for tests, small for a CPU, resnet18 and larger for a GPU.

Chi et al. 2023 (arXiv 2303.04137). The spatial softmax is LeRobot's; weights have the names of its DiffusionRgbEncoder,
which itself is not used for what it cannot do: a narrow trunk for a CPU, pretrained weights from a file, and a random
crop per picture. Its crop is one for a whole batch and drawn from a global generator. Here the crop is the middle one,
and the policy's `shift` moves each picture beforehand: `shift` = half of what the crop leaves away is the published
random crop. InternManip freezes the trunk even when its weights are random; here only pretrained ones can be frozen.

With `language="clip"` and the head `diffusion` it is InternManip's language-conditioned policy (`dp_clip`).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from data.errors import BadInput
from models.layers.language import CLIP_WIDTH, LanguageTable
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
class DiffusionRgbConfig:
    """Options of the `diffusion_rgb` backbone."""

    preset: Trunk = "small"
    keypoints: int = 32  # per camera; each gives two features
    resize: tuple[int, int] | None = None  # rows and columns that pictures are brought to first; None = as they are
    crop: tuple[int, int] | None = None  # rows and columns that are kept, in the middle; None = all
    shared: bool = False  # one encoder for all cameras, instead of one for each
    picture_mean: tuple[tuple[float, float, float], ...] = (IMAGENET_MEAN,)  # of colours in [0, 1]; one, or per camera
    picture_std: tuple[tuple[float, float, float], ...] = (IMAGENET_STD,)
    pretrained: str = ""  # safetensors file with torchvision's weights of the preset; empty = from scratch
    freeze: bool = False  # keep the pretrained trunk as it is
    frozen_norm: bool = False  # batch norm that stands still, for a policy's weights; pretrained ones have it anyhow
    language: Literal["none", "clip"] = "none"  # whether the task's words count, by a vector of CLIP's for each task
    tasks: tuple[str, ...] = ()  # the instructions there are, for language clip; training fills in the dataset's
    language_width: int = 32  # features of the task

    def __post_init__(self) -> None:
        if self.tasks and self.language == "none":
            raise BadInput("backbone diffusion_rgb: tasks without language are not read; set language clip")
        refuse_unfit_weights("diffusion_rgb", self.preset, self.pretrained, self.freeze)


class DiffusionRgb(nn.Module):
    """Pictures and state to one vector; tasks in words too, if asked to."""

    Config: ClassVar[type] = DiffusionRgbConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled"})

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
        resized = config.resize or image_size
        self.size = config.crop or resized
        if not all(0 < kept <= there for kept, there in zip(self.size, resized, strict=True)):
            raise BadInput(f"backbone diffusion_rgb: crop {self.size} does not fit into pictures of {resized}")
        self.width = state_width + 2 * config.keypoints * len(cameras)
        self.scale = PictureScale(config.picture_mean, config.picture_std, len(cameras))
        self.encoders = nn.ModuleList(_Encoder(config, self.size) for _ in cameras[: 1 if config.shared else None])
        if config.language == "clip":
            self.width += config.language_width
            self.words = LanguageTable(config.tasks, CLIP_WIDTH)
            self.of_words = nn.Linear(CLIP_WIDTH, config.language_width)

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        pictures = [self._scaled(observation.images[name], i) for i, name in enumerate(self.cameras)]
        if self.config.shared:
            features = self.encoders[0](torch.cat(pictures)).chunk(len(pictures))
        else:
            features = [encoder(images) for encoder, images in zip(self.encoders, pictures, strict=True)]
        if self.config.language == "clip":
            features = [*features, self.of_words(self.words(observation.tasks))]
        return Context(pooled=torch.cat([observation.state, *features], dim=1))

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for a file that is not such weights."""
        if self.config.pretrained:
            fill_trunks([encoder.get_submodule("backbone") for encoder in self.encoders], Path(self.config.pretrained))

    def _scaled(self, images: Float[Tensor, "b 3 _ _"], camera: int) -> Float[Tensor, "b 3 h w"]:
        """The middle, on the scale of the trunk's weights."""
        if self.config.resize:  # as torchvision's Resize
            images = interpolate(images, self.config.resize, mode="bilinear", antialias=True)
        (rows, columns), (h, w) = images.shape[-2:], self.size
        top, left = round((rows - h) / 2), round((columns - w) / 2)  # as torchvision's CenterCrop
        return self.scale(images[..., top : top + h, left : left + w], camera)


class _Encoder(nn.Module):
    """One camera's 2K features."""

    def __init__(self, config: DiffusionRgbConfig, size: tuple[int, int]) -> None:
        super().__init__()
        from lerobot.policies.diffusion.modeling_diffusion import SpatialSoftmax

        self.backbone = make_trunk(config.preset, frozen_norm=bool(config.pretrained) or config.frozen_norm)
        self.backbone.requires_grad_(not config.freeze)
        self.pool = SpatialSoftmax(map_shape(self.backbone, size), num_kp=config.keypoints)
        self.out = nn.Linear(2 * config.keypoints, 2 * config.keypoints)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k2"]:
        return self.out(self.pool(self.backbone(images)).flatten(1)).relu()
