"""What a person looks at before believing a critic: three pictures.

```
 calibration   Q of the executed chunk against what really followed; the mean per bin should lie on the diagonal
 value film    V along one episode under its pictures, sub-goals marked: it rises towards each, falls once paid
 advantages    their histogram, the weight each gets, and where the clip bites
```
"""

import math
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32, UInt8
from matplotlib.figure import Figure

BINS = 12
TILES = 10  # pictures in the film strip
GREY, BLUE, RED, GREEN = "#57606a", "#0969da", "#cf222e", "#2da44e"


def plot_calibration(q: Float32[np.ndarray, " n"], realised: Float[np.ndarray, " n"], path: Path) -> None:
    """`q` is the smaller of the two. Expectile values lie above the mean return where play could have been better."""
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    low, high = float(min(q.min(), realised.min())), float(max(q.max(), realised.max()))
    axes.hexbin(q, realised, gridsize=40, cmap="Greys", mincnt=1, bins="log")
    edges = np.quantile(q, np.linspace(0, 1, BINS + 1))
    which = np.clip(np.searchsorted(edges, q, side="right") - 1, 0, BINS - 1)
    centers = [(q[which == k].mean(), realised[which == k].mean()) for k in range(BINS) if (which == k).any()]
    axes.plot(*zip(*centers, strict=True), "o-", color=BLUE, label=f"mean of each of {BINS} equal bins")
    axes.plot([low, high], [low, high], "--", color=RED, linewidth=1, label="as predicted")
    correlation = float(np.corrcoef(q, realised)[0, 1]) if q.std() and realised.std() else float("nan")
    axes.set(xlabel="min Q of the executed chunk", ylabel="realised discounted return")
    axes.set_title(f"Q against what followed: {len(q)} chunks, r = {correlation:.2f}")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, format="png", dpi=110)


def plot_value_film(
    pictures: UInt8[np.ndarray, "l height width 3"],
    v: Float32[np.ndarray, " l"],
    events: dict[str, int],
    title: str,
    path: Path,
) -> None:
    """`events` maps a sub-goal to the step whose action caused it."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 2))
    length = len(v)
    shown = np.linspace(0, length - 1, min(TILES, length)).round().astype(int)
    top.imshow(np.concatenate([pictures[i] for i in shown], axis=1))
    top.axis("off")
    top.set_title(title, fontsize=11)
    bottom.plot(v, color=BLUE)
    bottom.vlines(shown, *bottom.get_ylim(), color=GREY, linewidth=0.4, alpha=0.5)
    for name, step in events.items():
        bottom.axvline(step, color=GREEN, linewidth=1.2)
        bottom.annotate(name, (step, bottom.get_ylim()[1]), rotation=90, va="top", ha="right", fontsize=8)
    bottom.set(xlim=(0, max(1, length - 1)), xlabel="step (grey: the pictures above)", ylabel="V")
    figure.savefig(path, format="png", dpi=110)


def plot_advantages(advantage: Float32[np.ndarray, " n"], beta: float, max_weight: float, path: Path) -> None:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.hist(advantage, bins=80, color=GREY)
    axes.set(xlabel="advantage, min Q - V", ylabel="chunks", yscale="log")
    weights = axes.twinx()
    grid = np.linspace(float(advantage.min()), float(advantage.max()), 200)
    weights.plot(grid, np.exp(np.minimum(beta * grid, math.log(max_weight))), color=BLUE)
    weights.set_ylabel(f"weight exp({beta:g} A), at most {max_weight:g}", color=BLUE)
    clip = math.log(max_weight) / beta if beta else math.inf
    beyond = float((advantage > clip).mean())
    if clip < advantage.max():
        axes.axvline(clip, color=RED, linestyle="--")
    axes.set_title(f"advantages of {len(advantage)} chunks, {beyond:.1%} beyond the clip")
    figure.savefig(path, format="png", dpi=110)


def plot_effective_samples(share: list[tuple[int, float]], path: Path) -> None:
    """`share` is (step, effective sample size as a share of the batch)."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*share, strict=True), color=BLUE)
    axes.set(xlabel="step", ylabel="(Σw)² / Σw², share of the batch", ylim=(0, 1.02))
    axes.set_title("how many samples really count")
    figure.savefig(path, format="png", dpi=110)
