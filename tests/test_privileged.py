"""Where the bodies of a recorded episode were: found again by executing it again."""

from dataclasses import replace

import numpy as np
import pytest

from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv
from data.sim.policies import OraclePolicy
from data.sim.privileged import body_positions
from data.sim.rollout import rollout

CONFIG = SimConfig(scene="pick_cube", renderer="none", expert=True, control_mode="delta_ee_pose")


@pytest.fixture(scope="module")
def episode():
    return next(rollout(CONFIG, OraclePolicy(noise=0.1), [3], num_envs=1))


def test_positions_are_those_of_the_episode_before_each_action(episode):
    found = body_positions(CONFIG, episode)["cube"]
    env = FlywheelEnv(CONFIG)
    env.reset(seed=3)
    expected = []
    for action in episode.action:
        expected.append(env.positions()["cube"])
        env.step(action)
    assert np.array_equal(found, np.stack(expected))
    assert found[-1, 2] - found[0, 2] > 0.03  # it was lifted


def test_an_episode_that_comes_out_otherwise_is_refused(episode):
    other = replace(episode, action=-episode.action)
    with pytest.raises(BadInput, match="seed 3 of pick_cube: step 1 is another one now"):
        body_positions(CONFIG, other)
