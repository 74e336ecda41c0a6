"""StateVLA's encoder: one causal Mamba pass over words, state and pictures, read off at its last token.

```
 [words 1] [state 1] [camera 1: n patches] [camera 2: n patches] ... [CLS] --Mamba--> tokens
                                                                       `--norm, Linear, norm--> z [b d]
```
A token knows those before it: the patches are read in the light of the words and the state, CLS of everything, camera
1 of nothing that camera 2 sees. One moment and no history: z holds no velocity.

| preset    | width, layers, states | patches | pictures      | for                               |
|-----------|-----------------------|---------|---------------|-----------------------------------|
| tiny      | 32, 2, 4              | 8 px    | as they are   | tests                             |
| small     | 128, 3, 16            | 16 px   | as they are   | CPU                               |
| published | 256, 12, 16           | 16 px   | scaled to 224 | GPU; there with language clip     |

With `vision="siglip"` a frozen SigLIP makes the patch tokens, as the published code does by default; it is
transformers', its pictures and layers those of siglip-base-patch16-224 (tiny: 32 px, one layer).

Learnt places of patches begin as sinusoids, as in I-JEPA: the published ones begin at a deviation of .02, which is lost
in patches of about .5, and thousands of steps go by before a patch is told from its neighbour.

The published parameter table is off: 12 layers are 5.26 M, not 12.3 M, two cameras' patches 0.49 M, not 0.6 M. The
published code reads a vector of zeros for a task whose words nobody has encoded; `LanguageTable` refuses.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from models.layers.embedding import grid_positions
from models.layers.language import CLIP_WIDTH, LanguageTable
from models.layers.mamba import MambaConfig, MambaStack
from models.layers.pretrained import fill, read_weights
from models.layers.words import Words
from models.types import Context, Observation

CLS_STD = 0.02  # of the last token at the start


@dataclass(frozen=True, kw_only=True)
class _Size:
    mamba: MambaConfig
    layers: int
    patch: int  # rows and columns of pixels
    pixels: int  # pictures are scaled to this height and width; 0 = as they are
    tower: dict[str, Any]  # of transformers' SiglipVisionConfig, where it differs from siglip-base-patch16-224


PRESETS = {
    "tiny": _Size(
        mamba=MambaConfig(dim=32, state=4),
        layers=2,
        patch=8,
        pixels=0,
        tower={
            "image_size": 32,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    ),
    "small": _Size(mamba=MambaConfig(dim=128), layers=3, patch=16, pixels=0, tower={}),
    "published": _Size(mamba=MambaConfig(dim=256), layers=12, patch=16, pixels=224, tower={}),
}


@dataclass(frozen=True, kw_only=True)
class StateVLAConfig:
    """Options of the `statevla` backbone."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above
    vision: Literal["patches", "siglip"] = "patches"  # learnt patches, or a frozen SigLIP
    pretrained: str = ""  # folder of siglip-base-patch16-224, with its model.safetensors; for vision siglip
    language: Literal["bytes", "clip"] = "bytes"  # words as learnt from their bytes, or by a vector of CLIP's
    tasks: tuple[str, ...] = ()  # the instructions there are, for language clip; training fills in the dataset's

    def __post_init__(self) -> None:
        if (self.vision == "siglip") != bool(self.pretrained):
            raise BadInput("backbone statevla: vision siglip and pretrained go together; a frozen SigLIP needs weights")
        if self.tasks and self.language == "bytes":
            raise BadInput("backbone statevla: any task can be read as bytes; leave tasks out, or set language clip")


