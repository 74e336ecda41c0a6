"""Rollouts: our vectorised environments beside bare SAPIEN doing the same physics and the same pictures.

    python benchmarks/rollout.py [--envs 2] [--size 128] [--seconds 4] [--rounds 5] [--json]

* `ours`: `data.sim.rollout` with actions in chunks of 10: gymnasium, info, sub-goals, shared memory, finished episodes
  in hand;
* `ours_single`: the same, told one action at a time, as the scripted expert and temporal ensembling need it;
* `sapien`: as many processes, each a loop of SAPIEN calls and nothing else: drive targets, physics steps, poses to the
  renderer, two pictures, uint8 copies. No gymnasium, no predicates, no policy, nobody to hand anything to;
* `lockstep`: gymnasium's own vector environment, all lanes waiting for the slowest: why ours does not.

All build each seed's scene as ours does, and move the arm in the same way in each episode: a picture's price depends on
what is in it. Before anything is timed, the pictures of one episode must be equal to the
last bit. Interleaved rounds, median; starting the processes is reported apart. The target is 150 steps/s and 0.8 of
`sapien`.
"""

import argparse
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import psutil

from data.schema import IMAGE
from data.sim import controllers
from data.sim.config import SimConfig
from data.sim.env import FlywheelEnv
from data.sim.looks import without_alpha
from data.sim.policies import RandomPolicy
from data.sim.randomization import draw
from data.sim.rollout import rollout
from data.sim.vector import make_vector, worker_environment
from data.sim.world import World

STEPS = 80  # per episode; random actions succeed in none


ACTIONS = RandomPolicy(horizon=STEPS).act({}, [""], [0], [0])[0]  # [STEPS, 8]


class Same:
    """A policy that does the same in every episode, in chunks of `horizon`."""

    digest = "same"

    def __init__(self, horizon: int) -> None:
        self.horizon = horizon

    def reset(self, lane: int, seed: int) -> None:
        pass

    def act(self, observation: dict, tasks: list[str], seeds: list[int], steps: list[int]) -> np.ndarray:
        return np.stack([ACTIONS[step : step + self.horizon] for step in steps])


class Bare:
    """SAPIEN calls and nothing else. What a seed's scene holds is built by the project; how it runs is written here."""

    def __init__(self, config: SimConfig) -> None:
        self.config = config
        self.env = FlywheelEnv(config)

    def episode(self, seed: int) -> Iterator[list[np.ndarray]]:
        config, scene = self.config, self.env.scene
        drawn = draw(config.randomization, scene, seed)
        looks = self.env._fresh_looks()
        looks.apply(drawn)
        world = World(scene, drawn, timestep=1 / (config.control_hz * config.substeps))
        sim, show, robot = world._sim, looks._sim, world._robot
        joints, cameras = robot.active_joints, list(looks._cameras.values())
        seen = [(looks._entities[name], link) for name, link in world._links.items()]
        bodies = [(looks._entities[name], entity) for name, entity in (world._entities | world._clutter).items()]
        for action in ACTIONS:
            finger = controllers.finger_target(action[-1])
            targets = robot.get_qpos()[:7].astype(float) + controllers.JOINT_STEP * action[:7].astype(float)
            for joint, target in zip(joints, [*targets, finger, finger], strict=True):
                joint.set_drive_target(float(target))
            for _ in range(config.substeps):
                sim.step()
            for shown, link in seen:
                shown.set_pose(link.entity_pose)
            for shown, entity in bodies:
                shown.set_pose(entity.pose)
            show.update_render()
            for camera in cameras:
                camera.take_picture()
            yield [without_alpha(camera.get_picture("Color")) for camera in cameras]

    def steps_in(self, seconds: float, first_seed: int) -> int:
        """Steps done within `seconds`, episode after episode."""
        end, steps, seed = time.perf_counter() + seconds, 0, first_seed
        while True:
            for _ in self.episode(seed):
                steps += 1
                if time.perf_counter() >= end:
                    return steps
            seed += 1


def bare_worker(config: SimConfig, pipe: Connection) -> None:
    bare = Bare(config)
    bare.steps_in(0.5, 0)
    pipe.send(None)
    while True:
        try:
            seconds, seed = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        before = time.process_time()
        steps = bare.steps_in(seconds, seed)
        pipe.send((steps, time.process_time() - before))


def sapien(config: SimConfig, envs: int) -> Callable[[float], tuple[float, float]]:
    """Start the bare processes; the function returned measures steps/s and CPU seconds per step."""
    context, pipes = multiprocessing.get_context("spawn"), []
    with worker_environment():
        for _ in range(envs):
            ours, theirs = context.Pipe()
            context.Process(target=bare_worker, args=(config, theirs), daemon=True).start()
            pipes.append(ours)
    for pipe in pipes:
        pipe.recv()

    def measure(seconds: float) -> tuple[float, float]:
        for i, pipe in enumerate(pipes):
            pipe.send((seconds, 1000 * i))
        told = [pipe.recv() for pipe in pipes]
        steps = sum(count for count, _ in told)
        return steps / seconds, sum(cpu for _, cpu in told) / steps

    return measure


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def cpu_of(workers: set[psutil.Process]) -> float:
    """CPU seconds of this process and of `workers`."""
    return sum(sum(process.cpu_times()[:2]) for process in [psutil.Process(), *workers])


