"""Environments in worker processes: gymnasium's vector environments, and lanes that need not wait for each other.

```
 make_vector(n)   all n step together      |--- step ---|--- step ---|    the slowest sets the pace
 Lane x n         each at its own pace     |- step -|- step -|-- reset --|- step -|
                                           |-- step --|- step -|- step -|- step -|
```
A lane is a vector environment of one, so a worker that dies takes one episode with it and is replaced alone.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from typing import Any, Literal, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from data.errors import BadInput
from data.sim.env import FlywheelEnv, SimConfig

Backend = Literal["auto", "sync", "async"]

# One thread each: workers outnumber nothing, and lavapipe or BLAS threads of one would only push the others aside.
WORKER_ENVIRONMENT = {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

# gymnasium's warnings before it raises a worker's exception here; only an unforeseen one's traceback is worth reading.
_NOISE = r"(?s).*(Received the following error|Raising the last exception|Traceback.*BadInput)"


class WorkerDied(RuntimeError):
    """A worker process ended without being asked to: killed, out of memory, or crashed in a driver."""


def make_vector(config: SimConfig, num_envs: int, backend: Backend = "auto") -> VectorEnv:
    """`num_envs` environments that step together. Lanes are reset by mask, never on their own:

    `vector.reset(seed=[...], options={"reset_mask": mask})` returns every lane's observation and the infos of those
    that were reset; `step` after the end of an episode is a mistake of the caller. "auto" is "sync" for one
    environment and "async" (a spawned process each, pictures through shared memory) for more.
    """
    if num_envs < 1:
        raise BadInput(f"num_envs is {num_envs}; use at least 1")
    if resolve_backend(backend, num_envs) == "sync":
        return SyncVectorEnv([partial(FlywheelEnv, config)] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    with _worker_environment():
        return _start_workers(config, num_envs)


def resolve_backend(backend: Backend, num_envs: int) -> str:
    """ "sync" or "async"; raises `BadInput` for anything else."""
    if backend not in ("auto", "sync", "async"):
        raise BadInput(f"unknown vector backend {backend!r}; use auto, sync or async")
    return backend if backend != "auto" else ("sync" if num_envs == 1 else "async")


def _start_workers(config: SimConfig, num_envs: int) -> AsyncVectorEnv:
    warnings.filterwarnings("ignore", _NOISE, UserWarning)
    start = partial(_start_env, config, os.getpid())
    try:
        return AsyncVectorEnv(
            [start] * num_envs, shared_memory=True, context="spawn", autoreset_mode=AutoresetMode.DISABLED
        )
    except (EOFError, ConnectionError) as error:
        message = f"a {config.scene} simulator process ended while starting; its own message stands above"
        raise WorkerDied(message) from error


def _start_env(config: SimConfig, parent: int) -> gym.Env:
    """The environment of one worker. (gymnasium also calls this in the parent once, to learn the spaces.)"""
    if os.getpid() != parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers
        threading.Thread(target=_die_with_parent, daemon=True).start()
    return FlywheelEnv(config)


def _die_with_parent() -> None:
    """End this worker the moment its parent is gone, even by SIGKILL.

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the worker ends, and lanes start in threads.
    """
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _worker_environment() -> Iterator[None]:
    """Variables that a worker must inherit: BLAS reads them when numpy is imported, before any code of ours runs."""
    before = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What an environment said to `reset` (reward 0, not over) or `step`."""

    observation: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class Lane(ABC):
    """One environment: give it `reset` or `step`, do something else, `take` its reply when it is among the `ready`."""

    def __init__(self, vector: VectorEnv) -> None:
        self.vector = vector

    @abstractmethod
    def reset(self, seed: int) -> None: ...

    @abstractmethod
    def step(self, action: np.ndarray) -> None: ...

    def take(self) -> Reply:
        """The reply to the last `reset` or `step`. Raises `WorkerDied`."""
        observation, *outcome, infos = self._answer()
        reward, terminated, truncated = (column[0].item() for column in outcome) if outcome else (0.0, False, False)
        return Reply(
            observation={name: value[0].copy() for name, value in observation.items()},
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info=_first(infos),
        )

    def close(self) -> None:
        """Let go of the environment now, whatever it is doing."""
        self.vector.close()

    @abstractmethod
    def _answer(self) -> tuple: ...


class LocalLane(Lane):
    """In this process: the work is done when the command is given."""

    def reset(self, seed: int) -> None:
        self._answered = self.vector.reset(seed=[seed])

    def step(self, action: np.ndarray) -> None:
        self._answered = self.vector.step(action[None])

    def _answer(self) -> tuple:
        return self._answered


class WorkerLane(Lane):
    """In a process of its own: the command goes down a pipe, the reply comes up it."""

    vector: AsyncVectorEnv

    def reset(self, seed: int) -> None:
        self._send(self.vector.reset_async, self.vector.reset_wait, seed=[seed])

    def step(self, action: np.ndarray) -> None:
        self._send(self.vector.step_async, self.vector.step_wait, action[None])

    def _send(self, command: Callable, answer: Callable, *args: Any, **kwargs: Any) -> None:
        self._waiting = answer
        try:
            command(*args, **kwargs)
        except ConnectionError:
            self._waiting = self._died  # said by `take`, so that a death is handled in one place

    def _answer(self) -> tuple:
        try:
            return self._waiting()
        except (EOFError, ConnectionError):
            return self._died()

    def _died(self) -> NoReturn:
        self.kill()
        raise WorkerDied(f"a simulator process ended with code {self.vector.processes[0].exitcode}")

    def kill(self) -> None:
        """End the worker; `take` will say that it died."""
        for process in self.vector.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        self.kill()
        for pipe in self.vector.parent_pipes:
            if pipe is not None:  # gymnasium's mark for a worker that reported an exception
                pipe.close()
        self.vector.closed = True  # gymnasium's own close would wait for an answer


def open_lanes(config: SimConfig, count: int, backend: Backend = "auto") -> list[Lane]:
    """`count` lanes, their workers started side by side."""
    if resolve_backend(backend, count) == "sync":
        return [LocalLane(make_vector(config, 1, "sync")) for _ in range(count)]
    with _worker_environment(), ThreadPoolExecutor(count) as pool:
        return list(map(WorkerLane, pool.map(_start_workers, [config] * count, [1] * count)))


def ready(lanes: Sequence[Lane], timeout: float) -> list[Lane]:
    """Those of the busy `lanes` that have replied or died, waiting until there is one, at most `timeout` seconds."""
    pipes = {lane.vector.parent_pipes[0]: lane for lane in lanes if isinstance(lane, WorkerLane)}
    local = [lane for lane in lanes if isinstance(lane, LocalLane)]
    return local or [pipes[pipe] for pipe in wait(list(pipes), timeout)]


def _first(infos: dict[str, Any]) -> dict[str, Any]:
    """The only lane's info out of a vector's: `{"a": [x], "_a": [True]}` -> `{"a": x}`, dictionaries likewise."""
    info = {}
    for name, value in infos.items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict):
            info[name] = _first(value)
        else:
            info[name] = value[0].item() if isinstance(value[0], np.generic) else value[0]
    return info
