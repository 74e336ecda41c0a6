"""A pair is a backbone, a head and the numbers that scale what goes in and comes out: the one place they meet.

```
 observation --Reader--> Context --head--> [b h a] --invert, clip--> environment's units
                            ^
 action --normalise, mask---+ (training)
```
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from data.normalize import Normalizer
from models.policy import Policy, PolicySpec
from models.reading import make_backbone
from models.registry import BACKBONES, HEADS, configure
from models.types import Batch, Context, Info, Observation, Pretrained, Sizes


class Pair(Policy):
    """Any backbone with any head that fits it."""

    backbone: Any  # an nn.Module that is a models.types.Backbone
    head: Any  # an nn.Module that is a models.types.Head

    def __init__(
        self, spec: PolicySpec, backbone: nn.Module, head: nn.Module, *, state: Normalizer, action: Normalizer
    ) -> None:
        super().__init__(spec, state=state, action=action)
        self.backbone = backbone
        self.head = head

    @classmethod
    def assemble(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer], *, seed: int, new: bool) -> Self:
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
            pair = cls(
                spec, backbone, head_class(head_config, sizes), state=normalizers["state"], action=normalizers["action"]
            )
            if new:
                for part in (pair.backbone, pair.head):
                    if isinstance(part, Pretrained):
                        part.load_pretrained()
        return pair

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.head.noise_shape

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        """The head's."""
        context = self.context(batch.observation, generator if self.training else None)
        mask = self.mask(batch.action_is_pad)
        return self.head.loss(context, self.normalised(batch.action, mask), mask, generator)

    def answer(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h w"]:
        """The backbone reads each observation once."""
        b, k = noise.shape[:2]
        context = self.context(observation)
        chunk = self.head.sample(context if k == 1 else context.repeat(k), noise.flatten(0, 1))
        return chunk.unflatten(0, (b, k))

    def context(self, observation: Observation, generator: torch.Generator | None = None) -> Context:
        """What the backbone makes of an observation as recorded; augmented if a `generator` is given."""
        prepared = self.prepare(observation, generator)
        return replace(self.backbone(prepared), state=prepared.state)


def fitting_heads(backbone_class: Any) -> list[str]:
    """The registered heads that read no more than `backbone_class` gives."""
    return [name for name in HEADS if HEADS.resolve(name).needs <= backbone_class.gives]


def _refuse_unfit_pair(backbone: str, backbone_class: Any, head: str, head_class: Any) -> None:
    missing = head_class.needs - backbone_class.gives
    if missing:
        raise BadInput(
            f"head {head!r} needs {' and '.join(sorted(missing))}, which backbone {backbone!r} does not give; "
            f"heads that fit it: {', '.join(fitting_heads(backbone_class)) or 'none'}"
        )
