"""Good tiny datasets, and one malformed copy of them per kind of fault. Not a test: `test_validate` runs the corpus.

The kinds that LeRobot 0.6.1 accepts without a word and trains on come first.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.episode import Episode
from data.lerobot import open_dataset, write_episodes
from data.schema import Component, Schema
from data.video import VideoWriter

ROWS = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
HEAD = "videos/observation.images.head/chunk-000/file-000.mp4"
SIZE = 64


# ---------------------------------------------------------------- good ones


def tiny_schema(cameras: tuple[str, ...] = ("head", "wrist"), size: int = SIZE) -> Schema:
    return Schema(
        cameras=cameras,
        image_size=(size, size),
        state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(5)),
        action=tuple(Component(name=f"joint_{i}.delta", unit="1") for i in range(4)),
        fps=20,
        control_mode="delta_qpos",
    )


def tiny_episode(number: int, steps: int, cameras: tuple[str, ...] = ("head", "wrist"), size: int = SIZE) -> Episode:
    """Even ones succeed at their last step; a bar in the picture stands at the row's number."""
    random = np.random.default_rng(number)
    last = np.arange(steps) == steps - 1
    won = last & (number % 2 == 0)
    return Episode(
        scene="pick_cube",
        seed=100 + number,
        task="pick the cube up" if number % 2 else "lift the cube",
        policy_digest="oracle:0123",
        randomization={"light": 0.5, "background": "wood"},
        images={name: _pictures(steps, size, 40 * i) for i, name in enumerate(cameras)},
        state=random.normal(size=(steps, 5)).astype(np.float32),
        action=random.uniform(-1, 1, (steps, 4)).astype(np.float32),
        reward=won.astype(np.float32),
        success=won,
        terminated=won,
        truncated=last & ~won,
        subgoals={"grasped": np.arange(steps) >= 3, "lifted": np.arange(steps) >= 6},
        subgoals_at_reset={"grasped": False, "lifted": number == 3},
    )


def _pictures(steps: int, size: int, tint: int) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    images = np.repeat(np.stack([x * 2 + tint, y * 2, 200 - x - y], -1)[None], steps, 0).clip(0, 255).astype(np.uint8)
    for t in range(steps):
        images[t, :, 2 * t % size : 2 * t % size + 4] = 255, 40, 40
    return images


def tiny_dataset(out: Path, cameras: tuple[str, ...] = ("head", "wrist")) -> Path:
    """Four episodes of 8, 9, 10, 11 rows."""
    out.mkdir(parents=True)
    write_episodes([tiny_episode(i, 8 + i, cameras) for i in range(4)], tiny_schema(cameras), out)
    return out


V21_NAMES = {"observation.state": "observation/state", "action": "actions", "next.reward": "reward"}


def to_v21(source: Path, out: Path, *, pictures: str = "video") -> Path:
    """The v2.1 layout of a v3.0 dataset of ours, with the keys that v2.1 collections write.

    `pictures`: "video", packets copied so that frames are equal to the bit, or "image", PNG bytes inside the parquet.
    """
    dataset, info = open_dataset(source), json.loads((source / "meta/info.json").read_text())
    columns = {key: V21_NAMES.get(key, key) for key, f in info["features"].items() if f["dtype"] != "video"}
    cameras = {
        c: f"observation/{c}" if pictures == "image" else f"observation.images.{c}" for c in dataset.schema.cameras
    }
    rows = pq.read_table(source / ROWS)
    (out / "meta").mkdir(parents=True)
    for episode, start, length in dataset.episodes.iter_rows():
        table = rows.slice(start, length).select(list(columns)).rename_columns(list(columns.values()))
        for camera, key in cameras.items():
            if pictures == "image":
                table = table.append_column(key, _png_column(dataset.decode(camera, episode)))
            else:
                video = f"videos/chunk-000/{key}/episode_{episode:06d}.mp4"
                _cut(source / HEAD.replace("head", camera), out / video, start, length)
        path = out / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
    _write_v21_meta(dataset, info, columns, cameras, pictures, out)
    return out


