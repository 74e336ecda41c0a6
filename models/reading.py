"""What a policy and a critic have in common: a backbone behind normalisation, which reads observations as recorded.

```
 uint8 pictures --shift, /255, jitter--+
                                       +--backbone--> Context
 state --normalise, pad----------------+
 action --normalise, pad, mask--------------> [b h a], zero where nothing was executed
```
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from data.errors import BadInput
from data.normalize import Normalizer
from data.schema import Schema
from models.config import ReaderConfig
from models.layers.augment import colour_jitter, random_shift
from models.registry import BACKBONES, configure
from models.types import Observation


@dataclass(frozen=True, kw_only=True)
class Spec[C: ReaderConfig]:
    """All that decides a model's architecture and meaning. JSON-able; lies beside the weights."""

    config: C
    schema: Schema  # of the data it learns from and of the observations it reads
    horizon: int  # actions per chunk

    @property
    def kind(self) -> str:
        """Registered class of the model."""
        raise NotImplementedError

    @property
    def state_width(self) -> int:
        """Width of the state inside the network."""
        return self.config.pad_state or len(self.schema.state)

    @property
    def action_width(self) -> int:
        """Width of an action inside the network."""
        return self.config.pad_action or len(self.schema.action)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "horizon": self.horizon,
            "config": asdict(self.config),
            "schema": self.schema.to_json(),
        }


class Reader(nn.Module):
    """Reads observations as recorded, and actions in the schema's units."""

    spec: Spec[Any]

    def __init__(self, spec: Spec[Any], *, state: Normalizer, action: Normalizer) -> None:
        """Raises `BadInput` for statistics of another width than the schema's."""
        super().__init__()
        _refuse_unfit_widths(spec, {"state": state, "action": action})
        self.spec = spec
        self.state = state
        self.action = action

    @classmethod
    def restore(cls, spec: Spec[Any], normalizers: Mapping[str, Normalizer]) -> Self:
        """The architecture of `spec`, for weights that a checkpoint is about to fill in."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def norm_to_json(self) -> dict[str, Any]:
        return {"state": self.state.to_json(), "action": self.action.to_json()}

    def prepare(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """Pictures to float in [0, 1] and CHW, state normalised and padded. The only place where pictures are scaled.

        Raises `BadInput` for a camera that is missing and a picture or state of another size.
        """
        _refuse_unfit_observation(self.spec.schema, observation)
        images = {name: self._picture(observation.images[name], generator) for name in self.spec.schema.cameras}
        state = self.state.apply(observation.state.float())
        state = pad(state, (0, self.spec.state_width - state.shape[-1]))
        return Observation(images=images, state=state, tasks=observation.tasks)

    def _picture(self, image: Shaped[Tensor, "b _ _ _"], generator: torch.Generator | None) -> Float[Tensor, "b c h w"]:
        config = self.spec.config
        image = _channels_last(image)
        if generator is not None and config.shift:
            image = random_shift(image, config.shift, generator)
        scaled = image.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
        if generator is not None and config.jitter:
            scaled = colour_jitter(scaled, config.jitter, generator)
        return scaled

    def mask(self, action_is_pad: Bool[Tensor, "*b h"]) -> Bool[Tensor, "*b h a"]:
        """The entries of a chunk that mean something: steps before the episode's end, components of the schema."""
        real = torch.arange(self.spec.action_width, device=action_is_pad.device) < len(self.spec.schema.action)
        return ~action_is_pad[..., None] & real

    def normalised(self, action: Float[Tensor, "*b h a"], mask: Bool[Tensor, "*b h w"]) -> Float[Tensor, "*b h w"]:
        """Chunks as the network sees them.

        A padded step's content is the dataset's whim: zeroed, it cannot enter through attention either.
        """
        return pad(self.action.apply(action.float()), (0, self.spec.action_width - action.shape[-1])).where(mask, 0.0)


def make_backbone(spec: Spec[Any], give: frozenset[str]) -> nn.Module:
    """The backbone that `spec` names, which fills the fields `give` of its Context."""
    config = spec.config
    backbone = BACKBONES.resolve(config.backbone)
    options = configure(backbone, config.backbone_options, whose=f"backbone {config.backbone}")
    schema = spec.schema
    return backbone(
        options, cameras=schema.cameras, image_size=schema.image_size, state_width=spec.state_width, give=give
    )


def _channels_last(image: Shaped[Tensor, "b _ _ _"]) -> Shaped[Tensor, "b h w 3"]:
    return image if image.shape[-1] == 3 else image.permute(0, 2, 3, 1)


def _refuse_unfit_widths(spec: Spec[Any], normalizers: Mapping[str, Normalizer]) -> None:
    for name, components, width in (
        ("state", spec.schema.state, spec.state_width),
        ("action", spec.schema.action, spec.action_width),
    ):
        if width < len(components):
            raise BadInput(f"pad_{name} is {width}, but the schema has {len(components)} components; give more or 0")
        fitted = len(normalizers[name].center)
        if fitted != len(components):
            raise BadInput(f"{name}: the statistics have {fitted} components, the schema {len(components)}; fit anew")


def _refuse_unfit_observation(schema: Schema, observation: Observation) -> None:
    for camera in schema.cameras:
        if camera not in observation.images:
            raise BadInput(f"camera {camera!r} is missing; the policy was trained on {', '.join(schema.cameras)}")
        image = observation.images[camera]
        if image.dtype != torch.uint8:
            raise BadInput(f"camera {camera!r}: pictures are {image.dtype}, not uint8; the policy does the scaling")
        if tuple(_channels_last(image).shape[1:]) != (*schema.image_size, 3):
            raise BadInput(f"camera {camera!r}: pictures are {tuple(image.shape[1:])}, not {schema.image_size} in RGB")
    if observation.state.shape[-1] != len(schema.state):
        raise BadInput(f"state has {observation.state.shape[-1]} components, the policy's schema {len(schema.state)}")
