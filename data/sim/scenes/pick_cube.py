"""Grasp the cube and lift it."""

import numpy as np

from data.sim.scenes.base import Placement, Scene, State, Waypoint, block, distance

HALF = 0.02  # m, half the cube's edge
LIFT = 0.08  # m above the table that counts as lifted
RANGE = (0.10, 0.14)  # m: the cube's centre is drawn from ±this in x and y
YAW = 0.25  # rad: and turned by at most this, so that one way of grasping fits all
CLOSE = (0.012, 0.012, 0.010)  # m along x, y, z between TCP and cube at which the gripper begins to close
KEEP_CLOSING = 1.8  # times that, once it is closing: a shove must not open it again
FUNNEL = 0.012  # m: within this the TCP goes straight down
SLOPE = 3.0  # m of height per m of horizontal error beyond
HOVER = 0.07  # m above the cube while the TCP is not yet over it


def layout(rng: np.random.Generator) -> dict[str, Placement]:
    x, y, yaw = rng.uniform(-1, 1, 3) * [*RANGE, YAW]
    return {"cube": Placement(x=x, y=y, z=HALF, yaw=yaw)}


def reached(state: State, body: str = "cube") -> bool:
    return distance(state.tcp, state.positions[body]) < 0.02


def grasped(state: State, body: str = "cube") -> bool:
    return body in state.held


def lifted(state: State, body: str = "cube") -> bool:
    return grasped(state, body) and state.up(body) > LIFT


def approach(state: State, body: str = "cube") -> Waypoint:
    """Come down on `body` through a funnel, and close the gripper around it.

    ```
     \\        /   the height kept above the body grows with the horizontal error,
      \\______/    so one smooth rule covers "go over it" and "go down"
         []
    ```
    """
    error = state.tcp - state.positions[body]
    height = np.clip(SLOPE * (np.hypot(error[0], error[1]) - FUNNEL), 0.0, HOVER)
    slack = KEEP_CLOSING if state.opening < 0.07 else 1.0
    near = bool(np.all(np.abs(error) < slack * np.array(CLOSE)))
    return Waypoint(position=state.positions[body] + np.array([0, 0, height]), gripper=-1.0 if near else 1.0)


def expert(state: State) -> Waypoint:
    if grasped(state):
        return Waypoint(position=state.tcp + np.array([0, 0, 0.05]), gripper=-1.0, speed=0.02)
    return approach(state)


SCENE = Scene(
    name="pick_cube",
    task="pick up the red cube",
    bodies=(block("cube", HALF, (0.75, 0.06, 0.05)),),
    layout=layout,
    subgoals={"reach": reached, "grasp": grasped, "lift": lifted},
    success=lifted,
    expert=expert,
    max_steps=80,
)
