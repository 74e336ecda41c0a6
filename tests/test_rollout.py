"""Rollouts: an episode is a function of (configuration, policy, seed), whatever happens to the workers."""

import os
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import psutil
import pytest

from data.episode import Episode
from data.errors import BadInput
from data.sim import rollout as rollout_module
from data.sim import trial
from data.sim.config import SimConfig
from data.sim.driver import device_summary
from data.sim.env import FlywheelEnv
from data.sim.execution import execution
from data.sim.policies import OraclePolicy, RandomPolicy
from data.sim.rollout import AHEAD, WorkerDied, rollout

CONFIG = SimConfig(scene="pick_cube", renderer="none", expert=True, max_steps=40)
ORACLE = OraclePolicy(noise=0.1)
SEEDS = [11, 3, 7, 5, 2]  # in no order


def assert_same(one: Episode, other: Episode) -> None:
    for field in fields(Episode):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict) and any(isinstance(value, np.ndarray) for value in a.values()):
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a), field.name
        else:
            assert np.array_equal(a, b), field.name


def assert_all_same(some: Iterator[Episode], others: list[Episode]) -> None:
    for one, other in zip(some, others, strict=True):
        assert_same(one, other)


@pytest.fixture(scope="module")
def alone() -> list[Episode]:
    """Each seed's episode from an environment that has done nothing else."""
    return [next(rollout(CONFIG, ORACLE, [seed], num_envs=1)) for seed in SEEDS]


