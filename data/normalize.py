"""Normalisation of state and action vectors: fit, merge, apply, invert. The only owner of these numbers.

Statistics are kept as count, mean, sum of squared deviations, minimum and maximum, so those of many collections merge
into exactly what one pass over all rows would give, and a night only looks at its new rows.
Chan, Golub & LeVeque 1983 is the source of the merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64

from data.errors import BadInput
from data.registry import did_you_mean

MODES = ("mean_std", "mean_std_signs", "min_max")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
    """What is known about the `d` components of one feature. Units are the feature's own."""

    count: int  # rows seen
    mean: Float64[np.ndarray, " d"]
    m2: Float64[np.ndarray, " d"]  # Σ (x - mean)²
    min: Float64[np.ndarray, " d"]
    max: Float64[np.ndarray, " d"]

    @property
    def std(self) -> Float64[np.ndarray, " d"]:
        return np.sqrt(self.m2 / self.count)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count} | {name: getattr(self, name).tolist() for name in ("mean", "m2", "min", "max")}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Stats":
        vectors = {name: np.array(value[name], np.float64) for name in ("mean", "m2", "min", "max")}
        return cls(count=value["count"], **vectors)


def fit(rows: np.ndarray) -> Stats:
    """Statistics of `rows` [n, d]. Raises `BadInput` on no rows and on NaN or infinity."""
    if not len(rows):
        raise BadInput("no rows to fit a normalisation to; collect at least one episode")
    rows = rows.astype(np.float64)
    finite = np.isfinite(rows).all(axis=0)
    if not finite.all():
        raise BadInput(f"component {int(finite.argmin())} holds NaN or infinity; drop or record the episode again")
    mean = rows.mean(axis=0)
    return Stats(
        count=len(rows), mean=mean, m2=((rows - mean) ** 2).sum(axis=0), min=rows.min(axis=0), max=rows.max(axis=0)
    )


def merge(parts: Sequence[Stats]) -> Stats:
    """The statistics of all rows behind `parts` together."""
    count = sum(p.count for p in parts)
    zero = np.zeros_like(parts[0].mean)
    mean = sum((p.count * p.mean for p in parts), start=zero) / count
    return Stats(
        count=count,
        mean=mean,
        m2=sum((p.m2 + p.count * (p.mean - mean) ** 2 for p in parts), start=zero),
        min=np.min([p.min for p in parts], axis=0),
        max=np.max([p.max for p in parts], axis=0),
    )


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """Maps a feature to numbers near [-1, 1] and back: `apply(x) = (x - center) / width`.

    Takes numpy arrays and torch tensors [..., D] and returns the same kind, dtype and device. Components beyond the `d`
    fitted ones are padding and pass unchanged, so a zero stays zero.
    """

    stats: Stats
    mode: str = "mean_std"  # "mean_std": mean 0, deviation 1; "min_max": seen range to [-1, 1]; "mean_std_signs":
    # mean_std, but a component that was only ever -1 or +1, as a gripper's command, passes unchanged
    floor: float = 1e-3  # smallest width, in the feature's unit: a component that never moved must not amplify noise

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BadInput(f"unknown normalisation mode {self.mode!r}{did_you_mean(self.mode, MODES)}")

    @cached_property
    def center(self) -> Float64[np.ndarray, " d"]:
        if self.mode == "min_max":
            return (self.stats.max + self.stats.min) / 2
        return np.where(self._unchanged, 0.0, self.stats.mean)

    @cached_property
    def width(self) -> Float64[np.ndarray, " d"]:
        if self.mode == "min_max":
            return np.maximum((self.stats.max - self.stats.min) / 2, self.floor)
        return np.where(self._unchanged, 1.0, np.maximum(self.stats.std, self.floor))

    @property
    def _unchanged(self) -> Bool[np.ndarray, " d"]:
        """Within [-1, 1] a mean square of 1 leaves no other values than the two ends."""
        within = (self.stats.min >= -1) & (self.stats.max <= 1)
        square = self.stats.m2 / self.stats.count + self.stats.mean**2
        return within & (square > 1 - 1e-9) & (self.mode == "mean_std_signs")

    def apply(self, x: Any) -> Any:
        center, width = self._like(x)
        return (x - center) / width

    def invert(self, x: Any) -> Any:
        center, width = self._like(x)
        return x * width + center

    def _like(self, x: Any) -> tuple[Any, Any]:
        """Center and width as wide as `x`, in its library, dtype and device."""
        padding = x.shape[-1] - len(self.center)
        if padding < 0:
            raise BadInput(f"{x.shape[-1]} components, but the normalisation was fitted to {len(self.center)}")
        center, width = np.pad(self.center, (0, padding)), np.pad(self.width, (0, padding), constant_values=1)
        if isinstance(x, np.ndarray):
            return center.astype(x.dtype), width.astype(x.dtype)
        return x.new_tensor(center), x.new_tensor(width)

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "floor": self.floor, "stats": self.stats.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Normalizer":
        return cls(mode=value["mode"], floor=value["floor"], stats=Stats.from_json(value["stats"]))
