"""Means over the entries that count."""

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"]) -> Float[Tensor, " b"]:
    """Per sample, over the entries where `mask` is true; 0 for a sample that has none.

    Dividing by the number of valid entries, not by h·a, keeps short tails from being under-weighted (the original ACT
    takes the mean over padded steps too).
    """
    total = values.where(mask, 0.0).sum(dim=(1, 2))
    return total / mask.sum(dim=(1, 2)).clamp(min=1)
