"""Lanes: environments that need not wait for each other, and that are told several actions at once.

```
 a vector environment   all lanes step together    |--- step ---|--- step ---|   the slowest sets the pace
 lanes                  each at its own pace       |- 8 steps -|- reset -|- 8 steps -|- 2 -|
                                                   |-- 8 steps --|-- 8 steps --|- 2 -|- reset -|
```
A lane is a vector environment of one, so a worker that dies takes one episode with it and is replaced alone. One
message per burst and not per step, because handing over a step costs as much as a tenth of simulating it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import wait
from typing import Any, NamedTuple, NoReturn, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv
from gymnasium.vector.utils import batch_space, write_to_shared_memory
from jaxtyping import Float32

from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv
from data.sim.vector import Backend, WorkerDied, resolve_backend, start_workers, worker_environment


class Outcome(NamedTuple):
    """What an environment says to a step, besides what is seen; to `reset`, with reward 0 and not over."""

    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]

    @property
    def over(self) -> bool:
        return self.terminated or self.truncated


class Replies(NamedTuple):
    """To `reset` one, to `step` one for each action that was executed."""

    observation: dict[str, Sequence[np.ndarray]]  # row i: seen after action i. Valid until the command after the next.
    outcomes: list[Outcome]


class Lane(ABC):
    """One environment: `reset` it or let it `step`, do something else, `take` the replies when it is `ready`."""

    @abstractmethod
    def reset(self, seed: int) -> None: ...

    @abstractmethod
    def step(self, actions: Float32[np.ndarray, "k a"]) -> None:
        """Execute up to `burst` actions, one after the other; none after the end of the episode."""

    @abstractmethod
    def take(self) -> Replies:
        """What came of the last command. Raises `WorkerDied`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the environment now, whatever it is doing."""


def open_lanes(config: SimConfig, count: int, backend: Backend = "auto", burst: int = 1) -> list[Lane]:
    """`count` lanes whose `step` takes up to `burst` actions; the workers start side by side."""
    if resolve_backend(backend, count) == "sync":
        return [LocalLane(FlywheelEnv(config)) for _ in range(count)]
    with worker_environment(), ThreadPoolExecutor(count) as pool:
        starting = [pool.submit(start_workers, partial(_Burst, config, burst), 1, copy=False) for _ in range(count)]
        return [WorkerLane(started.result()) for started in starting]


def ready(lanes: Sequence[Lane], timeout: float) -> list[Lane]:
    """Those of the busy `lanes` that have replied or died, waiting until there is one, at most `timeout` seconds."""
    local: list[Lane] = [lane for lane in lanes if isinstance(lane, LocalLane)]
    pipes: dict[Any, Lane] = {lane.pipe: lane for lane in lanes if isinstance(lane, WorkerLane)}
    return local or [pipes[pipe] for pipe in wait(list(pipes), timeout)]


class LocalLane(Lane):
    """In this process: the work is done when the command is given."""

    def __init__(self, env: gym.Env) -> None:
        self.env = env

    def reset(self, seed: int) -> None:
        self._replies = _reset(self.env, seed)

    def step(self, actions: Float32[np.ndarray, "k a"]) -> None:
        self._replies = _execute(self.env, actions)

    def take(self) -> Replies:
        return self._replies

    def close(self) -> None:
        self.env.close()


class WorkerLane(Lane):
    """In a process of its own: the command goes down a pipe, the reply comes up it."""

    def __init__(self, vector: AsyncVectorEnv) -> None:
        self.vector = vector
        self.process = vector.processes[0]
        self.pipe = vector.parent_pipes[0]
        shape = vector.action_space.shape
        assert shape is not None  # it is a box
        self._told = np.full(shape, np.nan, np.float32)  # [1, burst, a]
        self._half = 0  # of the shared rows, as in `_Burst`

    def reset(self, seed: int) -> None:
        self._send(self.vector.reset_async, self.vector.reset_wait, seed=[seed])

    def step(self, actions: Float32[np.ndarray, "k a"]) -> None:
        self._told[0, : len(actions)], self._told[0, len(actions) :] = actions, np.nan
        self._send(self.vector.step_async, self.vector.step_wait, self._told)

    def take(self) -> Replies:
        try:
            shared, *_, info = self._answer()
        except (EOFError, ConnectionError):
            self._died()
        outcomes = info["outcomes"][0]
        first = self._half * self._told.shape[1]
        self._half ^= 1
        return Replies({name: rows[0, first : first + len(outcomes)] for name, rows in shared.items()}, outcomes)

    def kill(self) -> None:
        """End the worker; `take` will say that it died."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        self.kill()
        self.pipe.close()
        self.vector.closed = True  # gymnasium's own close would wait for an answer

    def _send(self, command: Callable, answer: Callable, *args: Any, **kwargs: Any) -> None:
        self._answer = answer
        try:
            command(*args, **kwargs)
        except ConnectionError:
            self._answer = self._died  # said by `take`, so that a death is handled in one place

    def _died(self) -> NoReturn:
        self.kill()
        raise WorkerDied(f"a simulator process ended with code {self.process.exitcode}")


