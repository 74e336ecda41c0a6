"""Fixed sinusoidal embeddings of time, of a place in a sequence and of a place in a picture."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def sinusoid(position: Float[Tensor, "*b"], width: int, longest: float, shortest: float) -> Float[Tensor, "*b w"]:
    """sin and cos of `position` at width/2 periods between `shortest` and `longest`, spaced geometrically.

    `shortest` and `longest` are in the position's unit: 4e-3 and 4 for flow time (pi0).
    """
    shares = torch.linspace(0, 1, width // 2, device=position.device, dtype=torch.float32)
    periods = shortest * (longest / shortest) ** shares
    angle = position[..., None].float() * (2 * math.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sequence_positions(length: int, width: int) -> Float[Tensor, "n w"]:
    """One embedding per place 0 .. length-1."""
    return sinusoid(torch.arange(length, dtype=torch.float32), width, longest=2 * math.pi * 1e4, shortest=2 * math.pi)


def grid_positions(height: int, width: int, features: int) -> Float[Tensor, "n w"]:
    """One embedding per cell of a grid, row by row: the first half says which row, the second which column (DETR)."""
    rows = sinusoid((torch.arange(height) + 0.5) / height, features // 2, longest=2.0, shortest=2.0 / 64)
    columns = sinusoid((torch.arange(width) + 0.5) / width, features // 2, longest=2.0, shortest=2.0 / 64)
    rows, columns = rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