def workers() -> list[psutil.Process]:
    """This process's simulators (its other children track resources)."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


class Indexed:
    """Chunks of 3 whose values say when they were asked for and which action of the chunk they are."""

    digest = "indexed"

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(self, observation, tasks, seeds, steps) -> np.ndarray:
        chunk = np.zeros((len(steps), 3, 8), np.float32)
        chunk[:, :, 0] = np.array(steps)[:, None] / 100
        chunk[:, :, 1] = np.arange(3) / 100
        return chunk


@pytest.mark.parametrize(
    ("policy", "steps", "backend"),
    [(ORACLE, 40, "sync"), (RandomPolicy(), 150, "sync"), (RandomPolicy(), 150, "async")],
)
def test_rows_are_those_of_a_plain_gym_loop(policy, steps: int, backend: str, monkeypatch) -> None:
    monkeypatch.setattr(trial, "MOST_ROOM", 16)  # so that rows outgrow it
    config = replace(CONFIG, max_steps=steps)
    [episode] = rollout(config, policy, [7], backend=backend)
    env = FlywheelEnv(config)
    observation, info = env.reset(seed=7)
    assert (episode.randomization, episode.task) == (info["randomization"], info["task"])
    assert episode.subgoals_at_reset == info["subgoals"]
    for t in range(len(episode)):
        np.testing.assert_array_equal(episode.state[t], observation["observation.state"])  # seen before the action
        observation, reward, terminated, truncated, info = env.step(episode.action[t])
        assert (episode.reward[t], episode.terminated[t], episode.truncated[t]) == (reward, terminated, truncated)
        assert episode.success[t] == info["success"]
        assert {name: flags[t] for name, flags in episode.subgoals.items()} == info["subgoals"]
    assert terminated or truncated
    assert (episode.scene, episode.seed, episode.policy_digest) == ("pick_cube", 7, policy.digest)
    env.close()


@pytest.mark.parametrize(("num_envs", "backend"), [(1, "sync"), (3, "sync"), (2, "async")])
def test_lanes_and_company_do_not_matter(alone, num_envs: int, backend: str) -> None:
    episodes = rollout(CONFIG, ORACLE, SEEDS, num_envs=num_envs, backend=backend, together=num_envs)
    assert_all_same(episodes, alone)


def test_killed_and_hanging_workers_do_not_matter(alone, monkeypatch) -> None:
    monkeypatch.setattr(rollout_module, "STALL_S", 8.0)
    monkeypatch.setattr(rollout_module, "DEATHS_ALLOWED", 20)  # a worker that starts slowly is killed too
    faults = deque([(10, signal.SIGKILL), (60, signal.SIGSTOP)])  # after so many steps, to every worker
    done = 0

    def disturb(steps: int) -> None:
        nonlocal done
        done += steps
        if faults and done >= faults[0][0]:
            _, fault = faults.popleft()
            for worker in workers():
                os.kill(worker.pid, fault)

    assert_all_same(rollout(CONFIG, ORACLE, SEEDS, num_envs=2, on_step=disturb), alone)
    assert not faults
    assert done > sum(map(len, alone))  # something was indeed done again
    assert not workers()


def test_an_episode_that_kills_every_worker_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(rollout_module, "DEATHS_ALLOWED", 2)

    def kill(steps: int) -> None:
        for worker in workers():
            worker.kill()

    with pytest.raises(WorkerDied, match="code -9, 2 times in pick_cube with seed 7"):
        list(rollout(CONFIG, ORACLE, [7], num_envs=2, on_step=kill))
    assert not workers()


def test_few_episodes_are_held() -> None:
    begun: list[int] = []

    class Counting(RandomPolicy):
        def reset(self, lane: int, seed: int) -> None:
            begun.append(seed)

    steps = 0

    def count(n: int) -> None:
        nonlocal steps
        steps += n

    episodes = rollout(replace(CONFIG, max_steps=5), Counting(), range(100), num_envs=2, backend="sync", on_step=count)
    assert not begun  # nothing happens before the first is asked for
    first = next(episodes)
    assert first.seed == 0
    assert len(begun) <= 2 * AHEAD
    assert steps <= 2 * AHEAD * 5
    assert steps % 5 == 0  # told in bursts, each an episode here
    episodes.close()


@pytest.mark.parametrize(("replan", "asked"), [(None, [0, 0, 0, 3, 3]), (2, [0, 0, 2, 2, 4]), (1, [0, 1, 2, 3, 4])])
def test_chunks_are_executed_until_the_next_question(replan: int | None, asked: list[int]) -> None:
    [episode] = rollout(replace(CONFIG, max_steps=5), Indexed(), [0], num_envs=1, replan=replan)
    np.testing.assert_allclose(episode.action[:, 0] * 100, asked, atol=1e-4)
    np.testing.assert_allclose(episode.action[:, 1] * 100, np.arange(5) - asked, atol=1e-4)


def test_a_chunk_is_handed_out_in_bursts() -> None:
    strategy = execution(replan=5)
    strategy.add(np.arange(8)[:, None])
    assert [strategy.next(3).ravel().tolist(), strategy.next(3).ravel().tolist()] == [[0, 1, 2], [3, 4]]
    assert strategy.wants_chunk


def test_bursts_and_single_steps_make_the_same_episode() -> None:
    """A random policy's steps in a worker, told 3 at once and one by one, and here, told 10 at once."""
    kept = [next(rollout(CONFIG, RandomPolicy(), [7], num_envs=1))]
    for replan in (3, 1):
        assert_all_same(rollout(CONFIG, RandomPolicy(), [7], backend="async", replan=replan), kept)
    assert len(kept[0]) == CONFIG.max_steps


def test_temporal_ensemble_weighs_the_oldest_most() -> None:
    strategy = execution(temporal_ensemble=0.01)
    strategy.add(np.zeros((2, 1), np.float32))
    assert strategy.next(5) == [[0]]  # one step at a time, however many are asked for
    strategy.add(np.ones((2, 1), np.float32))
    assert strategy.next() == pytest.approx(0.4975, abs=5e-5)  # e^-.01 / (1 + e^-.01)
    strategy.add(np.full((2, 1), 5, np.float32))
    assert strategy.next() == pytest.approx(1 + 4 * 0.4975, abs=5e-4)  # the first chunk is used up


def test_temporal_ensemble_of_agreeing_chunks_is_what_they_say() -> None:
    plan = np.random.default_rng(0).uniform(-1, 1, (30, 8)).astype(np.float32)
    strategy = execution(temporal_ensemble=0.01)
    for t in range(20):
        strategy.add(plan[t : t + 10])
        np.testing.assert_array_equal(strategy.next(), plan[t : t + 1])


def test_actions_are_recorded_as_executed() -> None:
    class Wild(Indexed):
        def act(self, observation, tasks, seeds, steps) -> np.ndarray:
            return np.full((len(steps), 1, 8), 7.0, np.float32)

    [wild] = rollout(replace(CONFIG, max_steps=2), Wild(), [0], num_envs=1)
    assert wild.action.max() == 1
    assert wild.action.dtype == np.float32