class Rows(gym.spaces.Box):
    """A box whose first axis has room for two bursts; a value is (half, list of as many rows as there are).

    gymnasium copies a Box twice on its way to the shared memory, all of it; of these, each row is copied once. The
    halves take turns, so that a worker goes on while the parent still copies what the last burst showed.
    """

    def __init__(self, row: gym.spaces.Box, burst: int) -> None:
        shape = (2 * burst, *row.shape)
        super().__init__(np.broadcast_to(row.low, shape), np.broadcast_to(row.high, shape), shape, row.dtype)


@write_to_shared_memory.register(Rows)
def _write_rows(space: Rows, index: int, value: tuple[int, list[np.ndarray]], shared_memory: Any) -> None:
    half, rows = value
    rooms = np.frombuffer(shared_memory.get_obj(), space.dtype).reshape(-1, 2, space.shape[0] // 2, *space.shape[1:])
    for room, row in zip(rooms[index, half], rows, strict=False):
        room[...] = row


class _Burst(gym.Env):
    """What a worker runs: an environment that executes several actions in one step."""

    def __init__(self, config: SimConfig, burst: int) -> None:
        self.env = FlywheelEnv(config)
        boxes = cast(Mapping[str, gym.spaces.Box], self.env.observation_space)
        seen: dict[str, gym.Space] = {name: Rows(space, burst) for name, space in boxes.items()}
        self.observation_space = gym.spaces.Dict(seen)
        self.action_space = batch_space(self.env.action_space, burst)
        self._half = 1  # of the shared rows, where the last command's lie

    def reset(self, *, seed: int, options: dict | None = None) -> tuple[dict, dict[str, Any]]:
        return self._answer(_reset(self.env, seed))

    def step(self, action: Float32[np.ndarray, "burst a"]) -> tuple[dict, float, bool, bool, dict[str, Any]]:
        """Rows of NaN are no actions."""
        replies = _execute(self.env, action[~np.isnan(action).all(axis=1)])
        rows, info = self._answer(replies)
        return rows, 0.0, replies.outcomes[-1].terminated, replies.outcomes[-1].truncated, info

    def close(self) -> None:
        self.env.close()

    def _answer(self, replies: Replies) -> tuple[dict, dict[str, Any]]:
        self._half ^= 1
        rows = {name: (self._half, values) for name, values in replies.observation.items()}
        return rows, {"outcomes": replies.outcomes}


def _reset(env: gym.Env, seed: int) -> Replies:
    observation, info = env.reset(seed=seed)
    return Replies({name: [value] for name, value in observation.items()}, [Outcome(0.0, False, False, info)])


def _execute(env: gym.Env, actions: Float32[np.ndarray, "k a"]) -> Replies:
    """One action after the other, up to the end of the episode."""
    seen, outcomes = [], []
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation)
        outcomes.append(Outcome(float(reward), terminated, truncated, info))
        if outcomes[-1].over:
            break
    return Replies({name: [observation[name] for observation in seen] for name in seen[0]}, outcomes)
