"""What is written can be read: by us, by LeRobot itself, and in both layouts alike."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import malformed
import numpy as np
import polars as pl
import pytest

from data.episode import Episode
from data.errors import BadInput
from data.lerobot import open_dataset, write_episodes
from data.lerobot_stats import color_histogram, column_stats, image_stats
from data.schema import ACTION, REWARD, STATE, Component, Schema
from data.validate import check_dataset
from data.video import decode

EPISODES = [malformed.tiny_episode(i, 8 + i) for i in range(4)]
STARTS = [0, 8, 17, 27]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return malformed.tiny_dataset(tmp_path_factory.mktemp("lerobot") / "ours")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ---------------------------------------------------------------- ours


def test_an_episode_comes_back_as_it_was(root: Path) -> None:
    dataset = open_dataset(root)
    assert dataset.schema == malformed.tiny_schema()
    for i, written in enumerate(EPISODES):
        read = dataset.read_episode(i)
        for name in ("state", "action", "reward", "success", "terminated", "truncated"):
            a, b = getattr(written, name), getattr(read, name)
            assert np.array_equal(a, b) and a.dtype == b.dtype, name
        for name, reached in written.subgoals.items():
            assert np.array_equal(reached, read.subgoals[name])
        for camera, images in written.images.items():
            assert read.images[camera].shape == images.shape and psnr(read.images[camera], images) > 38
        assert replace(read, **vars_of_arrays(written)) == written  # everything that is no array: equal


def vars_of_arrays(episode: Episode) -> dict:
    names = ("images", "state", "action", "reward", "success", "terminated", "truncated", "subgoals")
    return {name: getattr(episode, name) for name in names}


def test_steps_are_one_table_under_our_names(root: Path) -> None:
    dataset = open_dataset(root)
    steps = dataset.steps
    assert len(steps) == 38 and dataset.fps == 20
    assert steps.schema[STATE] == pl.Array(pl.Float32, 5) and steps.schema[ACTION] == pl.Array(pl.Float32, 4)
    assert steps["subgoal.lifted"].dtype == pl.Boolean and steps[REWARD].dtype == pl.Float32
    assert steps["task"].to_list() == [e.task for e in EPISODES for _ in range(len(e))]
    assert steps["frame_index"].to_list() == [t for e in EPISODES for t in range(len(e))]
    assert dataset.episodes.rows() == [(i, STARTS[i], 8 + i) for i in range(4)]
    assert dataset.rollouts["seed"].to_list() == [100, 101, 102, 103]
    assert dataset.rollouts["success"].to_list() == [True, False, True, False]  # failures are kept, and marked
    assert dataset.at_reset["subgoal.lifted"].to_list() == [False, False, False, True]


def test_a_subgoal_that_a_scene_lacks_is_false_there_and_unsaid_at_reset(tmp_path: Path) -> None:
    reach = replace(EPISODES[1], scene="reach", subgoals={}, subgoals_at_reset={})
    write_episodes([EPISODES[0], reach], malformed.tiny_schema(), tmp_path)
    check_dataset(tmp_path)
    dataset = open_dataset(tmp_path)
    assert not dataset.steps.filter(pl.col("episode_index") == 1)["subgoal.lifted"].any()
    assert dataset.at_reset["subgoal.lifted"].to_list() == [False, None]
    assert dataset.read_episode(1, images=False).subgoals == {}


def test_the_same_episodes_make_the_same_bytes_in_another_process(root: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, malformed; malformed.tiny_dataset(pathlib.Path(sys.argv[1]))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parent), "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], env=env, check=True)
    assert digests(tmp_path / "again") == digests(root) and len(digests(root)) == 9


def test_the_writer_refuses_what_is_not_of_its_schema(tmp_path: Path) -> None:
    schema = malformed.tiny_schema()
    wrong = {
        "a camera missing": replace(EPISODES[0], images={"head": EPISODES[0].images["head"]}),
        "a wider action": replace(EPISODES[0], action=np.zeros((8, 5), np.float32)),
        "a picture too few": replace(EPISODES[0], images={c: i[1:] for c, i in EPISODES[0].images.items()}),
        "no step": malformed.tiny_episode(0, 0),
    }
    for name, episode in wrong.items():
        (out := tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="episode 0"):
            write_episodes([episode], schema, out)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        write_episodes(EPISODES, schema, tmp_path)
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no episodes"):
        write_episodes([], schema, empty)


def test_a_random_frame_is_the_frame_of_the_whole_decode(root: Path) -> None:
    path = root / malformed.HEAD
    whole = decode(path, start=0, length=38, fps=20)
    for start, length in ((0, 1), (3, 4), (8, 9), (37, 1)):
        assert np.array_equal(decode(path, start=start, length=length, fps=20), whole[start : start + length])
    with pytest.raises(ValueError, match="frame 38 of 39 is missing"):
        decode(path, start=36, length=3, fps=20)


# ---------------------------------------------------------------- v2.1


@pytest.mark.parametrize("pictures", ["video", "image"])
def test_v21_and_v30_of_the_same_data_are_equal(root: Path, tmp_path: Path, pictures: str) -> None:
    new, old = open_dataset(root), open_dataset(malformed.to_v21(root, tmp_path / "v21", pictures=pictures))
    assert old.steps.select(new.steps.columns).equals(new.steps)
    assert old.schema.cameras == new.schema.cameras and old.schema.image_size == new.schema.image_size
    for episode in range(4):
        for camera in new.schema.cameras:
            assert np.array_equal(old.decode(camera, episode), new.decode(camera, episode))


def test_keys_that_other_collections_write_get_our_names(root: Path, tmp_path: Path) -> None:
    old = malformed.to_v21(root, tmp_path / "v21", pictures="image")
    stored = json.loads((old / "meta/info.json").read_text())["features"]
    assert {"observation/head", "observation/state", "actions", "reward"} <= set(stored)
    dataset = open_dataset(old)
    assert dataset.schema.cameras == ("head", "wrist")
    assert dataset.schema.state[0] == Component(name="joint_0.pos", unit="?") and dataset.schema.control_mode == "?"
    assert {STATE, ACTION, REWARD} <= set(dataset.steps.columns)
    assert dataset.rollouts is None
    with pytest.raises(BadInput, match=r"rollouts.parquet: is missing; use `steps`"):
        dataset.read_episode(0)


def test_a_sidecar_tells_what_the_format_cannot(root: Path, tmp_path: Path) -> None:
    old = malformed.to_v21(root, tmp_path / "v21")
    sidecar = {"format": 1, "schema": malformed.tiny_schema().to_json(), "subgoals": []}
    (old / "meta/flywheel.json").write_text(json.dumps(sidecar))
    assert open_dataset(old).schema == malformed.tiny_schema()


# ---------------------------------------------------------------- LeRobot's own reader and writer


@pytest.fixture(scope="module")
def lerobot_dataset() -> type:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read on import; what is missing must fail and not be fetched
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset


def test_lerobot_reads_what_we_write(root: Path, lerobot_dataset: type) -> None:
    deltas = {"action": [0.0, 0.05, 0.1], "observation.images.head": [-0.05, 0.0]}
    theirs = lerobot_dataset("local/ours", root=root, video_backend="pyav", delta_timestamps=deltas)
    ours = open_dataset(root)
    assert len(theirs) == 38 and theirs.num_episodes == 4 and theirs.fps == 20
    images = {c: [ours.decode(c, e) for e in range(4)] for c in ours.schema.cameras}
    for row in (0, 1, 7, 8, 16, 26, 27, 37):
        item = theirs[row]
        e, t = int(item["episode_index"]), int(item["frame_index"])
        assert STARTS[e] + t == row and item["task"] == EPISODES[e].task
        assert np.array_equal(item["observation.state"].numpy(), EPISODES[e].state[t])
        assert bool(item["subgoal.grasped"]) == (t >= 3) and bool(item["next.success"]) == EPISODES[e].success[t]
        following = [min(t + k, len(EPISODES[e]) - 1) for k in range(3)]
        assert np.array_equal(item["action"].numpy(), EPISODES[e].action[following])
        assert item["action_is_pad"].tolist() == [t + k >= len(EPISODES[e]) for k in range(3)]
        wrist = (item["observation.images.wrist"].permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(wrist, images["wrist"][e][t])
        before, now = (item["observation.images.head"].permute(0, 2, 3, 1) * 255).round().numpy()
        assert np.array_equal(now, images["head"][e][t]) and np.array_equal(before, images["head"][e][max(t - 1, 0)])


def test_our_statistics_are_lerobots(lerobot_dataset: type) -> None:
    from lerobot.datasets.compute_stats import get_feature_stats

    values = np.random.default_rng(0).uniform(-1, 1, (4000, 3)).astype(np.float32)
    ours, theirs = column_stats({"x": values})["x"], get_feature_stats(values, axis=0, keepdims=False)
    assert ours.keys() == theirs.keys()
    for name in ours:  # their quantiles come from a histogram, ours from the sorted rows
        np.testing.assert_allclose(ours[name], theirs[name], atol=3e-3 if name[0] == "q" else 1e-5, err_msg=name)

    pictures = np.concatenate([e.images["head"][::8] for e in EPISODES])
    ours = image_stats(sum(color_histogram(e.images["head"]) for e in EPISODES), len(pictures))
    theirs = get_feature_stats(pictures.transpose(0, 3, 1, 2), axis=(0, 2, 3), keepdims=True)
    assert ours.keys() == theirs.keys() and ours["count"] == theirs["count"].tolist()
    for name in ours.keys() - {"count"}:
        np.testing.assert_allclose(ours[name], theirs[name][0] / 255, atol=1 / 255, err_msg=name)


def test_we_read_what_lerobot_writes(tmp_path: Path, lerobot_dataset: type) -> None:
    names = ["height", "width", "channels"]
    features = {
        "observation.images.cam": {"dtype": "video", "shape": (48, 64, 3), "names": names},
        "observation.images.still": {"dtype": "image", "shape": (48, 64, 3), "names": names},
        "observation.state": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
        "action": {"dtype": "float32", "shape": (2,), "names": {"motors": ["pan", "tilt"]}},
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
        "tactile": {"dtype": "float32", "shape": (2, 3), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
    }
    theirs = lerobot_dataset.create("local/theirs", fps=10, features=features, root=tmp_path / "theirs")
    value, ramp = 0, np.mgrid[:48, :64].sum(0)[..., None] * [1, 2, 1]
    for episode in range(3):
        for _ in range(6 + episode):
            picture = (ramp + 3 * value).clip(0, 255).astype(np.uint8)
            theirs.add_frame(
                {
                    "observation.images.cam": picture,
                    "observation.images.still": picture,
                    "observation.state": np.full(3, value, np.float32),
                    "action": np.full(2, -value, np.float32),
                    "next.reward": np.array([value], np.float32),
                    "tactile": np.full((2, 3), value, np.float32),
                    "note": f"row {value}",
                    "task": f"task {episode % 2}",
                }
            )
            value += 1
        theirs.save_episode()
    theirs.finalize()
    check_dataset(tmp_path / "theirs")
    ours = open_dataset(tmp_path / "theirs")
    assert ours.schema == Schema(
        cameras=("cam", "still"),
        image_size=(48, 64),
        state=tuple(Component(name=n, unit="?") for n in "xyz"),
        action=(Component(name="pan", unit="?"), Component(name="tilt", unit="?")),
        fps=10,
        control_mode="?",
        gripper="?",
        orientation="?",
    )
    assert ours.steps[STATE].to_numpy()[:, 1].tolist() == list(range(21))
    assert ours.steps["tactile"].to_numpy().shape == (21, 2, 3)
    assert ours.steps["task"].to_list() == ["task 0"] * 6 + ["task 1"] * 7 + ["task 0"] * 8
    for episode, start, length in ours.episodes.rows():
        right = np.stack([(ramp + 3 * v).clip(0, 255) for v in range(start, start + length)])
        assert np.array_equal(ours.decode("still", episode), right)
        assert psnr(ours.decode("cam", episode), right) > 25  # AV1, 4:2:0


def test_a_state_in_parts_is_put_together(tmp_path: Path, lerobot_dataset: type) -> None:
    """LIBERO-Object's fields, as StateVLA reads them."""
    picture = {"dtype": "image", "shape": (16, 16, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.agentview_rgb": picture,
        "observation.images.eye_in_hand_rgb": picture,
        "gripper_states": {"dtype": "float32", "shape": (2,), "names": ["left", "right"]},
        "observation.joint_states": {"dtype": "float32", "shape": (7,), "names": None},
        "action": {"dtype": "float32", "shape": (7,), "names": None},
    }
    theirs = lerobot_dataset.create("local/libero", fps=20, features=features, root=tmp_path / "libero")
    for t in range(5):
        theirs.add_frame(
            {
                "observation.images.agentview_rgb": np.full((16, 16, 3), t, np.uint8),
                "observation.images.eye_in_hand_rgb": np.full((16, 16, 3), 9 - t, np.uint8),
                "gripper_states": np.float32([0.04 - t, t]),
                "observation.joint_states": np.arange(7, dtype=np.float32) + t,
                "action": np.zeros(7, np.float32),
                "task": "pick up the butter",
            }
        )
    theirs.save_episode()
    theirs.finalize()
    check_dataset(tmp_path / "libero")
    ours = open_dataset(tmp_path / "libero")
    assert ours.schema.cameras == ("agentview_rgb", "eye_in_hand_rgb")
    names = [*(f"joint_states.{i}" for i in range(7)), "gripper_states.left", "gripper_states.right"]
    assert [c.name for c in ours.schema.state] == names
    np.testing.assert_array_equal(ours.steps[STATE].to_numpy()[3], np.float32([3, 4, 5, 6, 7, 8, 9, 0.04 - 3, 3]))
    other = replace(ours.schema, state=ours.schema.state[:8])
    with pytest.raises(BadInput, match=r"dataset Y: state is \[joint_states.0"):
        other.refuse_unless_fits(ours.schema, mine="checkpoint X", others="dataset Y")
