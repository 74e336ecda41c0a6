"""The frame store holds what the dataset decodes to, row for row, and refuses what does not add up."""

import json
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data.episode import Episode
from data.errors import BadInput
from data.frames import build_frames, open_frames
from data.lerobot import open_dataset, write_episodes
from data.schema import ACTION, STATE, Component, Schema

SCHEMA = Schema(
    cameras=("head", "wrist"),
    image_size=(64, 64),
    state=tuple(Component(name=f"joint_{i}.pos", unit="rad") for i in range(3)),
    action=tuple(Component(name=f"joint_{i}.delta", unit="rad") for i in range(2)),
    fps=20,
    control_mode="delta_qpos",
)


def episode(seed: int, length: int) -> Episode:
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (2, 8, 8, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)  # patches of 8x8 pixels
    return Episode(
        scene="toy",
        seed=seed,
        task=f"task {seed % 2}",
        policy_digest="random",
        images={c: np.repeat(still[i : i + 1], length, axis=0) for i, c in enumerate(SCHEMA.cameras)},
        state=rng.normal(size=(length, 3)).astype(np.float32),
        action=rng.normal(size=(length, 2)).astype(np.float32),
        reward=np.zeros(length, np.float32),
        success=np.zeros(length, bool),
        terminated=np.zeros(length, bool),
        truncated=np.arange(length) == length - 1,
        subgoals={"reached": np.zeros(length, bool)},
        subgoals_at_reset={"reached": False},
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A real LeRobot dataset of three short episodes."""
    folder = tmp_path_factory.mktemp("dataset")
    write_episodes([episode(seed, length) for seed, length in enumerate((4, 7, 3))], SCHEMA, folder)
    return open_dataset(folder)


@pytest.fixture
def store(dataset, tmp_path: Path) -> Path:
    build_frames(dataset, tmp_path)
    return tmp_path


def test_rows_are_the_datasets_rows(dataset, store: Path):
    frames = open_frames(store)
    assert frames.schema == dataset.schema
    assert len(frames) == 14
    for camera in SCHEMA.cameras:
        decoded = np.concatenate([dataset.decode(camera, i) for i in range(3)])
        np.testing.assert_array_equal(frames.images[camera], decoded)
    np.testing.assert_array_equal(frames.state, dataset.steps[STATE].to_numpy())
    np.testing.assert_array_equal(frames.action, dataset.steps[ACTION].to_numpy())
    assert frames.rows["episode_index"].to_list() == [0] * 4 + [1] * 7 + [2] * 3
    assert frames.rows["task"].to_list() == ["task 0"] * 4 + ["task 1"] * 7 + ["task 0"] * 3


def test_the_same_dataset_makes_the_same_bytes(dataset, store: Path, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    build_frames(dataset, again)
    names = sorted(p.name for p in store.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert all((store / n).read_bytes() == (again / n).read_bytes() for n in names)


def test_pictures_are_mapped_and_cannot_be_written(store: Path):
    frames = open_frames(store)
    with pytest.raises(ValueError, match="read-only"):
        frames.images["head"][0] = 0


def test_scaling_keeps_the_shape_of_things(dataset, tmp_path: Path):
    build_frames(dataset, tmp_path, size=(32, 64))
    frames = open_frames(tmp_path)
    assert frames.schema == replace(SCHEMA, image_size=(32, 64))
    picture = frames.images["head"][0]
    assert picture.shape == (32, 64, 3)
    assert (picture[:, :16] == 0).all() and (picture[:, -16:] == 0).all()  # bars: 64x64 became 32x32
    middles = dataset.decode("head", 0)[0, 3::8, 3::8].astype(int)  # of the patches, away from their edges
    assert np.abs(picture[1::4, 17:48:4] - middles).max() <= 6


# ------------------------------------------------------------------------------------------------ refusals


def damage_array(folder: Path) -> str:
    data = (folder / "frames_wrist.npy").read_bytes()
    (folder / "frames_wrist.npy").write_bytes(data[:-1000])
    return "frames_wrist.npy: missing or damaged"


def remove_array(folder: Path) -> str:
    (folder / "state.npy").unlink()
    return "state.npy: missing or damaged"


def another_shape(folder: Path) -> str:
    np.save(folder / "action.npy", np.zeros((14, 5), np.float32))
    return r"action.npy: holds float32 \(14, 5\), not float32 \(14, 2\)"


def another_type(folder: Path) -> str:
    np.save(folder / "frames_head.npy", np.zeros((14, 64, 64, 3), np.float32))
    return "frames_head.npy: holds float32"


def pickled(folder: Path) -> str:
    np.save(folder / "state.npy", np.array([print] * 14, object), allow_pickle=True)
    return "state.npy: missing or damaged"


def fewer_rows(folder: Path) -> str:
    pl.read_parquet(folder / "rows.parquet")[:-1].write_parquet(folder / "rows.parquet")
    return "frames_head.npy: holds uint8"


def another_format(folder: Path) -> str:
    (folder / "frames.json").write_text(json.dumps({"format": 99}))
    return "format is 99"


def no_json(folder: Path) -> str:
    (folder / "frames.json").write_text("{")
    return "no frame store"


@pytest.mark.parametrize(
    "damage",
    [damage_array, remove_array, another_shape, another_type, pickled, fewer_rows, another_format, no_json],
)
def test_a_damaged_store_is_refused_in_one_line(store: Path, damage):
    message = damage(store)
    with pytest.raises(BadInput, match=message) as caught:
        open_frames(store)
    assert "\n" not in str(caught.value)


@dataclass
class Altered:
    """A dataset with something else about it."""

    dataset: object
    drop: str | None = None
    short: bool = False

    def __getattr__(self, name: str):
        return getattr(self.dataset, name)

    @property
    def steps(self) -> pl.DataFrame:
        return self.dataset.steps.drop(self.drop) if self.drop else self.dataset.steps

    def decode(self, camera: str, episode: int) -> np.ndarray:
        return self.dataset.decode(camera, episode)[: -1 if self.short else None]


def test_a_dataset_that_training_cannot_use_is_refused(dataset, tmp_path: Path):
    with pytest.raises(BadInput, match=r"observation\.state: column is missing"):
        build_frames(Altered(dataset, drop=STATE), tmp_path)
    with pytest.raises(BadInput, match="head: episode 0 has 3 pictures and 4 rows"):
        build_frames(Altered(dataset, short=True), tmp_path)


def test_more_stores_than_files_may_be_open(store: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 10, hard))
    opened = []
    try:
        for _ in range(10):  # four maps each
            opened.append(open_frames(store))
    finally:
        opened.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
