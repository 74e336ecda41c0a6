"""Scores, comparisons, the self-test and the pictures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from data.episode import Episode
from data.errors import BadInput
from data.protocol import EvalProtocol
from data.sim.config import SimConfig
from data.sim.driver import device_summary
from data.sim.env import FlywheelEnv
from data.sim.policies import RandomPolicy
from models.evaluation import (
    EvaluationError,
    Score,
    action_error,
    evaluate,
    paired_comparison,
    plot,
    score,
    self_test,
    video_grid,
    wilson,
)

CONFIG = SimConfig(scene="pick_cube", renderer="none")
SEEDS = range(900, 906)


def episode(seed: int, won: bool, length: int, *, policy: str = "p", size: tuple[int, int] = (32, 32)) -> Episode:
    """Pictures whose brightness is the step."""
    last = np.arange(length) == length - 1
    pictures = np.broadcast_to(np.arange(length, dtype=np.uint8)[:, None, None, None], (length, *size, 3))
    return Episode(
        scene="pick_cube",
        seed=seed,
        task="pick up the red cube",
        policy_digest=policy,
        images={"head": pictures, "wrist": pictures},
        state=np.zeros((length, 15), np.float32),
        action=np.zeros((length, 8), np.float32),
        reward=(last & won).astype(np.float32),
        success=last & won,
        terminated=last & won,
        truncated=last & (not won),
        subgoals={"reach": np.ones(length, bool), "grasp": last & won},
        subgoals_at_reset={"reach": False, "grasp": False},
    )


def scored(outcomes: list[bool], **kwargs) -> Score:
    episodes = [episode(i, won, 10 + i, **kwargs) for i, won in enumerate(outcomes)]
    return score(iter(episodes), EvalProtocol.of(CONFIG, range(len(outcomes))))


def test_wilson_is_scipys() -> None:
    for successes, n in [(0, 50), (1, 50), (30, 50), (50, 50), (3, 4)]:
        peer = binomtest(successes, n).proportion_ci(method="wilson")
        assert wilson(successes, n) == pytest.approx((peer.low, peer.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 200):  # exactly, or an error bar gets a negative length
        assert wilson(0, n)[0] == 0.0 and wilson(n, n)[1] == 1.0


def test_a_score_counts() -> None:
    result = scored([True, False, True, True])
    assert (result.episodes, result.successes, result.success_rate) == (4, 3, 0.75)
    assert result.interval == wilson(3, 4)
    assert result.subgoals == {"reach": 1.0, "grasp": 0.75}
    assert result.length["mean"] == 11.5
    assert result.length["p50"] == 11.5
    assert (result.seeds, result.succeeded) == ((0, 1, 2, 3), (True, False, True, True))
    assert result.protocol == EvalProtocol.of(CONFIG, range(4)).hash
    assert result.policy == "p"
    assert Score.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        ([episode(0, True, 3)], "1 episodes are not those of the protocol's 2 seeds"),
        ([episode(1, True, 3), episode(0, True, 3)], "in order"),
        ([episode(0, True, 3), replace(episode(1, True, 3), scene="reach")], "episode of reach"),
        ([episode(0, True, 3), episode(1, True, 3, policy="q")], r"2 policies \(p, q\)"),
    ],
)
def test_what_makes_no_score_is_refused(episodes: list[Episode], message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as refusal:
        score(episodes, EvalProtocol.of(CONFIG, [0, 1]))
    assert isinstance(refusal.value, BadInput)
    assert len(str(refusal.value)) < 200


def test_paired_comparison_is_mcnemars_exact_test() -> None:
    a = scored([True] * 2 + [False] * 9 + [True] * 5 + [False] * 4)
    b = scored([False] * 2 + [True] * 9 + [True] * 5 + [False] * 4)
    result = paired_comparison(a, b)
    assert (result.both, result.only_a, result.only_b, result.neither) == (5, 2, 9, 4)
    assert result.difference == pytest.approx(7 / 20)
    assert result.p_value == pytest.approx(2 * sum(math.comb(11, k) for k in range(3)) / 2**11)  # 0.0654
    assert paired_comparison(a, a).p_value == 1.0
    with pytest.raises(EvaluationError, match="evaluate both under one"):
        paired_comparison(a, scored([True] * 3))


class Knowing:
    """Predicts chunks of the recorded actions, off by a known error in component 2."""

    digest = "knowing"

    def __init__(self, actions: np.ndarray) -> None:
        self.actions = actions

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(self, observation, tasks, seeds, steps) -> np.ndarray:
        assert observation["observation.state"].shape == (1, 15)
        assert observation["observation.images.head"][0].max() == steps[0]  # this step's picture, not another's
        chunk = np.zeros((1, 4, 8), np.float32)
        left = self.actions[steps[0] : steps[0] + 4]
        chunk[0, : len(left)] = left
        chunk[..., 2] += 0.25
        return chunk


@pytest.mark.parametrize("how", [{}, {"replan": 3}, {"temporal_ensemble": 0.01}])
def test_action_error_is_that_of_what_would_be_executed(how: dict) -> None:
    actions = np.random.default_rng(0).integers(-4, 4, (10, 8)).astype(np.float32) / 4
    held_out = replace(episode(0, True, 10), action=actions)
    error = action_error(Knowing(actions), [held_out], **how)
    np.testing.assert_allclose(error.absolute, [0, 0, 0.25, 0, 0, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(error.squared, [0, 0, 0.0625, 0, 0, 0, 0, 0], atol=1e-7)
    with pytest.raises(EvaluationError, match="no held-out episodes"):
        action_error(Knowing(actions), [])


class Drawing(Knowing):
    """Off by what it draws, a function of the seed."""

    def __init__(self, actions: np.ndarray) -> None:
        super().__init__(actions)
        self.drawn: dict[int, float] = {}

    def act(self, observation, tasks, seeds, steps) -> np.ndarray:
        off = self.drawn.setdefault(seeds[0], np.random.default_rng(seeds[0]).normal())
        return super().act(observation, tasks, seeds, steps) + np.float32(off)


def test_action_error_of_a_policy_that_draws_is_the_mean_over_its_samples() -> None:
    held_out = episode(7, True, 10)
    policy = Drawing(held_out.action)
    error = action_error(policy, [held_out], samples=5)
    drawn = np.array(list(policy.drawn.values()))
    assert len(drawn) == 5 and next(iter(policy.drawn)) == held_out.seed
    assert error.absolute[0] == pytest.approx(np.abs(drawn).mean(), abs=1e-6)
    assert error.squared[0] == pytest.approx((drawn**2).mean(), abs=1e-6)
    again = action_error(Drawing(held_out.action), [held_out], samples=5)
    assert np.array_equal(again.squared, error.squared)


def test_self_test_and_evaluation_of_the_real_simulator(tmp_path: Path) -> None:
    sees = device_summary().ok
    config = replace(CONFIG, renderer="sapien", image_size=(32, 32)) if sees else CONFIG
    protocol = EvalProtocol.of(config, SEEDS[:3], replan=5)
    result = self_test(config, protocol, range(800, 805), num_envs=2, backend="sync")
    assert (result.episodes, result.successes, result.success_rate) == (5, 5, 1.0)
    video = tmp_path / "grid.mp4" if sees else None
    chance = evaluate(config, RandomPolicy(), protocol, num_envs=1, video=video)
    assert (chance.successes, chance.policy, chance.seeds) == (0, "random", tuple(SEEDS[:3]))
    assert not sees or len(frames_of(video)) == max(chance.lengths) + 20


def test_self_test_refuses_an_expert_that_fails() -> None:
    short = replace(CONFIG, max_steps=2)
    with pytest.raises(EvaluationError, match="expert succeeds in 0 of 3 episodes of pick_cube, fewer than 95%"):
        self_test(short, EvalProtocol.of(short, SEEDS), range(3), num_envs=1)


def test_self_test_notices_a_simulator_that_is_not_a_function_of_the_seed(monkeypatch) -> None:
    plain, calls = FlywheelEnv.step, 0

    def drifting(self, action):
        nonlocal calls
        calls += 1
        return plain(self, action + 1e-4 * (calls > 40))

    monkeypatch.setattr(FlywheelEnv, "step", drifting)
    with pytest.raises(EvaluationError, match=r"do not reproduce its episode .*observation.state differs"):
        self_test(CONFIG, EvalProtocol.of(CONFIG, SEEDS), range(800, 802), num_envs=1)


def test_evaluation_under_another_configuration_is_refused() -> None:
    protocol = EvalProtocol.of(CONFIG, SEEDS)
    with pytest.raises(EvaluationError, match="control_mode is qpos, but the protocol says delta_qpos"):
        evaluate(replace(CONFIG, control_mode="qpos"), RandomPolicy(), protocol)


def frames_of(path: Path) -> tuple[np.ndarray, av.video.stream.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 20
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])


def test_video_shows_every_episode_and_its_outcome(tmp_path: Path) -> None:
    path = tmp_path / "grid.mp4"
    shown = [episode(i, i % 2 == 0, 10 + 20 * i, size=(31, 33)) for i in range(7)]
    video_grid(shown, path, columns=5)
    frames = frames_of(path)
    assert len(frames) == 10 + 20 * 6 + 20  # the longest, then a second of stillness
    tile_h, tile_w = 31 + 4 + 16, 33 + 8
    assert frames.shape[1:3] == (2 * tile_h, 5 * tile_w + 1)  # even, as yuv420p wants
    first = frames[5, : 31 + 4, :tile_w]
    assert np.abs(first[8:28, 8:30].astype(int) - 5).max() <= 6  # step 5
    assert abs(int(frames[-1, 20, 20, 0]) - 9) <= 6  # it stands still at its last picture
    green, red = frames[50, 20, 1].astype(int), frames[50, 20, tile_w + 1].astype(int)
    assert green[1] > green[0] + 60
    assert red[0] > red[1] + 60
    assert frames[-1, tile_h + 20, 4 * tile_w + 20].max() <= 16  # no eighth episode there
    video_grid(shown, tmp_path / "again.mp4", columns=5)
    assert path.read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_video_holds_at_most_25_and_at_least_one(tmp_path: Path) -> None:
    video_grid([episode(i, True, 2) for i in range(30)], tmp_path / "grid.mp4")
    assert frames_of(tmp_path / "grid.mp4").shape[1:3] == (5 * 52, 5 * 40)
    with pytest.raises(BadInput, match="no episodes"):
        video_grid([], tmp_path / "none.mp4")


@pytest.mark.parametrize("outcomes", [[True], [False] * 3, [True, False, False, True, True] * 5])
def test_plot_is_a_picture(tmp_path: Path, outcomes: list[bool]) -> None:
    paths = [tmp_path / "two.png", tmp_path / "three.png", tmp_path / "again.png"]
    error = {f"joint_{i}.delta": 0.01 * i for i in range(7)} | {"gripper.target": 0.2}
    plot(scored(outcomes), paths[0])
    for path in paths[1:]:
        plot(scored(outcomes), path, action_error=error)
    sizes = [Image.open(path).size for path in paths]
    assert sizes[1][0] > sizes[0][0] > 800
    assert paths[1].read_bytes() == paths[2].read_bytes()


def test_evaluate_writes_the_video_and_keeps_one_camera(tmp_path: Path, monkeypatch) -> None:
    made = [episode(seed, True, 4) for seed in SEEDS]
    monkeypatch.setattr("models.evaluation.rollout", lambda *args, **kwargs: iter(made))
    kept: list[Episode] = []
    monkeypatch.setattr("models.evaluation.video_grid", lambda shown, path, fps: kept.extend(shown))
    evaluate(CONFIG, RandomPolicy(), EvalProtocol.of(CONFIG, SEEDS), video=tmp_path / "grid.mp4")
    assert [list(shown.images) for shown in kept] == [["head"]] * 6