def flywheel(config: SimConfig, envs: int, replan: int | None = None) -> Callable[[float], tuple[float, float]]:
    steps = 0

    def count(n: int) -> None:
        nonlocal steps
        steps += n

    others = children()
    policy, seeds = Same(replan or 10), range(1_000_000)
    episodes = rollout(config, policy, seeds, num_envs=envs, replan=replan, backend="async", on_step=count)
    for _ in range(envs):
        next(episodes)  # the processes run, each has built its first scene
    workers = children() - others

    def measure(seconds: float) -> tuple[float, float]:
        before, cpu, began = steps, cpu_of(workers), time.perf_counter()
        while time.perf_counter() - began < seconds:
            next(episodes)
        took, done = time.perf_counter() - began, steps - before
        return done / took, (cpu_of(workers) - cpu) / done

    return measure


def lockstep(config: SimConfig, envs: int) -> Callable[[float], tuple[float, float]]:
    others = children()
    vector = make_vector(config, envs, "async")
    workers = children() - others
    vector.reset(seed=list(range(envs)))
    seed = envs
    # Lanes end episodes at different times, as they do with a policy that sometimes succeeds.
    steps_left = np.array([STEPS - i * STEPS // envs for i in range(envs)])

    def measure(seconds: float) -> tuple[float, float]:
        nonlocal seed
        done, cpu, began = 0, cpu_of(workers), time.perf_counter()
        while time.perf_counter() - began < seconds:
            vector.step(np.stack([ACTIONS[STEPS - left] for left in steps_left]))
            done += envs
            steps_left[:] -= 1
            if (over := steps_left == 0).any():
                vector.reset(seed=[seed + i for i in range(envs)], options={"reset_mask": over})
                seed += envs
                steps_left[over] = STEPS
        return done / (time.perf_counter() - began), (cpu_of(workers) - cpu) / done

    return measure


def alone(measure: Callable[[float], tuple[float, float]], seconds: float) -> tuple[float, float]:
    time.sleep(0.3)  # the lanes of whoever was measured before finish what they were told
    return measure(seconds)


def check_equal(config: SimConfig) -> None:
    """The bare loop shows what our rollout shows: image t+1 of an episode is seen after action t."""
    [episode] = rollout(config, Same(10), [7], num_envs=1)
    bare = list(Bare(config).episode(7))
    for i, camera in enumerate(config.cameras):
        ours, theirs = episode.images[camera][1:], np.stack([pictures[i] for pictures in bare])[:-1]
        if hashlib.sha256(ours.tobytes()).digest() != hashlib.sha256(theirs.tobytes()).digest():
            raise SystemExit(f"{IMAGE}{camera}: bare SAPIEN shows other pictures; nothing was timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scene", default="pick_cube")
    parser.add_argument("--envs", type=int, default=2, help="processes")
    parser.add_argument("--size", type=int, default=128, help="pixels per side, two cameras")
    parser.add_argument("--seconds", type=float, default=4.0, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on the last line")
    args = parser.parse_args()
    config = SimConfig(scene=args.scene, image_size=(args.size, args.size), max_steps=STEPS, renderer="sapien")
    check_equal(config)
    measures, start_s = {}, {}
    starts = {"ours": flywheel, "sapien": sapien, "ours_single": partial(flywheel, replan=1), "lockstep": lockstep}
    for name, start in starts.items():
        began = time.perf_counter()
        measures[name] = start(config, args.envs)
        start_s[name] = round(time.perf_counter() - began, 1)
    rounds = [{name: alone(measure, args.seconds) for name, measure in measures.items()} for _ in range(args.rounds)]
    rate = {name: median(r[name][0] for r in rounds) for name in measures}
    spread = {name: (max(r[name][0] for r in rounds) - min(r[name][0] for r in rounds)) / rate[name] for name in rate}
    cpu_ms = {name: 1000 * median(r[name][1] for r in rounds) for name in measures}
    ratios = {f"{peer}_ratio": median(r["ours"][0] / r[peer][0] for r in rounds) for peer in ("sapien", "lockstep")}
    cpu_ratio = (
        cpu_ms["sapien"] / cpu_ms["ours"]
    )  # hardly changes on a busy machine, where whoever waits loses its turn
    for name in measures:
        noisy = f"  (spread {spread[name]:.0%} of the median: a busy machine)" if spread[name] > 0.2 else ""
        print(
            f"{name:11} {rate[name]:7.1f} steps/s  {cpu_ms[name]:5.2f} CPU-ms/step  start {start_s[name]:4.1f} s{noisy}"
        )
    print(f"ours/sapien {ratios['sapien_ratio']:.2f} (want >= 0.8), by CPU time {cpu_ratio:.2f}", end="; ")
    print(f"ours/lockstep {ratios['lockstep_ratio']:.2f}")
    if args.json:
        print(
            json.dumps(
                {
                    "benchmark": "rollout",
                    "steps_per_s": rate,
                    "cpu_ms_per_step": cpu_ms,
                    "spread": spread,
                    "start_s": start_s,
                    **ratios,
                    "sapien_cpu_ratio": cpu_ratio,
                    "envs": args.envs,
                    "image_size": args.size,
                    "rounds": args.rounds,
                    "versions": {name: version(name) for name in ("sapien", "gymnasium", "numpy")},
                }
            )
        )


if __name__ == "__main__":
    main()
