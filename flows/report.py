"""The last lines of a flow on the terminal: what came out, where it lies, how to look at it."""

from typing import Any

from rich.table import Table

from tasks.progress import console

SHOWN = {  # key of the summary -> what people call it
    "dataset": "dataset",
    "batches": "rollouts",
    "critic": "critic",
    "encoder": "encoder",
    "checkpoint": "checkpoint",
    "score": "score",
    "video": "video",
    "plot": "plot",
    "pictures": "pictures",
    "run": "run",
}


def show(summary: dict[str, Any]) -> None:
    """Print the summary for people, to the terminal (the JSON form goes to standard output)."""
    console.print()
    if "rows" in summary:
        console.print(_table(summary))
    if "success" in summary:
        low, high = summary["interval"]
        console.print(
            f"success {summary['success']:.0%} on {summary['episodes']} unseen seeds"
            f" (95 % interval {low:.0%} to {high:.0%})",
            style="bold",
        )
        console.print("  " + ", ".join(f"{name} {rate:.0%}" for name, rate in summary["subgoals"].items()))
    if squared := summary.get("action_error", {}).get("squared"):
        console.print("  held-out actions, squared error: " + ", ".join(f"{n} {e:.2g}" for n, e in squared.items()))
    if "probes" in summary:
        probes = summary["probes"]
        best = next(record for record in probes["trained"] if record["step"] == probes["best"])
        console.print(
            f"z says {', '.join(best['r2'])} with R² {best['score']:.2f} on held-out episodes"
            f" ({probes['untrained']['score']:.2f} untrained), effective rank {best['rank']:.1f}",
            style="bold",
        )
    if "gain_points" in summary:
        arm = summary["control"]
        low, high = arm["interval"]
        console.print(
            f"cloning continued on the same data: {arm['success']:.0%} ({low:.0%} to {high:.0%}); offline RL gains "
            f"{summary['gain_points']:+.1f} points on the same seeds, p = {summary['p_value']:.2g} (exact McNemar)",
            style="bold",
        )
    if "collected_successes" in summary:
        count, succeeded = summary["collected_episodes"], summary["collected_successes"]
        console.print(f"collected {count} episodes, {succeeded} of them successes", style="bold")
    if "model_version" in summary:
        aliases = ", ".join(f"@{alias}" for alias in summary["aliases"]) or "no alias"
        console.print(f"model {summary['model']} version {summary['model_version']} ({aliases}): {summary['decision']}")
    for key, name in SHOWN.items():
        if value := summary.get(key):
            text = f"{len(value)}, the first {value[0]}" if isinstance(value, list) else value
            text = f"MLflow's page {text}" if key == "run" else text
            console.print(f"  {name:<10} {text}", markup=False, soft_wrap=True)
    console.print(
        f"{summary['tasks_run']} tasks run, {summary['tasks_cached']} cached, {summary['seconds']:.1f} s.  "
        "Pages of Prefect and MLflow: flywheel up",
        markup=False,
    )


def _table(summary: dict[str, Any]) -> Table:
    """Recipes side by side, the best first; as wide as a terminal of 80."""
    rows = summary["rows"]
    about = (
        f"{summary['steps']} steps of {summary['batch_size']}, {rows[0]['episodes']} unseen seeds, {rows[0]['device']}"
    )
    table = Table(title=about, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for name in ("recipe", "success", "95 %", "p to best", "params", "samples/s", "ms/chunk", "MB"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for row in rows:
        low, high = row["interval"]
        table.add_row(
            row["recipe"],
            f"{row['success']:.0%}",
            f"{100 * low:.0f}-{high:.0%}",
            f"{row['p_value']:.2g}" if "p_value" in row else "",
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['samples_per_s']:.0f}",
            f"{row['chunk_ms']:.1f}",
            f"{row['peak_mb']}",
        )
    return table
