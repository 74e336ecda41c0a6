"""Recording: our writer beside LeRobot's, the same episodes into a LeRobot v3.0 dataset.

    python benchmarks/record.py [--episodes 2] [--steps 100] [--size 128] [--rounds 5] [--json]

`lerobot` is its writer as it comes (PNG files, then AV1); `lerobot_streaming` is the best it can do with options:
`streaming_encoding`, and the very codec, quality and preset that ours uses. `encoder` is the limit: the same pictures
through the codec, and nothing else. Before anything is timed, the rows of all three must be equal and each video must
show the pictures: PSNR of `lerobot_streaming` and ours equal within 1 dB, and above that of `lerobot`'s default.

Interleaved rounds, median. CPU seconds count threads and child processes. A frame is a row with the pictures of both
cameras.
"""

import argparse
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np

from data.episode import Episode
from data.lerobot import open_dataset, write_episodes
from data.schema import IMAGE, Component, Schema
from data.video import CRF, GOP, PIXELS, PRESET, VideoWriter

CAMERAS = ("head", "wrist")


def schema(size: int) -> Schema:
    return Schema(
        cameras=CAMERAS,
        image_size=(size, size),
        state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(9)),
        action=tuple(Component(name=f"joint_{i}.delta", unit="1") for i in range(8)),
        fps=20,
        control_mode="delta_qpos",
    )


def episode(seed: int, steps: int, size: int) -> Episode:
    """A textured table, an arm that sweeps it, a small red cube, sensor noise of two grey levels."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    table = np.stack([120 + 50 * np.sin(9 * x), 110 + 50 * np.cos(7 * y), 90 + 40 * np.sin(6 * (x + y))], -1)
    table += random.normal(0, 2, (size, size, 1))
    images = {}
    for phase, camera in enumerate(CAMERAS):
        frames = np.repeat(table[None], steps, 0)
        for t in range(steps):
            tip = 0.5 + 0.3 * np.sin(t / 20 + phase), 0.5 + 0.2 * np.cos(t / 13)
            frames[t][(abs(x - tip[0]) < 0.05) & (y < tip[1])] = 225, 225, 230
            frames[t][(abs(x - tip[0]) < 0.03) & (abs(y - tip[1] - 0.06) < 0.03)] = 220, 30, 30
        images[camera] = frames.clip(0, 255).astype(np.uint8)
    last = np.arange(steps) == steps - 1
    return Episode(
        scene="pick_cube",
        seed=seed,
        task="pick the cube up",
        policy_digest="random",
        images=images,
        state=random.normal(size=(steps, 9)).astype(np.float32),
        action=random.uniform(-1, 1, (steps, 8)).astype(np.float32),
        reward=last.astype(np.float32),
        success=last,
        terminated=last,
        truncated=np.zeros(steps, bool),
        subgoals={"lifted": np.arange(steps) > steps // 2},
        subgoals_at_reset={"lifted": False},
    )


def ours(episodes: list[Episode], size: int, out: Path) -> None:
    out.mkdir()
    write_episodes(episodes, schema(size), out)


def encoder(episodes: list[Episode], size: int, out: Path) -> None:
    for camera in CAMERAS:
        with VideoWriter(out / f"{camera}.mp4", size=(size, size), fps=20) as video:
            for e in episodes:
                video.write(e.images[camera])


def lerobot(episodes: list[Episode], size: int, out: Path, **options: object) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    first = columns(episodes[0])
    features = {k: {"dtype": str(v.dtype), "shape": v.shape[1:] or (1,), "names": None} for k, v in first.items()}
    for camera in CAMERAS:
        picture = {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
        features[IMAGE + camera] = picture
    dataset = LeRobotDataset.create("local/peer", fps=20, features=features, root=out, **options)
    for e in episodes:
        rows = columns(e)
        for t in range(len(e)):
            frame = {name: values[t] if values.ndim == 2 else values[t : t + 1] for name, values in rows.items()}
            dataset.add_frame(frame | {IMAGE + c: e.images[c][t] for c in CAMERAS} | {"task": e.task})
        dataset.save_episode()
    dataset.finalize()


def lerobot_streaming(episodes: list[Episode], size: int, out: Path) -> None:
    from lerobot.configs import RGBEncoderConfig

    codec = RGBEncoderConfig(vcodec="h264", pix_fmt=PIXELS, g=GOP, crf=CRF, preset=PRESET)
    lerobot(episodes, size, out, streaming_encoding=True, rgb_encoder=codec, encoder_threads=1)


def columns(e: Episode) -> dict[str, np.ndarray]:
    marks = {"next.success": e.success, "terminated": e.terminated, "truncated": e.truncated}
    levels = {f"subgoal.{name}": reached for name, reached in e.subgoals.items()}
    return {"observation.state": e.state, "action": e.action, "next.reward": e.reward} | marks | levels


WRITERS: dict[str, Callable] = {f.__name__: f for f in (ours, lerobot, lerobot_streaming, encoder)}


def compare(episodes: list[Episode], size: int, folder: Path) -> dict[str, float]:
    """PSNR in dB of each writer's pictures; stops unless all wrote the same rows, and ours the better pictures."""
    steps, psnr = {}, {}
    for name in ("ours", "lerobot", "lerobot_streaming"):
        WRITERS[name](episodes, size, folder / name)
        dataset = open_dataset(folder / name)
        steps[name] = dataset.steps
        errors = [
            ((dataset.decode(c, i).astype(np.float32) - e.images[c]) ** 2).mean()
            for i, e in enumerate(episodes)
            for c in CAMERAS
        ]
        psnr[name] = round(float(10 * np.log10(255**2 / np.mean(errors))), 1)
    for name, table in steps.items():
        if not table.select(steps["ours"].columns).equals(steps["ours"]):
            raise SystemExit(f"{name} wrote other rows than ours; nothing was timed")
    if abs(psnr["ours"] - psnr["lerobot_streaming"]) > 1 or psnr["ours"] < psnr["lerobot"]:
        raise SystemExit(f"the pictures differ in quality, {psnr}; nothing was timed")
    return psnr


def cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(episodes: list[Episode], size: int, rounds: int, folder: Path) -> dict:
    psnr = compare(episodes, size, folder)
    frames = sum(map(len, episodes))
    bytes_per_frame = {
        name: round(sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file()) / frames) for name in psnr
    }
    wall, spent = {name: [] for name in WRITERS}, {name: [] for name in WRITERS}
    for number in range(rounds):
        for name, write in WRITERS.items():
            out = folder / f"{name}-{number}"
            start, before = time.perf_counter(), cpu()
            write(episodes, size, out)
            wall[name].append(time.perf_counter() - start)
            spent[name].append(cpu() - before)
            shutil.rmtree(out)
    middle = {name: median(times) for name, times in spent.items()}
    result = {"frames": frames, "cameras": len(CAMERAS), "size": size}
    for name in ("lerobot", "lerobot_streaming"):
        result[f"{name}_ratio"] = round(middle[name] / middle["ours"], 1)
        result[f"{name}_wall_ratio"] = round(median(wall[name]) / median(wall["ours"]), 1)
    result["encoder_ratio"] = round(middle["encoder"] / middle["ours"], 2)
    result["frames_per_cpu_second"] = {name: round(frames / seconds) for name, seconds in middle.items()}
    result["frames_per_second"] = {name: round(frames / median(seconds)) for name, seconds in wall.items()}
    result["spread"] = {name: round((max(t) - min(t)) / median(t), 2) for name, t in spent.items()}
    return result | {"psnr_db": psnr, "bytes_per_frame": bytes_per_frame}


def report(result: dict) -> None:
    print(f"\n{result['frames']} frames of {result['cameras']} cameras, {result['size']}x{result['size']}")
    for name, rate in result["frames_per_cpu_second"].items():
        line = f"  {name:18s} {rate:6d} frames/CPU-s {result['frames_per_second'][name]:6d} frames/s"
        if name in result["psnr_db"]:
            line += f"   {result['psnr_db'][name]} dB {result['bytes_per_frame'][name]:6,} B/frame"
        if name.startswith("lerobot"):
            line += f"   ours x{result[f'{name}_ratio']}"
        print(line + ("   (noisy: spread over 20 %)" if result["spread"][name] > 0.2 else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100, help="frames per episode")
    parser.add_argument("--size", type=int, default=128, help="pixels, square")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ["SVT_LOG"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        episodes = [episode(i, args.steps, args.size) for i in range(args.episodes)]
        result = measure(episodes, args.size, args.rounds, Path(folder))
    report(result)
    if args.json:
        libraries = ("lerobot", "av", "pyarrow", "numpy")
        print(json.dumps({"benchmark": "record", **result, "versions": {n: version(n) for n in libraries}}))


if __name__ == "__main__":
    main()
