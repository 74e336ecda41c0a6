"""What the cameras show. Needs a Vulkan device (`python -m data.sim.driver` brings one)."""

import hashlib
import multiprocessing

import numpy as np
import pytest

from data.schema import IMAGE
from data.sim.driver import device_summary
from data.sim.env import FlywheelEnv, SimConfig
from data.sim.randomization import Randomization

HEAD, WRIST = IMAGE + "head", IMAGE + "wrist"
EVERYTHING = Randomization(
    random_background=True,
    random_light=True,
    random_appearance=True,
    cluttered_table=True,
    random_table_height=0.03,
    camera_jitter=0.02,
)


@pytest.fixture(scope="module", autouse=True)
def device():
    found = device_summary()
    if not found.ok:
        pytest.skip(f"no Vulkan device: {found.detail}")


@pytest.fixture(scope="module")
def env():
    return FlywheelEnv(SimConfig(scene="pick_cube", expert=True))


def redness(picture) -> int:
    """How many pixels are clearly red."""
    red, green, blue = picture.astype(int).transpose(2, 0, 1)
    return int(((red > 100) & (red > green + 60) & (red > blue + 60)).sum())


def test_pictures_are_what_the_spaces_say(env):
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation[HEAD].shape == (128, 128, 3) and observation[HEAD].flags.c_contiguous
    np.testing.assert_array_equal(env.render(), observation[HEAD])


def test_the_head_camera_sees_the_cube_and_the_wrist_camera_sees_it_when_close(env):
    for seed in range(6):
        observation, info = env.reset(seed=seed)
        assert redness(observation[HEAD]) > 40, f"seed {seed}"
        while not info["subgoals"]["grasp"]:
            observation, *_, info = env.step(info["expert_action"])
        assert redness(observation[WRIST]) > 500, f"seed {seed}"


def test_a_picture_taken_before_is_not_overwritten(env):
    before, info = env.reset(seed=0)
    copy = before[HEAD].copy()
    for _ in range(3):
        after, *_, info = env.step(info["expert_action"])
    np.testing.assert_array_equal(before[HEAD], copy)
    assert (after[HEAD] != copy).any()


def test_every_knob_shows():
    scene = {"scene": "pick_cube", "image_size": (64, 64)}
    plain = FlywheelEnv(SimConfig(**scene)).reset(seed=4)[0]
    knobs = dict.fromkeys(("random_background", "random_light", "random_appearance", "cluttered_table"), True)
    for knob, value in {**knobs, "random_table_height": 0.05, "camera_jitter": 0.05}.items():
        changed = FlywheelEnv(SimConfig(**scene, randomization=Randomization(**{knob: value}))).reset(seed=4)[0]
        assert (changed[HEAD] != plain[HEAD]).mean() > 0.005, knob


def digest_of(history: list[int]) -> str:
    """Plays `history`, then seed 5; the digest of every picture and state of seed 5."""
    env = FlywheelEnv(SimConfig(scene="pick_cube", expert=True, randomization=EVERYTHING, scene_reset_interval=2))
    for seed in history:
        env.reset(seed=seed)
    observation, info = env.reset(seed=5)
    sha = hashlib.sha256()
    for _ in range(12):
        for name in sorted(observation):
            sha.update(observation[name].tobytes())
        observation, *_, info = env.step(info["expert_action"])
    return sha.hexdigest()


def test_same_seed_same_pictures_bit_for_bit_across_processes():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        ours, theirs = pool.map(digest_of, [[], [1, 2]], chunksize=1)
    assert ours == theirs == digest_of([4])
