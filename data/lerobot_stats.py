"""Statistics in LeRobot's form: per feature min, max, mean, std, count and five quantiles.

Written out here because importing LeRobot's own takes 11 CPU-seconds, which every collecting process would pay.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int64, UInt8

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
EVERY = 8  # pictures are counted from every 8th frame: their statistics are for whitening, not for measuring

FeatureStats = dict[str, list]


def column_stats(columns: Mapping[str, np.ndarray]) -> dict[str, FeatureStats]:
    """Of columns shaped (n,) or (n, width), all n alike; computed in float64 over one joint matrix."""
    flat = {name: np.asarray(c, np.float64).reshape(len(c), -1) for name, c in columns.items()}
    joint = np.concatenate(list(flat.values()), axis=1)
    rows = {"min": joint.min(0), "max": joint.max(0), "mean": joint.mean(0), "std": joint.std(0)}
    rows |= dict(zip(QUANTILES, np.quantile(joint, list(QUANTILES.values()), axis=0), strict=True))
    stats, start = {}, 0
    for name, values in flat.items():
        end = start + values.shape[1]
        stats[name] = {stat: row[start:end].tolist() for stat, row in rows.items()} | {"count": [len(joint)]}
        start = end
    return stats


def color_histogram(images: UInt8[np.ndarray, "l height width 3"]) -> Int64[np.ndarray, "3 256"]:
    """How often each channel has each level, over every 8th picture."""
    levels = images[::EVERY].reshape(-1, 3) + np.array([0, 256, 512], np.uint16)
    return np.bincount(levels.ravel(), minlength=768).reshape(3, 256)


def image_stats(histogram: Int64[np.ndarray, "3 256"], pictures: int) -> FeatureStats:
    """Per channel, in [0, 1], each value nested as LeRobot nests it: [[[r]], [[g]], [[b]]]."""
    level = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ level
    rows = {
        "min": level[(histogram > 0).argmax(1)],
        "max": level[255 - (histogram[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt((share * (level - mean[:, None]) ** 2).sum(1)),
    }
    below = share.cumsum(1)
    rows |= {name: level[np.minimum((below < q).sum(1), 255)] for name, q in QUANTILES.items()}
    return {stat: row.reshape(3, 1, 1).tolist() for stat, row in rows.items()} | {"count": [pictures]}
