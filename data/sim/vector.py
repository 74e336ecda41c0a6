"""Environments in worker processes: gymnasium's vector environments, started and ended our way.

```
 parent ---- spawn, one thread per worker ----> worker: FlywheelEnv
        <--- pictures through shared memory ---
 kill -9 of the parent: the worker's watchdog sees it gone and ends the worker
```
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import gymnasium as gym
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv

Backend = Literal["auto", "sync", "async"]

# Workers do the work, so a worker needs no helpers: lavapipe draws in the thread that asks (0), BLAS has no pool.
WORKER_ENVIRONMENT = {"LP_NUM_THREADS": "0", "OMP_NUM_THREADS": "1"}

# gymnasium's warnings before it raises a worker's exception here; only an unforeseen one's traceback is worth reading.
_NOISE = r"(?s).*(Received the following error|Raising the last exception|Traceback.*BadInput)"


class WorkerDied(RuntimeError):
    """A worker process ended without being asked to: killed, out of memory, or crashed in a driver."""


def make_vector(config: SimConfig, num_envs: int, backend: Backend = "auto") -> VectorEnv:
    """`num_envs` environments that step together. They are reset by mask, never on their own:

    `vector.reset(seed=[...], options={"reset_mask": mask})` returns every environment's observation and the infos of
    those that were reset; `step` after the end of an episode is a mistake of the caller. "auto" is "sync" for one
    environment and "async" (a spawned process each, pictures through shared memory) for more.
    """
    if num_envs < 1:
        raise BadInput(f"num_envs is {num_envs}; use at least 1")
    make = partial(FlywheelEnv, config)
    if resolve_backend(backend, num_envs) == "sync":
        return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.DISABLED)
    with worker_environment():
        return start_workers(make, num_envs)


def resolve_backend(backend: Backend, num_envs: int) -> Literal["sync", "async"]:
    """ "sync" or "async"; raises `BadInput` for anything else."""
    if backend not in ("auto", "sync", "async"):
        raise BadInput(f"unknown vector backend {backend!r}; use auto, sync or async")
    return backend if backend != "auto" else ("sync" if num_envs == 1 else "async")


def start_workers(make: Callable[[], gym.Env], num_envs: int, *, copy: bool = True) -> AsyncVectorEnv:
    """A process for each of `num_envs` environments. Call it within `worker_environment()`. Raises `WorkerDied`.

    `copy`: whether observations are copies, or views of the memory that the next step writes to.
    """
    warnings.filterwarnings("ignore", _NOISE, UserWarning)
    start = partial(_start_env, make, os.getpid())
    try:
        return AsyncVectorEnv(
            [start] * num_envs, context="spawn", shared_memory=True, copy=copy, autoreset_mode=AutoresetMode.DISABLED
        )
    except (EOFError, ConnectionError) as error:
        raise WorkerDied("a simulator process ended while starting; its own message stands above") from error


def _start_env(make: Callable[[], gym.Env], parent: int) -> gym.Env:
    """The environment of one worker. (gymnasium also calls this in the parent once, to learn the spaces.)"""
    if os.getpid() != parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its workers
        threading.Thread(target=_die_with_parent, daemon=True).start()
    return make()


def _die_with_parent() -> None:
    """End this worker the moment its parent is gone, even by SIGKILL.

    Not PR_SET_PDEATHSIG: that fires when the *thread* that started the worker ends, and lanes start in threads.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    parent.join()
    os._exit(1)


@contextmanager
def worker_environment() -> Iterator[None]:
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
