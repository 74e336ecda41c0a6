"""A policy from chunks that a critic has judged.

```
 executed     loss = w · (the policy's own loss of the executed chunk)      w = min(exp(β A), w_max), A = min Q - V
 best_of_k    loss = 1[both Qs agree] · (its loss of the best proposal)
```
The policy's own loss is -log π for a Gaussian head, and the denoising error for one that has no likelihood: weighting
it per sample is what -w log π becomes there. β = 0 is behaviour cloning to the bit.
Peng et al. 2019 (arXiv 1910.00177); the convention is exp(β A), where others write exp(A / β).
"""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from models.config import ChunkPolicyConfig
from models.types import Batch, Info, Judged, Phase


def advantage_weights(advantage: Float[Tensor, " b"], beta: float, max_weight: float) -> Float[Tensor, " b"]:
    """min(exp(β A), w_max), clipped before the exponential: an advantage of 1e4 is a weight of w_max, not infinity."""
    return torch.exp((beta * advantage.detach().float()).clamp(max=math.log(max_weight)))


def effective_sample_size(weights: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """(Σw)² / Σw², as a share of the samples: 1 when all count alike, 1/b when one counts alone."""
    return weights.sum() ** 2 / (weights**2).sum().clamp(min=1e-12) / len(weights)


class ChunkPolicy(Phase):
    """Trains the policy and carries nothing else: the judgement came with the data."""

    Config: ClassVar[type] = ChunkPolicyConfig
    reads: ClassVar[type[Batch]] = Judged

    def __init__(self, policy: nn.Module, config: ChunkPolicyConfig) -> None:
        super().__init__()
        self.policy = policy
        self.config = config

    def forward(self, batch: Judged, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        batch, weights = imitated(batch, self.config)
        loss, info = self.policy(batch, generator)
        return weights * loss, info | {"ess": effective_sample_size(weights), "weight": weights.mean()}


def imitated(batch: Judged, config: ChunkPolicyConfig) -> tuple[Judged, Float[Tensor, " b"]]:
    """The chunks to imitate, and how much each counts."""
    if config.imitate == "executed":
        return batch, advantage_weights(batch.advantage, config.beta, config.max_weight)
    if batch.best is None or batch.agreed is None:
        raise BadInput("imitate best_of_k needs ranked proposals; relabel before the critic judges")
    # a proposal is a whole chunk, whatever the episode had left
    whole = replace(batch, action=batch.best, action_is_pad=torch.zeros_like(batch.action_is_pad))
    return whole, batch.agreed.float()
