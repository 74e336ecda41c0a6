"""A policy is a backbone, a head and the numbers that scale what goes in and comes out: the one place they meet.

```
 uint8 pictures --shift, /255, jitter--+
                                       +--backbone--> Context --head--> [b h a] --invert, clip--> environment's units
 state --normalise, pad----------------+                       ^
 action --normalise, pad, mask-------------------(training)----+
```
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import Component, Schema
from models.config import PolicyConfig
from models.devices import uses_bf16
from models.layers.augment import colour_jitter, random_shift
from models.registry import BACKBONES, HEADS, configure
from models.types import Batch, Context, Info, Observation


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """All that decides a policy's architecture and meaning. JSON-able; lies beside the weights."""

    config: PolicyConfig
    schema: Schema  # of the data it learns from and of the observations it acts on
    horizon: int  # actions per chunk
    kind: str = "pair"  # registered policy class

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

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PolicySpec":
        return cls(
            kind=value["kind"],
            horizon=value["horizon"],
            config=PolicyConfig(**value["config"]),
            schema=Schema.from_json(value["schema"]),
        )


class Policy(nn.Module):
    """Any backbone with any head that fits it."""

    backbone: Any  # an nn.Module that is a models.types.Backbone
    head: Any  # an nn.Module that is a models.types.Head

    def __init__(
        self, spec: PolicySpec, backbone: nn.Module, head: nn.Module, *, state: Normalizer, action: Normalizer
    ) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = head
        self.state = state
        self.action = action

    @classmethod
    def build(cls, spec: PolicySpec, stats: Mapping[str, Stats], *, seed: int = 0) -> "Policy":
        """A new policy, its weights a function of `seed`. `stats` has "state" and "action", in the schema's order.

        Raises `BadInput` for unknown names and options, a pair that does not fit, statistics of another width.
        """
        mode = spec.config.normalization
        policy = cls._assemble(spec, {name: Normalizer(stats=stats[name], mode=mode) for name in stats}, seed)
        policy.backbone.load_pretrained()
        return policy

    @classmethod
    def restore(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer]) -> "Policy":
        """The architecture of `spec`, for weights that a checkpoint is about to fill in."""
        return cls._assemble(spec, normalizers, seed=0)

    @classmethod
    def _assemble(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer], seed: int) -> "Policy":
        _refuse_unfit_widths(spec, normalizers)
        config = spec.config
        backbone_class, head_class = BACKBONES.resolve(config.backbone), HEADS.resolve(config.head)
        _refuse_unfit_pair(config.backbone, backbone_class, config.head, head_class)
        backbone_config = configure(backbone_class, config.backbone_options, whose=f"backbone {config.backbone}")
        head_config = configure(head_class, config.head_options, whose=f"head {config.head}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = backbone_class(
                backbone_config,
                cameras=spec.schema.cameras,
                image_size=spec.schema.image_size,
                state_width=spec.state_width,
                give=head_class.needs,
            )
            head = head_class(
                head_config, context_width=backbone.width, horizon=spec.horizon, action_width=spec.action_width
            )
        return cls(spec, backbone, head, state=normalizers["state"], action=normalizers["action"])

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def norm_to_json(self) -> dict[str, Any]:
        return {"state": self.state.to_json(), "action": self.action.to_json()}

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        return self.loss(batch, generator)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        """The head's loss per sample: over real steps and real components only.

        Noise, times and (in training mode) augmentation are drawn from `generator`, which is on the policy's device.
        """
        context = self.context(batch.observation, generator if self.training else None)
        mask = self.mask(batch.action_is_pad)
        action = pad(self.action.apply(batch.action.float()), (0, self.spec.action_width - batch.action.shape[-1]))
        # A padded step's content is the dataset's whim: zeroed, it cannot enter through attention either.
        return self.head.loss(context, action.where(mask, 0.0), mask, generator)

    @torch.no_grad()
    def act(
        self,
        observation: Observation,
        generator: torch.Generator | None = None,
        *,
        noise: Float[Tensor, "b ..."] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """Chunks of actions in the environment's units, a function of the observation and the noise.

        `noise` [b, *head.noise_shape] is drawn from `generator` unless given.
        """
        observation = observation.to(self.device)
        if noise is None:
            shape = (len(observation), *self.head.noise_shape)
            noise = torch.randn(shape, generator=generator, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, uses_bf16(self.spec.config.precision, self.device)):
            chunk = self.head.sample(self.context(observation), noise.to(self.device))
        chunk = self.action.invert(chunk.float()[..., : len(self.spec.schema.action)])
        low, high = chunk.new_tensor(_limits(self.spec.schema.action))
        return chunk.clamp(low, high)

    def context(self, observation: Observation, generator: torch.Generator | None = None) -> Context:
        """What the backbone makes of an observation as recorded; augmented if a `generator` is given."""
        return self.backbone(self.prepare(observation, generator))

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

    def mask(self, action_is_pad: Bool[Tensor, "b h"]) -> Bool[Tensor, "b h a"]:
        """The entries of a chunk that mean something: steps before the episode's end, components of the schema."""
        real = torch.arange(self.spec.action_width, device=action_is_pad.device) < len(self.spec.schema.action)
        return ~action_is_pad[..., None] & real


def _limits(action: tuple[Component, ...]) -> list[list[float]]:
    """Lowest and highest value of each component.

    A unit with a number in it ("1", "0.1 rad") is a scale, and the component a command in [-1, 1]; a bare one ("rad")
    has no limit.
    """
    highest = [1.0 if c.unit[:1].isdigit() else float("inf") for c in action]
    return [[-h for h in highest], highest]


def _channels_last(image: Shaped[Tensor, "b _ _ _"]) -> Shaped[Tensor, "b h w 3"]:
    return image if image.shape[-1] == 3 else image.permute(0, 2, 3, 1)


def _refuse_unfit_widths(spec: PolicySpec, normalizers: Mapping[str, Normalizer]) -> None:
    for name, components, width in (
        ("state", spec.schema.state, spec.state_width),
        ("action", spec.schema.action, spec.action_width),
    ):
        if width < len(components):
            raise BadInput(f"pad_{name} is {width}, but the schema has {len(components)} components; give more or 0")
        fitted = len(normalizers[name].center)
        if fitted != len(components):
            raise BadInput(f"{name}: the statistics have {fitted} components, the schema {len(components)}; fit anew")


def _refuse_unfit_pair(backbone: str, backbone_class: Any, head: str, head_class: Any) -> None:
    missing = head_class.needs - backbone_class.gives
    if missing:
        fitting = [name for name in HEADS if HEADS.resolve(name).needs <= backbone_class.gives]
        raise BadInput(
            f"head {head!r} needs {' and '.join(sorted(missing))}, which backbone {backbone!r} does not give; "
            f"heads that fit it: {', '.join(fitting) or 'none'}"
        )


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
