"""A convolutional trunk per camera and Mamba over all there is to see, for any head of the zoo.

```
 [words 1] [state 1] [camera 1: cells] [camera 2: cells] ... [CLS] --Mamba--> tokens; the last, normed, is the vector
```
| preset    | width, layers, states | trunk (models.layers.trunks) | cells of a 64 px picture | for   |
|-----------|-----------------------|------------------------------|--------------------------|-------|
| tiny      | 32, 2, 4              | tiny                         | 16 x 16                  | tests |
| small     | 128, 2, 16            | small                        | 8 x 8                    | CPU   |
| published | 256, 12, 16           | resnet18                     | 2 x 2                    | GPU   |

The encoder of StateVLA with eyes that learn from few demonstrations: linear patches need far more pictures before they
see where a gripper is. Nobody has published it; `published` has the sizes of StateVLA's. Words are read as bytes.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.layers.embedding import grid_positions
from models.layers.mamba import MambaConfig, MambaStack
from models.layers.trunks import Trunk, make_trunk, map_shape
from models.layers.words import Words
from models.types import Context, Observation

CLS_STD = 0.02  # of the last token at the start
PRESETS: dict[str, tuple[MambaConfig, int, Trunk]] = {
    "tiny": (MambaConfig(dim=32, state=4), 2, "tiny"),
    "small": (MambaConfig(dim=128), 2, "small"),
    "published": (MambaConfig(dim=256), 12, "resnet18"),
}


@dataclass(frozen=True, kw_only=True)
class MambaBackboneConfig:
    """Options of the `mamba` backbone."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above


class MambaBackbone(nn.Module):
    """Words, state and pictures to a vector and tokens."""

    Config: ClassVar[type] = MambaBackboneConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens"})

    def __init__(
        self,
        config: MambaBackboneConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        super().__init__()
        mamba, layers, trunk = PRESETS[config.preset]
        self.config, self.cameras, self.give, self.width = config, cameras, give, mamba.dim
        self.words = Words(mamba.dim)
        self.state = nn.Sequential(nn.Linear(state_width, mamba.dim), nn.SiLU(), nn.Linear(mamba.dim, mamba.dim))
        self.trunks = nn.ModuleList(_Cells(trunk, mamba.dim, image_size) for _ in cameras)
        self.cls = nn.Parameter(CLS_STD * torch.randn(mamba.dim))
        self.mixer = MambaStack(mamba, layers)
        if "pooled" in give:
            self.norm = nn.LayerNorm(mamba.dim)

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        cells = [of(observation.images[camera]) for of, camera in zip(self.trunks, self.cameras, strict=True)]
        words, state = (token[:, None] for token in (self.words(observation.tasks), self.state(observation.state)))
        tokens = self.mixer(torch.cat([words, state, *cells, self.cls.expand(len(observation), 1, -1)], dim=1))
        return Context(
            pooled=self.norm(tokens[:, -1]) if "pooled" in self.give else None,
            tokens=tokens if "tokens" in self.give else None,
        )

    def load_pretrained(self) -> None:
        """There are no published weights."""


class _Cells(nn.Module):
    """One camera's pictures as one token per cell of its trunk's map, row by row, which says where it is."""

    places: Tensor

    def __init__(self, trunk: Trunk, dim: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = make_trunk(trunk)
        channels, rows, columns = map_shape(self.trunk, image_size)
        self.project = nn.Linear(channels, dim)
        self.register_buffer("places", grid_positions(rows, columns, dim), persistent=False)

    def forward(self, images: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, "b n d"]:
        return self.project(self.trunk(2 * images - 1).flatten(2).mT) + self.places
