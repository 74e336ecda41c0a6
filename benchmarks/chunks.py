"""Chunk building: ours beside a plain Python loop, pandas and duckdb, on the same parquet file.

    python benchmarks/chunks.py [--rows 100000 1000000 10000000] [--rounds 5] [--json]

Every implementation runs in a process of its own (so that its peak memory is its own) on one thread, all of them answer
round by round in turn, and their tables must be equal before anything is timed. Two jobs are timed, from the file to
the table in memory: `chunks` (events given) and `labelled` (events derived from the predicates first). The loop is left
out beyond a million rows. CPU seconds, median of the rounds, after one warm-up; `spread` is (max - min) / median.
`ours_stream` is the path that writes the table to a file without ever holding it.
"""

import argparse
import hashlib
import json
import multiprocessing as mp
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np

H, GAMMA = 10, 0.99
PREDICATES = ("reached", "grasped", "lifted")
COLUMNS = ("episode_index", "start", "t", "h", "next", "reward", "discount", "terminal", "truncated", "n_pad")
ONE_THREAD = {name: "1" for name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
MAX_LOOP_ROWS = 1_000_000


def write_steps(folder: Path, rows: int) -> None:
    """A collection of `rows` steps in episodes of 100 to 200: steps.parquet and at_reset.parquet."""
    import polars as pl

    rng = np.random.default_rng(0)
    length = rng.integers(100, 201, size=rows // 100 + 1)
    length = length[: int(np.searchsorted(np.cumsum(length), rows)) + 1]
    length[-1] -= length.sum() - rows
    episode = np.repeat(np.arange(len(length)), length)
    frame = np.arange(rows) - np.repeat(np.cumsum(length) - length, length)
    last = frame == length[episode] - 1
    success = rng.random(len(length)) < 0.6
    reset = {f"subgoal.{p}": rng.random(len(length)) < 0.05 for p in PREDICATES}
    level = {
        f"subgoal.{p}": (frame >= rng.integers(0, 200, size=len(length))[episode]) & (rng.random(rows) < 0.9)
        for p in PREDICATES
    }
    steps = pl.DataFrame({"episode_index": episode, "frame_index": frame, **level}).with_columns(
        terminated=last & success[episode], truncated=last & ~success[episode]
    )
    at_reset = pl.DataFrame({"episode_index": np.arange(len(length)), **reset})
    steps = label_with_ours(steps.lazy(), at_reset).collect()  # `event` for the job that takes it as given
    steps.drop(f"event.{p}" for p in PREDICATES).write_parquet(folder / "steps.parquet")
    at_reset.write_parquet(folder / "at_reset.parquet")


def label_with_ours(steps, at_reset):
    from data.subgoals import RisingEdge

    return RisingEdge()(steps, at_reset)


def ours(folder: Path, job: str):
    import polars as pl

    from data.chunks import ChunkConfig, build_chunks

    steps = pl.scan_parquet(folder / "steps.parquet")
    if job == "labelled":
        steps = label_with_ours(steps.drop("event"), pl.read_parquet(folder / "at_reset.parquet"))
    return build_chunks(steps, ChunkConfig(horizon=H, gamma=GAMMA)).collect()


def ours_stream(folder: Path, job: str):
    """Checked, labelled, built and written; read back only to compare."""
    import polars as pl

    from data.chunks import ChunkConfig, write_chunks
    from data.subgoals import RisingEdge

    steps = pl.scan_parquet(folder / "steps.parquet").drop("event")
    reset = pl.read_parquet(folder / "at_reset.parquet")
    write_chunks(steps, reset, folder / "out.parquet", config=ChunkConfig(horizon=H, gamma=GAMMA), labeler=RisingEdge())
    return pl.scan_parquet(folder / "out.parquet")


def loop(folder: Path, job: str):
    """What one writes first, and what the published chunk datasets do: a dict per row in, a dict per chunk out."""
    import polars as pl

    names = ["episode_index", "terminated"]
    names += ["event"] if job == "chunks" else [f"subgoal.{p}" for p in PREDICATES]
    steps = pl.read_parquet(folder / "steps.parquet", columns=names).to_dicts()
    if job == "labelled":
        label_in_a_loop(steps, pl.read_parquet(folder / "at_reset.parquet").to_dicts())
    chunks, first = [], 0
    while first < len(steps):
        end = first
        while end < len(steps) and steps[end]["episode_index"] == steps[first]["episode_index"]:
            end += 1
        for i in range(first, end):
            h = min(H, end - i)
            ends = i + h == end
            terminal = ends and steps[end - 1]["terminated"]
            chunk = {
                "episode_index": steps[i]["episode_index"],
                "start": i,
                "t": i - first,
                "h": h,
                "next": min(i + h, end - 1),
                "reward": float(any(steps[k]["event"] for k in range(i, i + h))),
                "discount": 0.0 if terminal else GAMMA**h,
                "terminal": terminal,
                "truncated": ends and not terminal,
                "n_pad": H - h,
            }
            chunks.append(chunk)
        first = end
    return chunks


def label_in_a_loop(steps: list[dict], at_reset: list[dict]) -> None:
    episode, held = -1, {}
    for row in steps:
        if row["episode_index"] != episode:
            episode = row["episode_index"]
            held = dict(at_reset[episode])
        row["event"] = 0
        for name in (f"subgoal.{p}" for p in PREDICATES):
            if row[name] and not held[name]:
                row["event"] += 1
                held[name] = True


def pandas(folder: Path, job: str):
    """groupby().transform for the ends, one shift per step of the chunk for the events."""
    import pandas as pd

    columns = ["episode_index", "frame_index", "terminated"]
    columns += ["event"] if job == "chunks" else [f"subgoal.{p}" for p in PREDICATES]
    steps = pd.read_parquet(folder / "steps.parquet", columns=columns)
    groups = steps.groupby("episode_index", sort=False)
    if job == "labelled":
        reset = pd.read_parquet(folder / "at_reset.parquet").set_index("episode_index")
        event = np.zeros(len(steps), np.int64)
        for name in [f"subgoal.{p}" for p in PREDICATES]:
            seen = groups[name].cumsum()
            event += steps[name] & (seen == 1) & ~steps["episode_index"].map(reset[name])
        steps["event"] = event
        groups = steps.groupby("episode_index", sort=False)
    start = np.arange(len(steps))
    end = start - steps["frame_index"] + groups["frame_index"].transform("size")
    h = np.minimum(H, end - start)
    tail = start + h == end
    reward = steps["event"] > 0
    for k in range(1, H):
        reward |= groups["event"].shift(-k, fill_value=0) > 0
    terminal = tail & groups["terminated"].transform("last")
    return {
        "episode_index": steps["episode_index"],
        "start": start,
        "t": steps["frame_index"],
        "h": h,
        "next": np.minimum(start + h, end - 1),
        "reward": reward.astype(np.float32),
        "discount": np.where(terminal, 0, GAMMA**h),
        "terminal": terminal,
        "truncated": tail & ~terminal,
        "n_pad": H - h,
    }


def duckdb(folder: Path, job: str):
    """Window functions over (partition by episode order by frame)."""
    import duckdb

    query = f"""
        with ends as (
            select row_number() over () - 1 as start, episode_index, frame_index as t,
                count(*) over (partition by episode_index) as length,
                max(event) over (partition by episode_index order by frame_index
                    rows between current row and {H - 1} following) as event,
                bool_or(terminated) over (partition by episode_index) as terminated
            from read_parquet('{folder}/steps.parquet')),
        spans as (select *, least({H}, length - t) as h, t + {H} >= length as tail from ends)
        select episode_index, start, t, h, start + least(h, length - 1 - t) as next, (event > 0)::float as reward,
            case when tail and terminated then 0 else pow({GAMMA}, h) end as discount, tail and terminated as terminal,
            tail and not terminated as truncated, {H} - h as n_pad
        from spans order by start"""
    return duckdb.connect(config={"threads": 1}).execute(query).fetchnumpy()


def read_alone(folder: Path, job: str):
    """The limit: reading the columns and nothing else."""
    import polars as pl

    columns = ["episode_index", "frame_index", "terminated"]
    columns += ["event"] if job == "chunks" else [f"subgoal.{p}" for p in PREDICATES]
    return pl.read_parquet(folder / "steps.parquet", columns=columns)


IMPLEMENTATIONS = {f.__name__: f for f in (ours, loop, pandas, duckdb, ours_stream, read_alone)}
IN_JOB = {
    "chunks": ("ours", "loop", "pandas", "duckdb", "read_alone"),
    "labelled": ("ours", "loop", "pandas", "ours_stream"),
}


def digests(table) -> dict[str, str]:
    """Column -> sha256 of its values in millionths (the discounts are powers, rounded differently by each library)."""
    if hasattr(table, "collect"):
        table = table.collect()
    digest = {}
    for name in COLUMNS:
        column = [chunk[name] for chunk in table] if isinstance(table, list) else table[name]
        digest[name] = hashlib.sha256(np.round(np.asarray(column, np.float64) * 1e6).astype(np.int64)).hexdigest()
    return digest


def peak_mb() -> float:
    """Of this process alone: getrusage would give it its parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def serve(name: str, job: str, folder: Path, tiny: Path, pipe) -> None:
    """A process that holds one implementation: it answers "digests", times "run", and reports its "peak" in MB."""
    build = IMPLEMENTATIONS[name]
    build(tiny, job)  # imports and first-call costs, before anything is measured
    imported = peak_mb()
    while (order := pipe.recv()) != "end":
        if order == "digests":
            pipe.send(digests(build(folder, job)))
        elif order == "peak":
            pipe.send(peak_mb() - imported)
        else:
            cpu = time.process_time()
            build(folder, job)
            pipe.send(time.process_time() - cpu)


class Worker:
    """One implementation in a process of its own."""

    def __init__(self, name: str, job: str, folder: Path, tiny: Path) -> None:
        self.pipe, theirs = mp.get_context("spawn").Pipe()
        self.process = mp.get_context("spawn").Process(
            target=serve, args=(name, job, folder, tiny, theirs), daemon=True
        )
        self.process.start()
        theirs.close()  # so that a worker that dies is an EOFError here

    def ask(self, order: str):
        self.pipe.send(order)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()


def compare(job: str, names: list[str], folder: Path, tiny: Path) -> None:
    """Stop unless all tables are equal. In processes of their own: comparing must not count as their memory."""
    answers = {}
    for name in names:
        worker = Worker(name, job, folder, tiny)
        answers[name] = worker.ask("digests")
        worker.end()
    for name, answer in answers.items():
        differing = [c for c in COLUMNS if answer[c] != answers["ours"][c]]
        if differing:
            raise SystemExit(f"{job}: {name} and ours differ in {', '.join(differing)}; nothing was timed")


def measure(job: str, rows: int, rounds: int, folder: Path, tiny: Path) -> dict:
    names = [n for n in IN_JOB[job] if n != "loop" or rows <= MAX_LOOP_ROWS]
    compare(job, [n for n in names if n != "read_alone"], folder, tiny)
    workers = {name: Worker(name, job, folder, tiny) for name in names}
    for worker in workers.values():
        worker.ask("run")  # the file is in the page cache for everyone
    seconds = {name: [] for name in names}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds[name].append(worker.ask("run"))
    peak = {name: worker.ask("peak") for name, worker in workers.items()}
    for worker in workers.values():
        worker.end()
    middle = {name: median(times) for name, times in seconds.items()}
    result = {"job": job, "rows": rows, "frames_per_second": round(rows / middle["ours"])}
    result |= {f"{name}_ratio": round(middle[name] / middle["ours"], 2) for name in names if name != "ours"}
    result["cpu_seconds"] = {name: round(value, 4) for name, value in middle.items()}
    result["peak_mb"] = {name: round(value) for name, value in peak.items()}
    result["spread"] = {name: round((max(t) - min(t)) / median(t), 2) for name, t in seconds.items()}
    return result


def report(result: dict) -> None:
    print(f"\n{result['job']}, {result['rows']:,} rows: {result['frames_per_second']:,} frames/s")
    for name, seconds in result["cpu_seconds"].items():
        ratio = f"x{result[f'{name}_ratio']:.1f}" if name != "ours" else "x1"
        noisy = "   (noisy: spread over 20 %)" if result["spread"][name] > 0.2 else ""
        print(f"  {name:12s} {seconds:9.4f} s   {ratio:>8s}   peak {result['peak_mb'][name]:5d} MB{noisy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    os.environ.update(ONE_THREAD)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in [1000, *args.rows]:
            (Path(scratch) / str(rows)).mkdir()
            write_steps(Path(scratch) / str(rows), rows)
        for rows in args.rows:
            for job in IN_JOB:
                results.append(measure(job, rows, args.rounds, Path(scratch) / str(rows), Path(scratch) / "1000"))
                report(results[-1])
    if args.json:
        libraries = {name: version(name) for name in ("polars", "pandas", "duckdb", "numpy")}
        # The headline ratios are those of the largest table that every peer was run on.
        headline = [r for r in results if "loop_ratio" in r and r["job"] == "chunks"][-1:]
        ratios = {k: v for r in headline for k, v in r.items() if k.endswith("_ratio")}
        print(json.dumps({"benchmark": "chunks", **ratios, "results": results, "versions": libraries}))


if __name__ == "__main__":
    main()
