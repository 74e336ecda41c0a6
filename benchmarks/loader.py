"""Training samples per second: our batches beside LeRobotDataset with delta_timestamps, on the same dataset.

    python benchmarks/loader.py [--episodes 10] [--length 60] [--size 256] [--batch 32] [--rounds 5] [--json]

The dataset is written by LeRobot's own writer with its default encoder (AV1, a key frame every 2 pictures). A sample is
a chunk transition: two cameras at t and at t+H (4 pictures), both states, H actions with their padding. LeRobot reads
item by item with default_collate, as its DataLoader does with num_workers=0, returns uint8 as ours does, and decodes by
torchcodec. Values must be equal before anything is timed. CPU seconds, median of interleaved rounds, because wall time
on a busy machine says little; `spread` is (max - min) / median. Beside it: what a plain memory copy reaches.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SVT_LOG", "1")  # errors only

import numpy as np
from PIL import Image

from data.chunks import ChunkConfig, write_chunks
from data.frames import build_frames
from data.lerobot import open_dataset
from data.loader import ChunkSource, batches, chosen
from data.schema import ACTION, IMAGE, REWARD, STATE
from data.subgoals import RisingEdge

H, FPS, CAMERAS, SUBGOAL = 10, 20, ("head", "wrist"), "subgoal.grasped"
TOLERANCE = 8  # of 255: mean error allowed between two decoders' pictures
BATCHES = 20  # of ours per round; of LeRobot's, one is enough


def lend_ffmpeg() -> None:
    """torchcodec brings no FFmpeg. Where the system has none, start again with the one inside PyAV's wheel."""
    lent = os.environ.pop("LENT_FFMPEG", None)
    try:
        import torchcodec  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        if lent:
            raise
    else:
        if lent:
            shutil.rmtree(lent)  # loaded by now
        return
    import av

    lent = tempfile.mkdtemp(prefix="ffmpeg-")
    for library in (Path(av.__file__).parents[1] / "av.libs").iterdir():
        plain = re.sub(r"^(lib\w+)-\w+\.so\.(\d+).*", r"\1.so.\2", library.name)  # libavutil-1f2e3d.so.59.39.100
        for name in {library.name, plain}:
            (Path(lent) / name).symlink_to(library)
    path = os.pathsep.join(filter(None, [lent, os.environ.get("LD_LIBRARY_PATH")]))
    environment = os.environ | {"LENT_FFMPEG": lent, "LD_LIBRARY_PATH": path}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def write_dataset(root: Path, *, episodes: int, length: int, size: int) -> None:
    """Moving textured pictures and random vectors, recorded as a LeRobot user would."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    vector = {"dtype": "float32", "names": None}
    mark = {"dtype": "bool", "shape": (1,), "names": None}
    features = {
        **{IMAGE + c: {"dtype": "video", "shape": (size, size, 3), "names": ["height", "width", "c"]} for c in CAMERAS},
        STATE: vector | {"shape": (9,)},
        ACTION: vector | {"shape": (8,)},
        REWARD: vector | {"shape": (1,)},
        "terminated": mark,
        "truncated": mark,
        SUBGOAL: mark,
    }
    dataset = LeRobotDataset.create("bench/loader", FPS, features, root=root, use_videos=True, streaming_encoding=True)
    rng = np.random.default_rng(0)
    for _ in range(episodes):
        textures = [_texture(rng, size) for _ in CAMERAS]
        for t in range(length):
            pictures = {
                IMAGE + c: np.roll(x, (2 * t, 3 * t), axis=(0, 1)) for c, x in zip(CAMERAS, textures, strict=True)
            }
            dataset.add_frame(
                pictures
                | {
                    STATE: rng.normal(size=9).astype(np.float32),
                    ACTION: rng.normal(size=8).astype(np.float32),
                    REWARD: np.zeros(1, np.float32),
                    "terminated": np.array([t == length - 1]),
                    "truncated": np.array([False]),
                    SUBGOAL: np.array([t >= length // 2]),
                    "task": "pick up the cube",
                }
            )
        dataset.save_episode()
    dataset.finalize()


def _texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """A soft pattern that AV1 stores in 2 KB per picture: footage with a camera's noise is dearer to decode."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def open_theirs(root: Path):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    both, steps = [0.0, H / FPS], [k / FPS for k in range(H)]
    deltas = {IMAGE + c: both for c in CAMERAS} | {STATE: both, ACTION: steps, SUBGOAL: steps}
    return LeRobotDataset(
        "bench/loader", root=root, delta_timestamps=deltas, return_uint8=True, video_backend="torchcodec"
    )


def open_ours(root: Path, folder: Path) -> tuple[ChunkSource, float]:
    """The source, and the seconds it took to decode every picture into the frame store."""
    dataset = open_dataset(root)
    folder.mkdir()
    began = time.process_time()
    build_frames(dataset, folder)
    seconds = time.process_time() - began
    at_reset = dataset.at_reset.with_columns(dataset.at_reset[SUBGOAL].fill_null(False))
    config = ChunkConfig(horizon=H)
    write_chunks(dataset.steps.lazy(), at_reset, folder / "chunks.parquet", config=config, labeler=RisingEdge())
    return ChunkSource.open([folder], [folder / "chunks.parquet"]), seconds


