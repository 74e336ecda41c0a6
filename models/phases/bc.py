"""Behaviour cloning: the policy's own loss on the executed actions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.types import Batch, Info, NoOptions, Phase


class BehaviourCloning(Phase):
    """Trains the policy and carries nothing else."""

    def __init__(self, policy: nn.Module, config: NoOptions) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        return self.policy(batch, generator)
