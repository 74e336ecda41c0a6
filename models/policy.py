"""A policy is a backbone, a head and the numbers that scale what goes in and comes out: the one place they meet.

```
 observation --Reader--> Context --head--> [b h a] --invert, clip--> environment's units
                            ^
 action --normalise, mask---+ (training)
```
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import Component, Schema
from models.config import PolicyConfig
from models.devices import uses_bf16
from models.reading import Reader, Spec, make_backbone
from models.registry import BACKBONES, HEADS, configure
from models.types import Batch, Context, Info, Observation, Sizes


@dataclass(frozen=True, kw_only=True)
class PolicySpec(Spec[PolicyConfig]):
    """All that decides a policy's architecture and meaning."""

    kind: str = "pair"  # registered policy class

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PolicySpec":
        return cls(
            kind=value["kind"],
            horizon=value["horizon"],
            config=PolicyConfig(**value["config"]),
            schema=Schema.from_json(value["schema"]),
        )


class Policy(Reader):
    """Any backbone with any head that fits it."""

    Spec = PolicySpec
    backbone: Any  # an nn.Module that is a models.types.Backbone
    head: Any  # an nn.Module that is a models.types.Head

    def __init__(
        self, spec: PolicySpec, backbone: nn.Module, head: nn.Module, *, state: Normalizer, action: Normalizer
    ) -> None:
        super().__init__(spec, state=state, action=action)
        self.backbone = backbone
        self.head = head

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
        config = spec.config
        backbone_class, head_class = BACKBONES.resolve(config.backbone), HEADS.resolve(config.head)
        _refuse_unfit_pair(config.backbone, backbone_class, config.head, head_class)
        head_config = configure(head_class, config.head_options, whose=f"head {config.head}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone: Any = make_backbone(spec, head_class.needs | (head_class.likes & backbone_class.gives))
            sizes = Sizes(
                context=backbone.width,
                state=spec.state_width,
                horizon=spec.horizon,
                action=spec.action_width,
                layers=backbone.layer_shape if "layers" in head_class.needs else None,
            )
            head = head_class(head_config, sizes)
        return cls(spec, backbone, head, state=normalizers["state"], action=normalizers["action"])

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        return self.loss(batch, generator)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        """The head's loss per sample: over real steps and real components only.

        Noise, times and (in training mode) augmentation are drawn from `generator`, which is on the policy's device.
        """
        context = self.context(batch.observation, generator if self.training else None)
        mask = self.mask(batch.action_is_pad)
        return self.head.loss(context, self.normalised(batch.action, mask), mask, generator)

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
        return self.in_units(chunk)

    @torch.no_grad()
    def propose(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h a"]:
        """As `act`, but k chunks per observation, which the backbone reads once."""
        b, k = noise.shape[:2]
        observation = observation.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, uses_bf16(self.spec.config.precision, self.device)):
            context = self.context(observation).repeat(k)
            chunk = self.head.sample(context, noise.to(self.device).flatten(0, 1))
        return self.in_units(chunk).unflatten(0, (b, k))

    def context(self, observation: Observation, generator: torch.Generator | None = None) -> Context:
        """What the backbone makes of an observation as recorded; augmented if a `generator` is given."""
        prepared = self.prepare(observation, generator)
        return replace(self.backbone(prepared), state=prepared.state)

    def in_units(self, chunk: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h a"]:
        """What the head answered, in the environment's units and limits."""
        chunk = self.action.invert(chunk.float()[..., : len(self.spec.schema.action)])
        return within_limits(chunk, self.spec.schema.action)


def within_limits(chunk: Float[Tensor, "*b a"], action: tuple[Component, ...]) -> Float[Tensor, "*b a"]:
    """`chunk` clipped to the lowest and highest value of each component.

    A unit with a number in it ("1", "0.1 rad") is a scale, and the component a command in [-1, 1]; a bare one ("rad")
    has no limit.
    """
    highest = chunk.new_tensor([1.0 if c.unit[:1].isdigit() else float("inf") for c in action])
    return chunk.clamp(-highest, highest)


def _refuse_unfit_pair(backbone: str, backbone_class: Any, head: str, head_class: Any) -> None:
    missing = head_class.needs - backbone_class.gives
    if missing:
        fitting = [name for name in HEADS if HEADS.resolve(name).needs <= backbone_class.gives]
        raise BadInput(
            f"head {head!r} needs {' and '.join(sorted(missing))}, which backbone {backbone!r} does not give; "
            f"heads that fit it: {', '.join(fitting) or 'none'}"
        )