def test_oracle_noise_spares_the_gripper_and_is_in_the_digest() -> None:
    observation = {"expert_action": np.full((2, 8), 0.95, np.float32)}
    ask = {"tasks": ["", ""], "seeds": [1, 2], "steps": [0, 0]}
    noisy = OraclePolicy(noise=0.5).act(observation, **ask)
    assert noisy.shape == (2, 1, 8)
    assert noisy.dtype == np.float32
    assert np.all(noisy[..., 7] == np.float32(0.95))
    assert np.all(np.abs(noisy) <= 1)
    assert not np.array_equal(noisy[0], noisy[1])
    np.testing.assert_array_equal(noisy, OraclePolicy(noise=0.5).act(observation, **ask))
    np.testing.assert_array_equal(OraclePolicy().act(observation, **ask)[:, 0], observation["expert_action"])
    assert OraclePolicy(noise=0.5).digest != OraclePolicy().digest == OraclePolicy(noise=0.0).digest
    assert OraclePolicy().digest.startswith("oracle:")


def test_random_actions_follow_seed_and_step_and_fill_the_space() -> None:
    policy = RandomPolicy()
    many = policy.act({}, [""] * 500, list(range(500)), [3] * 500)
    assert many.shape == (500, 10, 8)
    np.testing.assert_array_equal(RandomPolicy(horizon=1).act({}, [""], [41], [7])[0, 0], many[41, 4])
    assert many.min() < -0.98
    assert many.max() > 0.98
    np.testing.assert_array_equal(many[41], policy.act({}, [""], [41], [3])[0])
    assert not np.array_equal(many[41], policy.act({}, [""], [41], [4])[0])
    # the simulator's own stream for this seed must not be repeated
    assert not np.allclose(policy.act({}, [""], [41], [0])[0, 0], np.random.default_rng(41).uniform(-1, 1, 8))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": [1, 2, 1]}, "seed 1 is given more than once"),
        ({"seeds": [-1]}, "seed -1 is negative"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"replan": 0}, "replan is 0"),
        ({"replan": 5, "temporal_ensemble": 0.01}, "leave replan out"),
        ({"config": replace(CONFIG, expert=False)}, "expert=True"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(wrong: dict, message: str) -> None:
    arguments = {"config": CONFIG, "policy": ORACLE, "seeds": [1], "num_envs": 1, **wrong}
    with pytest.raises(BadInput, match=message) as refusal:
        list(rollout(**arguments))
    assert len(str(refusal.value)) < 200
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.full((1, 3, 8), np.nan, np.float32), "indexed gave a NaN or infinite action in pick_cube, seed 4, step 0"),
        (np.zeros((1, 3, 7), np.float32), r"answered \(1, 3, 7\), not \(n=1, H, A=8\)"),
        (np.zeros((1, 0, 8), np.float32), r"answered \(1, 0, 8\)"),
    ],
)
def test_an_answer_that_is_no_action_is_refused(chunk: np.ndarray, message: str) -> None:
    class Broken(Indexed):
        def act(self, observation, tasks, seeds, steps) -> np.ndarray:
            return chunk

    with pytest.raises(BadInput, match=message) as refusal:
        list(rollout(CONFIG, Broken(), [4], num_envs=1))
    assert len(str(refusal.value)) < 200


def test_no_seeds_no_episodes() -> None:
    assert list(rollout(CONFIG, ORACLE, [])) == []


@pytest.mark.skipif(not device_summary().ok, reason="no Vulkan device SAPIEN accepts: python -m data.sim.driver")
def test_pictures_do_not_depend_on_the_process() -> None:
    config = replace(CONFIG, renderer="sapien", expert=False, image_size=(32, 48), max_steps=25)
    here = list(rollout(config, RandomPolicy(), [1, 2, 3], num_envs=1))
    assert here[0].images["head"].shape == (25, 32, 48, 3)
    assert here[0].images["head"].dtype == np.uint8
    assert (here[0].images["head"][0] != here[0].images["head"][7]).any()  # each row has its own
    there = rollout(config, RandomPolicy(), [3, 2, 1, *range(4, 100)], num_envs=2)
    assert_all_same((next(there) for _ in here), here[::-1])
    assert workers()
    there.close()
    assert not workers()