def _write_v21_meta(dataset: Any, info: dict, columns: dict, cameras: dict, pictures: str, out: Path) -> None:
    features = {new: info["features"][old] for old, new in columns.items()}
    features |= {key: {"dtype": pictures, "shape": [SIZE, SIZE, 3], "names": None} for key in cameras.values()}
    drop = ("data_files_size_in_mb", "video_files_size_in_mb")
    info = {k: v for k, v in info.items() if k not in drop} | {
        "codebase_version": "v2.1",
        "features": features,
        "total_chunks": 1,
        "total_videos": 0,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    (out / "meta/info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": t} for i, t in dataset.meta.tasks.items()]
    episodes = [{"episode_index": i, "tasks": [], "length": n} for i, _, n in dataset.episodes.iter_rows()]
    for name, lines in (("tasks", tasks), ("episodes", episodes)):
        (out / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _png_column(images: np.ndarray) -> pa.Array:
    from io import BytesIO

    from PIL import Image

    stored = []
    for image in images:
        Image.fromarray(image).save(buffer := BytesIO(), "PNG")
        stored.append({"bytes": buffer.getvalue(), "path": None})
    return pa.array(stored, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def _cut(source: Path, out: Path, start: int, length: int) -> None:
    """Frames start .. start+length-1 as an mp4 of their own, without encoding them again."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(source)) as old, av.open(str(out), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [p for p in old.demux(video=0) if p.size][start : start + length]
        first = packets[0].pts
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, stream
            new.mux(packet)


# ---------------------------------------------------------------- faults

Fault = Callable[[Path], None]


def info(**changes: Any) -> Fault:
    """Top-level keys of info.json; None removes one."""

    def apply(root: Path) -> None:
        path = root / "meta/info.json"
        value = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
        path.write_text(json.dumps(value))

    return apply


def feature(key: str, **changes: Any) -> Fault:
    def apply(root: Path) -> None:
        path = root / "meta/info.json"
        value = json.loads(path.read_text())
        value["features"][key] |= changes
        path.write_text(json.dumps(value))

    return apply


def without_feature(key: str, *, rows: bool) -> Fault:
    """Take a feature out of info.json and, if `rows`, out of the data as well."""

    def apply(root: Path) -> None:
        path = root / "meta/info.json"
        value = json.loads(path.read_text())
        del value["features"][key]
        path.write_text(json.dumps(value))
        if rows:
            pq.write_table((table := pq.read_table(root / ROWS)).drop_columns([key]).slice(0, len(table)), root / ROWS)

    return apply


def stats(key: str, stat: str, value: Any) -> Fault:
    def apply(root: Path) -> None:
        path = root / "meta/stats.json"
        whole = json.loads(path.read_text())
        whole[key][stat] = value
        path.write_text(json.dumps(whole))

    return apply


def column(file: str, name: str, change: Callable[[list], list | pa.Array]) -> Fault:
    """Rewrite one column of a parquet file, given and taken as Python values."""

    def apply(root: Path) -> None:
        table = pq.read_table(root / file)
        old, new = table[name], change(table[name].to_pylist())
        new = new if isinstance(new, pa.Array) else pa.array(new, old.type)
        pq.write_table(table.set_column(table.column_names.index(name), name, new), root / file)

    return apply


def one(row: int, value: Any) -> Callable[[list], list]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def component(row: int, value: float) -> Callable[[list], list]:
    return lambda values: one(row, [value, *values[row][1:]])(values)


def order(file: str, choose: Callable[[int], list[int]]) -> Fault:
    """Keep the rows of a parquet file whose numbers `choose(n)` lists, in that order."""

    def apply(root: Path) -> None:
        table = pq.read_table(root / file)
        pq.write_table(table.take(choose(len(table))), root / file)

    return apply


def drop(file: str, name: str) -> Fault:
    return lambda root: pq.write_table(pq.read_table(root / file).drop_columns([name]), root / file)


def text(file: str, content: str | bytes) -> Fault:
    return lambda root: (root / file).write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def cut(file: str, share: float) -> Fault:
    def apply(root: Path) -> None:
        data = (root / file).read_bytes()
        (root / file).write_bytes(data[: int(len(data) * share)])

    return apply


def remove(file: str) -> Fault:
    return lambda root: (root / file).unlink()


def flip(file: str, at: float) -> Fault:
    """Change one byte at this share of the file."""

    def apply(root: Path) -> None:
        data = bytearray((root / file).read_bytes())
        data[int(len(data) * at)] ^= 0x55
        (root / file).write_bytes(data)

    return apply


def link(file: str) -> Fault:
    """The file becomes a link to a copy outside the dataset."""

    def apply(root: Path) -> None:
        shutil.move(root / file, outside := root.parent / f"{root.name}-outside")
        (root / file).symlink_to(outside)

    return apply


def fifo(file: str) -> Fault:
    def apply(root: Path) -> None:
        (root / file).unlink()
        os.mkfifo(root / file)

    return apply


def video(frames: int = 38, *, fps: int = 20, size: int = SIZE, black: bool = False) -> Fault:
    """Another recording in place of the head camera's 38 frames."""

    def apply(root: Path) -> None:
        (root / HEAD).unlink()
        with VideoWriter(root / HEAD, size=(size, size), fps=fps) as writer:
            writer.write(_pictures(frames, size, 0) * (not black))

    return apply


def repeat_json_key(root: Path) -> None:
    path = root / "meta/info.json"
    path.write_text(path.read_text().replace('"fps": 20,', '"fps": 10, "fps": 20,', 1))


def reorder_tasks(root: Path) -> None:
    order("meta/tasks.parquet", lambda n: list(range(n))[::-1])(root)


def orphan(root: Path) -> None:
    shutil.copy(root / ROWS, root / "data/chunk-000/file-001.parquet")


def bomb(root: Path) -> None:
    """A small file with three million rows."""
    table = pq.read_table(root / ROWS).slice(0, 1)
    pq.write_table(pa.concat_tables([table] * 10).take([0] * 3_000_000), root / ROWS)


# kind -> (what breaks it, what the message must name)
KINDS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    # LeRobot 0.6.1 trains on these without a word
    "fps doubled": (info(fps=40), ("info.json", "fps")),
    "total_frames too small": (info(total_frames=30), ("info.json", "frames")),
    "total_episodes too small": (info(total_episodes=3), ("episodes",)),
    "picture declared 480x640": (feature("observation.images.head", shape=[480, 640, 3]), ("info.json",)),
    "both pictures declared 480x640": (
        lambda root: (
            [feature(f"observation.images.{c}", shape=[480, 640, 3])(root) for c in ("head", "wrist")] and None
        ),
        ("image_size",),
    ),
    "codebase v99": (info(codebase_version="v99.0"), ("info.json", "codebase_version")),
    "duplicate JSON key": (repeat_json_key, ("info.json", "'fps' appears twice")),
    "stats missing": (remove("meta/stats.json"), ("meta/stats.json", "missing")),
    "stats without action": (text("meta/stats.json", "{}"), ("meta/stats.json", "has no statistics")),
    "stats nan": (stats("action", "mean", [float("nan")] * 4), ("meta/stats.json", "action: mean")),
    "stats std 0": (stats("action", "std", [0.0] * 4), ("meta/stats.json", "action: std of component 0")),
    "stats wrong width": (stats("action", "mean", [0.0] * 3), ("meta/stats.json", "action: mean")),
    "stats stale": (stats("observation.state", "max", [9.0] * 5), ("meta/stats.json", "observation.state: max")),
    "image stats nan": (
        stats("observation.images.head", "std", [[[float("nan")]]] * 3),
        ("meta/stats.json", "observation.images.head: std"),
    ),
    "episode rows reversed": (order(EPISODES, lambda n: list(range(n))[::-1]), (EPISODES, "row 0 is episode 3")),
    "episode to_index off": (
        column(EPISODES, "dataset_to_index", lambda v: [x + 5 for x in v]),
        (EPISODES, "episode 0: dataset_to_index"),
    ),
    "episode length lies": (column(EPISODES, "length", one(1, 12)), (EPISODES, "lengths add up to 41")),
    "episode lengths swapped": (
        column(EPISODES, "length", lambda v: [v[1], v[0], *v[2:]]),
        (EPISODES, "episode 1: dataset_from_index"),
    ),
    "tasks reordered": (reorder_tasks, ("meta/tasks.parquet", "task_index")),
    "tasks repeated": (
        column("meta/tasks.parquet", "task", lambda v: [v[0]] * len(v)),
        ("meta/tasks.parquet", "distinct"),
    ),
    "task with control characters": (
        column("meta/tasks.parquet", "task", one(0, "lift\x1b[31m\nERROR all is lost")),
        ("control characters",),
    ),
    "action nan": (column(ROWS, "action", component(20, float("nan"))), (ROWS, "action: episode 2 frame 3")),
    "action inf": (column(ROWS, "action", component(20, float("inf"))), (ROWS, "action: episode 2 frame 3")),
    "action 1e30": (column(ROWS, "action", component(20, 1e30)), (ROWS, "action: episode 2 frame 3")),
    "state nan": (
        column(ROWS, "observation.state", component(9, float("nan"))),
        ("observation.state: episode 1 frame 1",),
    ),
    "reward nan": (column(ROWS, "next.reward", one(5, float("nan"))), (ROWS, "next.reward: episode 0 frame 5")),
    "reward inf": (column(ROWS, "next.reward", one(5, float("-inf"))), (ROWS, "next.reward: episode 0 frame 5")),
    "sub-goal is 2": (
        column(ROWS, "subgoal.lifted", lambda v: pa.array([2, *map(int, v[1:])])),
        (ROWS, "subgoal.lifted: is int64"),
    ),
    "sub-goal nowhere": (without_feature("subgoal.lifted", rows=True), ("meta/info.json", "subgoal.lifted")),
    "frame_index repeated": (column(ROWS, "frame_index", one(4, 3)), (ROWS, "frame_index: episode 0 frame 4")),
    "frame_index with a gap": (column(ROWS, "frame_index", one(7, 8)), (ROWS, "frame_index: episode 0 frame 7")),
    "time stamps swapped": (
        column(ROWS, "timestamp", lambda v: [v[1], v[0], *v[2:]]),
        (ROWS, "timestamp: episode 0 frame 0"),
    ),
    "time stamps all zero": (
        column(ROWS, "timestamp", lambda v: [0.0] * len(v)),
        (ROWS, "timestamp: episode 0 frame 1"),
    ),
    "time stamps 5 ms late": (
        column(ROWS, "timestamp", lambda v: [*v[:10], *(x + 0.005 for x in v[10:])]),
        (ROWS, "timestamp: episode 1 frame 2"),
    ),
    "time stamp nan": (column(ROWS, "timestamp", one(10, float("nan"))), (ROWS, "timestamp: episode 1 frame 2")),
    "index repeated": (column(ROWS, "index", one(4, 3)), (ROWS, "index: episode 0 frame 4")),
    "rows shuffled": (order(ROWS, lambda n: [1, 0, *range(2, n)]), (ROWS, "frame_index: episode 0 frame 0")),
    "rows repeated": (order(ROWS, lambda n: [*range(n), n - 1]), (ROWS, "has 39 rows")),
    "task_index -1": (column(ROWS, "task_index", one(20, -1)), (ROWS, "task_index: row 20 (episode 2) is -1")),
    "parquet of a crashed recording": (orphan, ("data/chunk-000/file-001.parquet",)),
    "state channel dead": (
        column(ROWS, "observation.state", lambda v: [[0.0, *x[1:]] for x in v]),
        ("meta/stats.json", "observation.state"),
    ),
    "one byte flipped in the rows": (flip(ROWS, 0.1), (ROWS,)),
    "video of another size": (video(size=32), (HEAD, "32x32")),
    "video black": (video(black=True), (HEAD, "blank")),
    "video path leads out": (info(video_path="../{video_key}/{chunk_index:03d}/{file_index:03d}.mp4"), ("video_path",)),
    "video path absolute": (info(video_path="/tmp/{video_key}/{chunk_index}/{file_index}.mp4"), ("video_path",)),
    "video path of another version": (info(video_path="videos/{video_key}/{episode_index:06d}.mp4"), ("info.json",)),
    "video path with a huge field": (info(video_path="videos/{chunk_index:09999999999d}.mp4"), ("video_path",)),
    "video is a link": (link(HEAD), (HEAD, "symbolic link")),
    "parquet is a link": (link(ROWS), (ROWS, "symbolic link")),
    "rollouts of another dataset": (
        column("meta/rollouts.parquet", "success", lambda v: [not x for x in v]),
        ("meta/rollouts.parquet", "success: episode 0"),
    ),
    "rollouts missing": (remove("meta/rollouts.parquet"), ("meta/rollouts.parquet", "missing")),
    "ends in mid-episode": (column(ROWS, "terminated", one(2, True)), (ROWS, "episode 0 frame 2")),
    "sidecar of another robot": (
        lambda root: text(
            "meta/flywheel.json", (root / "meta/flywheel.json").read_text().replace('"fps": 20', '"fps": 25')
        )(root),
        ("meta/flywheel.json", "fps"),
    ),
    "sidecar of a later version": (
        lambda root: text(
            "meta/flywheel.json", (root / "meta/flywheel.json").read_text().replace('"format": 1', '"format": 9')
        )(root),
        ("meta/flywheel.json", "format"),
    ),
    # these it refuses, without naming file, column and episode, or by asking the Hub
    "info missing": (remove("meta/info.json"), ("meta/info.json", "missing")),
    "info empty": (text("meta/info.json", ""), ("meta/info.json", "empty")),
    "info truncated": (cut("meta/info.json", 0.5), ("meta/info.json", "JSON")),
    "info a list": (text("meta/info.json", "[]"), ("meta/info.json",)),
    "info nested 200k deep": (text("meta/info.json", "[" * 200_000), ("meta/info.json",)),
    "info without fps": (info(fps=None), ("meta/info.json", "fps")),
    "info without features": (info(features=None), ("meta/info.json", "features")),
    "fps 0": (info(fps=0), ("meta/info.json", "fps")),
    "fps nan": (info(fps=float("nan")), ("meta/info.json", "NaN")),
    "fps a string": (info(fps="20"), ("meta/info.json", "fps")),
    "action declared 9 wide": (feature("action", shape=[9]), ("action",)),
    "action declared 1e9 wide": (feature("action", shape=[10**9]), ("meta/info.json", "action")),
    "action declared -7 wide": (feature("action", shape=[-7]), ("meta/info.json", "action")),
    "action declared int64": (feature("action", dtype="int64"), (ROWS, "action")),
    "action declared complex": (feature("action", dtype="complex64"), ("meta/info.json", "action.dtype")),
    "v3.0 that says v2.1": (info(codebase_version="v2.1"), ("meta/episodes.jsonl", "missing")),
    "tasks missing": (remove("meta/tasks.parquet"), ("meta/tasks.parquet", "missing")),
    "episodes missing": (remove(EPISODES), (EPISODES, "missing")),
    "episodes truncated": (cut(EPISODES, 0.5), (EPISODES, "parquet")),
    "episode row dropped": (order(EPISODES, lambda n: [*range(n - 1)]), (EPISODES, "lists 3 episodes")),
    "rows missing": (remove(ROWS), (ROWS, "missing")),
    "rows truncated": (cut(ROWS, 0.6), (ROWS, "parquet")),
    "rows empty": (text(ROWS, ""), (ROWS, "empty")),
    "rows are text": (text(ROWS, "not parquet"), (ROWS, "parquet")),
    "rows dropped": (order(ROWS, lambda n: [*range(4), *range(6, n)]), (ROWS, "has 36 rows")),
    "three million rows": (bomb, (ROWS, "has 3000000 rows")),
    "action column missing": (drop(ROWS, "action"), (ROWS, "'action' is missing")),
    "sub-goal column missing": (drop(ROWS, "subgoal.lifted"), (ROWS, "'subgoal.lifted' is missing")),
    "action null": (column(ROWS, "action", one(3, None)), (ROWS, "column 'action'")),
    "action component null": (
        column(ROWS, "action", lambda v: pa.array(component(3, None)(v), pa.list_(pa.float32()))),
        (ROWS, "action"),
    ),
    "action ragged": (
        column(ROWS, "action", lambda v: pa.array(one(3, [0.0])(v), pa.list_(pa.float32()))),
        (ROWS, "action: row 3 has 1 values"),
    ),
    "action 5 wide": (
        column(ROWS, "action", lambda v: pa.array([[*x, 0.0] for x in v], pa.list_(pa.float32(), 5))),
        (ROWS, "action: row 0 has 5 values"),
    ),
    "action text": (column(ROWS, "action", lambda v: pa.array([str(x) for x in v])), (ROWS, "action")),
    "reward text": (column(ROWS, "next.reward", lambda v: pa.array(list(map(str, v)))), (ROWS, "next.reward")),
    "task_index 99": (column(ROWS, "task_index", one(20, 99)), (ROWS, "task_index: row 20 (episode 2) is 99")),
    "video missing": (remove(HEAD), (HEAD, "missing")),
    "video empty": (text(HEAD, ""), (HEAD, "empty")),
    "video truncated": (cut(HEAD, 0.7), (HEAD, "observation.images.head")),
    "video is text": (text(HEAD, "no mp4 at all " * 100), (HEAD, "observation.images.head")),
    "video is a playlist": (text(HEAD, "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"), (HEAD,)),
    "video is a pipe": (fifo(HEAD), (HEAD, "regular file")),
    "video too short": (video(30), (HEAD, "episode 3 needs 38 frames")),
    "video at another rate": (video(fps=30), (HEAD, "30 fps")),
    "video begins elsewhere": (
        column(EPISODES, "videos/observation.images.head/from_timestamp", one(1, 0.05)),
        (HEAD, "episode 1 begins at frame 1"),
    ),
    "video begins between frames": (
        column(EPISODES, "videos/observation.images.head/from_timestamp", one(1, 0.421)),
        (EPISODES, "episode 1", "from_timestamp"),
    ),
}

V21_DATA = "data/chunk-000/episode_000002.parquet"
V21_HEAD = "videos/chunk-000/observation.images.head/episode_000002.mp4"


def v21_video(root: Path) -> None:
    shutil.copy(root / V21_HEAD.replace("02.mp4", "03.mp4"), root / V21_HEAD)


V21_KINDS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "episodes missing": (remove("meta/episodes.jsonl"), ("meta/episodes.jsonl", "missing")),
    "episodes truncated": (cut("meta/episodes.jsonl", 0.9), ("meta/episodes.jsonl", "JSON")),
    "tasks missing": (remove("meta/tasks.jsonl"), ("meta/tasks.jsonl", "missing")),
    "rows missing": (remove(V21_DATA), (V21_DATA, "missing")),
    "rows of another length": (order(V21_DATA, lambda n: [*range(n - 1)]), (V21_DATA, "has 9 rows")),
    "action nan": (column(V21_DATA, "actions", component(3, float("nan"))), (V21_DATA, "action: episode 2 frame 3")),
    "action missing": (drop(V21_DATA, "actions"), (V21_DATA, "'actions' is missing")),
    "frame_index repeated": (column(V21_DATA, "frame_index", one(4, 3)), (V21_DATA, "episode 2 frame 4")),
    "video of another episode": (v21_video, (V21_HEAD, "episode 2 has 10 rows")),
    "video missing": (remove(V21_HEAD), (V21_HEAD, "missing")),
    "fps halved": (info(fps=10), ("timestamp",)),
}