def compare(theirs, source: ChunkSource, count: int) -> float:
    """Stop unless `count` random samples are equal; the mean difference of the pictures, in 255ths."""
    index = chosen(len(source), count, 1, 0)
    batch, errors = source.gather(index, source.buffers(count, with_next=True)), []
    for row, i in enumerate(index.tolist()):
        item = theirs[i]
        pairs = {
            STATE: (batch[STATE][row], item[STATE][0]),
            "next state": (batch["next." + STATE][row], item[STATE][1]),
            ACTION: (batch[ACTION][row], item[ACTION]),
            "action_is_pad": (batch["action_is_pad"][row], item["action_is_pad"]),
        }
        for name, (ours, other) in pairs.items():
            if not np.array_equal(ours, other.numpy()):
                raise SystemExit(f"sample {i}: {name} differs; nothing was timed")
        for camera in CAMERAS:
            seen = np.stack([batch[p + IMAGE + camera][row] for p in ("", "next.")]).transpose(0, 3, 1, 2)
            errors.append(np.abs(seen.astype(int) - item[IMAGE + camera].numpy()).mean())
    if max(errors) > TOLERANCE:
        raise SystemExit(f"pictures differ by {max(errors):.1f} of 255; nothing was timed")
    return float(np.mean(errors))


def read_theirs(theirs, n: int, size: int, step: int) -> int:
    from torch.utils.data import default_collate

    default_collate([theirs[i] for i in chosen(n, size, 0, step).tolist()])
    return size


def copy_rate() -> float:
    """GB/s of a plain copy of 256 MB, the most any loader on one thread could do."""
    source, target = np.ones(1 << 28, np.uint8), np.ones(1 << 28, np.uint8)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        np.copyto(target, source)
        seconds.append(time.process_time() - began)
    return source.nbytes / 1e9 / min(seconds)


def measure(theirs, source: ChunkSource, size: int, rounds: int) -> dict:
    """Per-sample CPU and wall seconds of both, round by round in turn."""
    ours = batches(source, size, seed=0, with_next=True)
    cpu: dict[str, list[float]] = {"ours": [], "lerobot": []}
    wall: dict[str, list[float]] = {"ours": [], "lerobot": []}

    def timed(name: str, work) -> None:
        c, w = time.process_time(), time.perf_counter()
        samples = work()
        cpu[name].append((time.process_time() - c) / samples)
        wall[name].append((time.perf_counter() - w) / samples)

    def read_ours() -> int:
        for _ in range(BATCHES):
            next(ours)
        return BATCHES * size

    for image in source.members[0].images.values():
        image.max()  # every page is in memory: the disk is not what is measured
    read_ours()
    read_theirs(theirs, len(source), size, 0)
    for step in range(1, rounds + 1):
        timed("ours", read_ours)
        timed("lerobot", lambda step=step: read_theirs(theirs, len(source), size, step))
    ours.close()
    middle = {name: median(values) for name, values in cpu.items()}
    picture = 4 * int(np.prod(source.schema.image_size)) * 3
    return {
        "lerobot_ratio": round(middle["lerobot"] / middle["ours"], 1),
        "lerobot_wall_ratio": round(median(wall["lerobot"]) / median(wall["ours"]), 1),
        "samples_per_cpu_second": {name: round(1 / value) for name, value in middle.items()},
        "ours_gb_per_s": round(picture / middle["ours"] / 1e9, 1),
        "memcpy_gb_per_s": round(copy_rate(), 1),
        "spread": {name: round((max(v) - min(v)) / median(v), 2) for name, v in cpu.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--length", type=int, default=60, help="steps per episode")
    parser.add_argument("--size", type=int, default=256, help="height and width of the pictures, pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    lend_ffmpeg()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "dataset"
        write_dataset(root, episodes=args.episodes, length=args.length, size=args.size)
        theirs = open_theirs(root)
        source, decode_seconds = open_ours(root, Path(scratch) / "frames")
        difference = compare(theirs, source, 24)
        result = measure(theirs, source, args.batch, args.rounds)
    pictures = args.episodes * args.length * len(CAMERAS)
    rates = result["samples_per_cpu_second"]
    print(f"equal values; pictures differ by {difference:.2f} of 255 on average (two decoders)")
    print(f"ours     {rates['ours']:8,} samples per CPU second, {result['ours_gb_per_s']} GB/s of pictures")
    print(f"lerobot  {rates['lerobot']:8,} samples per CPU second")
    print(f"ratio    x{result['lerobot_ratio']} in CPU time, x{result['lerobot_wall_ratio']} in wall time")
    print(f"limit    a plain copy does {result['memcpy_gb_per_s']} GB/s on this machine now")
    print(f"once     {pictures / decode_seconds:,.0f} pictures per CPU second decoded into the frame store")
    if max(result["spread"].values()) > 0.2:
        print(f"noisy    spread of the rounds: {result['spread']}")
    if args.json:
        libraries = {name: version(name) for name in ("lerobot", "torchcodec", "torch", "numpy")}
        sizes = {name: getattr(args, name) for name in ("episodes", "length", "size", "batch", "rounds")}
        print(json.dumps({"benchmark": "loader", **result, "sizes": sizes, "versions": libraries}))


if __name__ == "__main__":
    main()
