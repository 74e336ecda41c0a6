"""StateVLA's phase 2: a head learns to act by z, and the encoder that made z stays as it is.

```
 encode, once     o --frozen encoder--> z          tasks/encode.py: a table beside the chunks
 every step             z, chunk -----> head's loss
```
What the frozen encoder would say is in the batch, so no picture is read and none augmented: the loss is the one of
cloning with the encoder frozen and the policy's `shift` and `jitter` 0, at a fraction of its cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from models.pair import Pair
from models.types import Batch, Context, Info, NoOptions, Phase

Z = "z"  # column beside the chunks


@dataclass(frozen=True, kw_only=True)
class Encoded(Batch):
    """Chunks with what an encoder says of their first observation. Its pictures are not needed."""

    z: Float[Tensor, "b d"]

    @classmethod
    def _fields_of(cls, columns: Mapping[str, Any]) -> dict[str, Any]:
        return super()._fields_of(columns) | {"z": torch.as_tensor(columns[Z])}


class FlowMatching(Phase):
    """Trains the head of a policy whose backbone is an encoder's (`models.encoder.policy_on`)."""

    reads: ClassVar[type[Batch]] = Encoded

    def __init__(self, policy: Pair, config: NoOptions) -> None:
        super().__init__()
        policy.backbone.requires_grad_(False)
        self.policy = policy

    def forward(self, batch: Encoded, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        policy = self.policy
        state = policy.state.apply(batch.observation.state.float())
        context = Context(pooled=batch.z, state=pad(state, (0, policy.spec.state_width - state.shape[-1])))
        mask = policy.mask(batch.action_is_pad)
        return policy.head.loss(context, policy.normalised(batch.action, mask), mask, generator)
