"""Vector environments and lanes, with real worker processes and real deaths."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv
from data.sim.lanes import open_lanes, ready
from data.sim.vector import WorkerDied, make_vector

CONFIG = SimConfig(scene="pick_cube", renderer="none")
STATE = "observation.state"
RIGHT = np.array([0.5, 0, 0, 0, 0, 0, 0, 1], np.float32)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def lanes():
    opened = open_lanes(CONFIG, 2, "async", burst=3)
    yield opened
    pids = [lane.process.pid for lane in opened]
    for lane in opened:
        lane.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_lanes_reset_by_mask_leave_the_others_alone() -> None:
    vector = make_vector(CONFIG, 2)
    try:
        first, _ = vector.reset(seed=[3, 4])
        first = first[STATE].copy()
        moved = vector.step(np.stack([RIGHT, RIGHT]))[0][STATE].copy()
        mask = np.array([True, False])
        after, infos = vector.reset(seed=[3, None], options={"reset_mask": mask})
        np.testing.assert_array_equal(after[STATE][0], first[0])
        np.testing.assert_array_equal(after[STATE][1], moved[1])
        assert not np.array_equal(moved[1], first[1])
        assert infos["_task"].tolist() == [True, False]
    finally:
        vector.close()


def test_lanes_here_and_there_say_what_the_environment_says(lanes) -> None:
    env = FlywheelEnv(CONFIG)
    reset, *steps = env.reset(seed=5), *(env.step(RIGHT) for _ in range(5))
    env.close()
    for lane in [lanes[0], *open_lanes(CONFIG, 1, "sync")]:
        lane.reset(5)
        assert ready([lane], PATIENCE_S) == [lane]
        first = lane.take()
        assert [outcome.info for outcome in first.outcomes] == [reset[1]]
        np.testing.assert_array_equal(first.observation[STATE], [reset[0][STATE]])
        seen, outcomes = [], []
        for burst in (3, 2):
            lane.step(np.stack([RIGHT] * burst))
            assert ready([lane], PATIENCE_S) == [lane]
            replies = lane.take()
            seen += [row.copy() for row in replies.observation[STATE]]
            outcomes += replies.outcomes
        np.testing.assert_array_equal(seen, [step[0][STATE] for step in steps])
        assert [tuple(outcome) for outcome in outcomes] == [step[1:] for step in steps]


def test_a_burst_ends_with_the_episode() -> None:
    [lane] = open_lanes(replace(CONFIG, max_steps=2), 1, "sync")
    lane.reset(0)
    lane.step(np.stack([RIGHT] * 5))
    assert [outcome.over for outcome in lane.take().outcomes] == [False, True]


def test_a_lane_does_not_wait_for_another(lanes) -> None:
    slow, quick = lanes
    for lane in lanes:
        lane.reset(0)
    while len(ready(lanes, PATIENCE_S)) < 2:
        pass
    for lane in lanes:
        lane.take()
    os.kill(slow.process.pid, signal.SIGSTOP)
    for lane in lanes:
        lane.step(RIGHT[None])
    assert ready(lanes, PATIENCE_S) == [quick]
    assert ready([slow], 0.2) == []
    os.kill(slow.process.pid, signal.SIGCONT)
    assert ready([slow], PATIENCE_S) == [slow]
    for lane in lanes:
        lane.take()


def test_workers_have_one_thread_each_and_the_parent_keeps_its_variables(lanes) -> None:
    environ = psutil.Process(lanes[0].process.pid).environ()
    assert "LP_NUM_THREADS" not in os.environ
    assert (environ["LP_NUM_THREADS"], environ["OMP_NUM_THREADS"]) == ("0", "1")


def test_a_killed_worker_is_said_to_have_died(lanes) -> None:
    """The last of the module to use them."""
    early, busy = lanes
    early.kill()
    early.reset(0)  # there is nobody to ask
    os.kill(busy.process.pid, signal.SIGSTOP)  # so that it cannot answer
    busy.reset(0)
    os.kill(busy.process.pid, signal.SIGKILL)
    for lane in lanes:
        assert ready([lane], PATIENCE_S) == [lane]
        with pytest.raises(WorkerDied, match="code -9"):
            lane.take()


PARENT = """
import sys, time
import numpy as np
from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.lanes import open_lanes

if __name__ == "__main__":
    lanes = open_lanes(SimConfig(scene="pick_cube", renderer="none"), 2, "async")
    print(*(lane.process.pid for lane in lanes), flush=True)
    for lane in lanes:
        lane.reset(0)
        lane.take()
    lanes[0].step(np.array([[0, 0, 0, 0, 0, 0, 0, np.inf]], np.float32))
    try:
        lanes[0].take()
    except BadInput as error:
        print(error, flush=True)
    time.sleep(600)
"""


def test_bad_input_in_a_worker_arrives_without_noise_and_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    said = tmp_path / "stderr"
    with said.open("w") as stderr:
        parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=stderr, text=True)
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert "finite" in parent.stdout.readline()
    assert len(workers) == 2
    assert said.read_text() == ""
    parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(BadInput, match="num_envs is 0"):
        make_vector(CONFIG, 0)
    with pytest.raises(BadInput, match="'threads'"):
        make_vector(CONFIG, 2, "threads")
