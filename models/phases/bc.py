"""Behaviour cloning: the policy's own loss on the executed actions."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.types import Batch, Info, ParameterGroup


class BehaviourCloning(nn.Module):
    """Trains the policy and carries nothing else."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        return self.policy(batch, generator)

    def parts(self) -> dict[str, nn.Module]:
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weight decay on matrices and kernels, not on biases and norms."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return [
            ParameterGroup(parameters={n: p for n, p in trained.items() if p.ndim >= 2}, decay=True),
            ParameterGroup(parameters={n: p for n, p in trained.items() if p.ndim < 2}, decay=False),
        ]

    def after_step(self, step: int) -> None:
        """Nothing follows."""
