"""Grasp the red cube and leave it standing on the green one."""

import numpy as np

from data.sim.robot import FINGERS
from data.sim.scenes import pick_cube
from data.sim.scenes.base import Placement, Scene, State, Waypoint, block

HALF = 0.02  # m, half the red cube's edge
BASE_HALF = 0.025  # m, half the green cube's edge
RED_RANGE = ((-0.10, 0.08), (-0.14, -0.04))  # m: x and y at reset
GREEN_RANGE = ((-0.10, 0.06), (0.07, 0.14))  # m
CARRY = 0.04  # m above its final place at which the cube travels
SLOPE = 3.0  # m of height per m of horizontal error beyond ALIGNED
ALIGNED = 0.008  # m of horizontal error within which it is set down


def layout(rng: np.random.Generator) -> dict[str, Placement]:
    red, green = ([rng.uniform(*span) for span in spans] for spans in (RED_RANGE, GREEN_RANGE))
    yaw = rng.uniform(-pick_cube.YAW, pick_cube.YAW)
    return {
        "cube": Placement(x=red[0], y=red[1], z=HALF, yaw=yaw),
        "base": Placement(x=green[0], y=green[1], z=BASE_HALF),
    }


def _offset(state: State) -> np.ndarray:
    """From where the red cube would stand on the green one to where it is, in metres."""
    return state.positions["cube"] - state.positions["base"] - np.array([0, 0, HALF + BASE_HALF])


def lifted(state: State) -> bool:
    return pick_cube.grasped(state) and state.up("cube") > 0.05


def over(state: State) -> bool:
    """Held, above the green cube."""
    offset = _offset(state)
    return pick_cube.grasped(state) and bool(np.hypot(*offset[:2]) < BASE_HALF and offset[2] > -0.005)


def stacked(state: State) -> bool:
    """Standing on the green cube, still, touched by neither finger."""
    offset = _offset(state)
    standing = np.hypot(*offset[:2]) < BASE_HALF and abs(offset[2]) < 0.006
    free = not any(pair & set(FINGERS) for pair in state.touching if "cube" in pair)
    return bool(standing and free and state.speeds["cube"] < 0.05)


def expert(state: State) -> Waypoint:
    offset = _offset(state)
    sideways = float(np.hypot(*offset[:2]))
    resting = sideways < BASE_HALF and offset[2] < 0.004
    if resting:
        up = 0.06 if state.opening > 0.07 else 0.0  # open first, then leave
        return Waypoint(position=state.tcp + np.array([0, 0, up]), gripper=1.0)
    if pick_cube.grasped(state):
        aim = state.tcp - offset
        if offset[2] < 0.015 and sideways > 2.5 * ALIGNED:  # too low to travel: straight up
            return Waypoint(position=np.array([*state.tcp[:2], aim[2] + CARRY]), gripper=-1.0)
        height = np.clip(SLOPE * (sideways - ALIGNED), 0.0, CARRY)
        return Waypoint(position=aim + np.array([0, 0, height]), gripper=-1.0, speed=0.015 if height == 0 else 0.03)
    return pick_cube.approach(state)


SCENE = Scene(
    name="stack_cubes",
    task="stack the red cube on the green cube",
    bodies=(block("cube", HALF, (0.75, 0.06, 0.05)), block("base", BASE_HALF, (0.06, 0.5, 0.14))),
    layout=layout,
    subgoals={
        "reach": pick_cube.reached,
        "grasp": pick_cube.grasped,
        "lift": lifted,
        "over": over,
        "stack": stacked,
    },
    success=stacked,
    expert=expert,
    max_steps=140,
)
