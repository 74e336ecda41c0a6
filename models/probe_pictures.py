"""What a person looks at before believing an encoder: what it knows, step by step, beside what it knew untrained."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

GREY, BLUE, RED = "#57606a", "#0969da", "#cf222e"
STYLES = ("-", "--", ":", "-.")  # of the components, which share a colour


def plot_probes(found: dict[str, Any], path: Path) -> None:
    """`found` is `tasks.probing`'s summary: a record {step, score, rank, r2} for each probe."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    records = [found["untrained"], *found["trained"]]
    steps = [record["step"] for record in records]
    for i, name in enumerate(records[-1]["r2"]):
        values = [record["r2"][name] for record in records]
        top.plot(steps, values, color=GREY, linewidth=0.9, linestyle=STYLES[i % len(STYLES)], label=name)
    top.plot(steps, [record["score"] for record in records], "o-", color=BLUE, label="mean")
    top.axhline(found["untrained"]["score"], color=RED, linestyle="--", label="random weights")
    top.axvline(found["best"], color=BLUE, linewidth=0.6)
    top.set(ylabel="R² on held-out episodes", title="what can be read off z by one linear map")
    top.legend(frameon=False, loc="lower right", fontsize=8)
    bottom.plot(steps, [record["rank"] for record in records], "o-", color=BLUE)
    bottom.set(xlabel="step", ylabel="effective rank of z", ylim=(0, None))
    figure.savefig(path, format="png", dpi=110)