class StateVLA(nn.Module):
    """Words, state and pictures to z, and to what the encoder says at every token."""

    Config: ClassVar[type] = StateVLAConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens"})

    def __init__(
        self,
        config: StateVLAConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        """Raises `BadInput` for pictures that do not divide into patches."""
        super().__init__()
        size = PRESETS[config.preset]
        dim = size.mamba.dim
        self.config, self.cameras, self.give, self.width = config, cameras, give, dim
        self.words = Words(dim) if config.language == "bytes" else _Vectors(config.tasks, dim)
        self.robot = nn.Sequential(nn.Linear(state_width, dim), nn.SiLU(), nn.Linear(dim, dim))
        if config.vision == "siglip":
            self.tower = _Tower(size.tower)
            pictures = (_Projected(self.tower, dim) for _ in cameras)
        else:
            pictures = (_Patches(size, image_size) for _ in cameras)
        self.pictures = nn.ModuleList(pictures)
        self.cls = nn.Parameter(CLS_STD * torch.randn(dim))
        self.encoder = MambaStack(size.mamba, size.layers)
        if "pooled" in give:
            self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.LayerNorm(dim))

    def forward(self, observation: Observation) -> Context:
        """`observation` as `prepare` makes it."""
        tokens = self.encoder(self.tokenize(observation))
        return Context(
            pooled=self.project(tokens[:, -1]) if "pooled" in self.give else None,
            tokens=tokens if "tokens" in self.give else None,
        )

    def tokenize(self, observation: Observation) -> Float[Tensor, "b n d"]:
        """What the encoder reads, in its order."""
        pictures = [observation.images[name] for name in self.cameras]
        if self.config.vision == "siglip":
            pictures = self.tower(pictures)
        patches = [of(p) for of, p in zip(self.pictures, pictures, strict=True)]
        words, state = (token[:, None] for token in (self.words(observation.tasks), self.robot(observation.state)))
        return torch.cat([words, state, *patches, self.cls.expand(len(observation), 1, -1)], dim=1)

    def load_pretrained(self) -> None:
        """Fill in SigLIP, if it is named. Raises `BadInput` for a folder that has none."""
        if self.config.pretrained:
            folder = Path(self.config.pretrained)
            fill(self.tower.siglip, read_weights(folder), folder)


class _Patches(nn.Module):
    """One camera's pictures, cut into squares."""

    def __init__(self, size: _Size, image_size: tuple[int, int]) -> None:
        super().__init__()
        rows, columns = self.pixels = (size.pixels, size.pixels) if size.pixels else image_size
        if rows % size.patch or columns % size.patch:
            raise BadInput(
                f"backbone statevla: pictures of {rows} x {columns} are no multiple of its patches of {size.patch}"
            )
        dim = size.mamba.dim
        self.of_patch = nn.Conv2d(3, dim, size.patch, stride=size.patch)
        self.places = nn.Parameter(grid_positions(rows // size.patch, columns // size.patch, dim))

    def forward(self, images: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, "b n d"]:
        return self.of_patch(_scaled(images, self.pixels)).flatten(2).mT + self.places


class _Projected(nn.Module):
    """One camera's SigLIP tokens, which carry their places."""

    def __init__(self, tower: "_Tower", dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(tower.width, dim)

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
        return self.project(tokens)


class _Tower(nn.Module):
    """Frozen SigLIP, one for all cameras."""

    def __init__(self, size: dict[str, Any]) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        options: Any = SiglipVisionConfig(**size)
        options.vision_use_head = False  # its pooled vector is read by nobody
        self.pixels, self.width = (options.image_size, options.image_size), options.hidden_size
        self.siglip: Any = SiglipVisionModel(options)
        self.requires_grad_(False)

    def forward(self, pictures: list[Float[Tensor, "b 3 _ _"]]) -> tuple[Float[Tensor, "b n w"], ...]:
        pixels = torch.cat([_scaled(images, self.pixels) for images in pictures])
        return self.siglip(pixel_values=pixels).last_hidden_state.chunk(len(pictures))


class _Vectors(nn.Module):
    """A task's vector, looked up."""

    def __init__(self, tasks: tuple[str, ...], dim: int) -> None:
        super().__init__()
        self.table = LanguageTable(tasks, CLIP_WIDTH)
        self.project = nn.Linear(CLIP_WIDTH, dim)

    def forward(self, tasks: tuple[str, ...]) -> Float[Tensor, "b d"]:
        return self.project(self.table(tasks))


def _scaled(images: Float[Tensor, "b 3 _ _"], pixels: tuple[int, int]) -> Float[Tensor, "b 3 h w"]:
    """To `pixels`, and from [0, 1] to [-1, 1]."""
    if tuple(images.shape[-2:]) != pixels:
        images = F.interpolate(images, pixels, mode="bilinear", antialias=True, align_corners=False)
    return 2 * images - 1
