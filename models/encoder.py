"""An encoder says in one vector z what an observation shows; whoever acts by z never looks at a picture again.

```
 observation --Reader--> backbone --> z [b d]      learnt by models.phases.jepa, published as policies are
 Encoder --policy_on--> Pair                       its backbone frozen under a head (models.phases.flow_matching)
```
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import Schema
from models.config import PolicyConfig, ReaderConfig
from models.pair import Pair
from models.policy import PolicySpec
from models.reading import Reader, Spec, make_backbone
from models.registry import BACKBONES, HEADS
from models.types import Observation

POOLED = frozenset({"pooled"})


@dataclass(frozen=True, kw_only=True)
class EncoderSpec(Spec[ReaderConfig]):
    """All that decides an encoder's architecture and meaning. `horizon` is how far it learnt to foretell."""

    kind: str = "encoder"

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "EncoderSpec":
        return cls(
            kind=value["kind"],
            horizon=value["horizon"],
            config=ReaderConfig(**value["config"]),
            schema=Schema.from_json(value["schema"]),
        )


class Encoder(Reader):
    """Any backbone that gives one vector."""

    Spec = EncoderSpec
    backbone: Any  # an nn.Module that is a models.types.Backbone

    def __init__(self, spec: EncoderSpec, *, state: Normalizer, action: Normalizer) -> None:
        """Raises `BadInput` for a backbone without a vector."""
        super().__init__(spec, state=state, action=action)
        if "pooled" not in BACKBONES.resolve(spec.config.backbone).gives:
            fitting = [name for name in BACKBONES if "pooled" in BACKBONES.resolve(name).gives]
            raise BadInput(f"backbone {spec.config.backbone!r} gives no vector to learn; use {', '.join(fitting)}")
        self.backbone = make_backbone(spec, POOLED)

    @classmethod
    def build(cls, spec: EncoderSpec, stats: Mapping[str, Stats], *, seed: int = 0) -> "Encoder":
        """A new encoder, its weights a function of `seed`. Raises `BadInput` as `Policy.build` does."""
        normalizers = {name: Normalizer(stats=stats[name], mode=spec.config.normalization) for name in stats}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = cls.restore(spec, normalizers)
            encoder.backbone.load_pretrained()
        return encoder

    @classmethod
    def restore(cls, spec: EncoderSpec, normalizers: Mapping[str, Normalizer]) -> "Encoder":
        """The architecture of `spec`, for weights that a checkpoint is about to fill in."""
        return cls(spec, state=normalizers["state"], action=normalizers["action"])

    def forward(self, observation: Observation) -> Float[Tensor, "b d"]:
        """z of observations as recorded."""
        return self.backbone(self.prepare(observation)).pooled


def policy_on(encoder: Encoder, config: PolicyConfig, *, horizon: int, seed: int = 0) -> Pair:
    """The head of `config` on a copy of the encoder's backbone; what is read, and how, is the encoder's to say.

    Raises `BadInput` for a head that reads more than z.
    """
    head = HEADS.resolve(config.head)
    if head.needs | (head.likes & encoder.backbone.gives) != POOLED:
        raise BadInput(f"head {config.head!r} reads more than an encoder's z; use statevla, flow or gaussian")
    reads = {f.name: getattr(encoder.spec.config, f.name) for f in fields(ReaderConfig)}
    spec = PolicySpec(config=replace(config, **reads), schema=encoder.spec.schema, horizon=horizon)
    policy = Pair.assemble(spec, {"state": encoder.state, "action": encoder.action}, seed=seed, new=False)
    policy.backbone.load_state_dict(encoder.backbone.state_dict())
    return policy
