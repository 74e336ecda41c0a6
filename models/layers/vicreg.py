"""What keeps a representation from collapsing: each of its features varies over the batch, no two say the same.

Bardes et al. 2022 (arXiv 2105.04906), with the root's ε inside, so that its slope at no variance is finite. Both are
of the whole batch: where several processes share it, `gathered` brings the rows of all together, and gradients back.

The covariance term does not reach 0. Of features that really are independent, B samples still show on average
Σ_{i≠j} cov²/D = (D-1)/(B-1): 4.05 for 256 features and 64 samples (`covariance_floor`).
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

EPS = 1e-4  # under the root of a variance


def variance_loss(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """How far the features' standard deviations fall short of 1, on average."""
    return torch.relu(1 - torch.sqrt(z.var(dim=0) + EPS)).mean()


def covariance_loss(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """The squared covariances of different features, their sum divided by the number of features."""
    centred = z - z.mean(dim=0)
    covariance = centred.mT @ centred / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def covariance_floor(samples: int, features: int) -> float:
    """What `covariance_loss` is on average of independent features of variance 1."""
    return (features - 1) / (samples - 1)


def effective_rank(z: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """How many directions `z` uses: e to the entropy of its singular values (RankMe, Garrido et al. 2023).

    Not centred: rows that are all alike have rank 1, however small the differences are made up of.
    """
    smaller = z.double() if z.shape[0] >= z.shape[1] else z.double().mT  # in float32 rounding has a rank of its own
    squares = torch.linalg.eigvalsh(smaller.mT @ smaller).clamp(min=0)
    shares = squares.sqrt() / squares.sqrt().sum()
    return torch.exp(torch.special.entr(shares).sum()).to(z.dtype)


def gathered(z: Float[Tensor, "b d"]) -> Float[Tensor, "g d"]:
    """The rows of all processes, rank by rank; as many from each."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    return _Gathered.apply(z)


class _Gathered(torch.autograd.Function):
    """All ranks compute one loss of all rows; a row's slope is the sum of what each rank says of it.

    DDP then takes the mean over ranks, and the loss counts once.
    """

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, z.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
