"""Grasp the cube, carry it over the bin and let go."""

import numpy as np

from data.sim.scenes import pick_cube
from data.sim.scenes.base import Body, Part, Placement, Scene, State, Waypoint, block, distance

HALF = 0.02  # m, half the cube's edge
INSIDE, WALL, DEPTH = 0.055, 0.004, 0.05  # m: the bin's inner half width, half a wall's thickness, height
CUBE_RANGE = ((-0.12, 0.08), (-0.16, -0.02))  # m: x and y at reset
BIN_RANGE = ((-0.10, 0.06), (0.13, 0.17))  # m
CARRY = 0.12  # m above the table at which the cube travels: clear of the walls
LOW_ENOUGH = CARRY - 0.025  # m: from here on it may travel


def layout(rng: np.random.Generator) -> dict[str, Placement]:
    x, y = (rng.uniform(*span) for span in CUBE_RANGE)
    yaw = rng.uniform(-pick_cube.YAW, pick_cube.YAW)
    a, b = (rng.uniform(*span) for span in BIN_RANGE)
    return {"cube": Placement(x=x, y=y, z=HALF, yaw=yaw), "bin": Placement(x=a, y=b, z=0.0)}


def over(state: State) -> bool:
    """Held, above the walls, between them."""
    return pick_cube.grasped(state) and _between_walls(state) and state.up("cube") > DEPTH


def released_inside(state: State) -> bool:
    """Let go of, between the walls and below their rim."""
    cube = state.positions["cube"]
    return "cube" not in state.held and _between_walls(state) and cube[2] - state.table < DEPTH


def lifted(state: State) -> bool:
    return pick_cube.grasped(state) and state.up("cube") > 0.05


def _between_walls(state: State) -> bool:
    return bool(np.all(np.abs(state.positions["cube"][:2] - state.positions["bin"][:2]) < INSIDE))


def expert(state: State) -> Waypoint:
    target, high = state.positions["bin"], state.table + CARRY
    away = distance(state.tcp[:2], target[:2])
    if _between_walls(state):
        centred = away < 0.025
        if state.opening > 0.06 or (centred and state.tcp[2] < high + 0.03):
            return Waypoint(position=np.array([*target[:2], high]), gripper=1.0)
    if pick_cube.grasped(state):
        if state.tcp[2] < state.table + LOW_ENOUGH and away > 0.03:
            return Waypoint(position=np.array([*state.tcp[:2], high + 0.02]), gripper=-1.0)
        return Waypoint(position=np.array([*target[:2], high]), gripper=-1.0)
    return pick_cube.approach(state)


def _wall(x: float, y: float, half_x: float, half_y: float) -> Part:
    return Part(half_size=(half_x, half_y, DEPTH / 2), center=(x, y, DEPTH / 2))


_EDGE = INSIDE + WALL
SCENE = Scene(
    name="place_in_bin",
    task="put the red cube into the blue bin",
    bodies=(
        block("cube", HALF, (0.75, 0.06, 0.05)),
        Body(
            name="bin",
            parts=(
                Part(half_size=(INSIDE, INSIDE, 0.002), center=(0, 0, 0.002)),
                _wall(_EDGE, 0, WALL, _EDGE + WALL),
                _wall(-_EDGE, 0, WALL, _EDGE + WALL),
                _wall(0, _EDGE, INSIDE, WALL),
                _wall(0, -_EDGE, INSIDE, WALL),
            ),
            color=(0.07, 0.22, 0.6),
            kind="fixed",
            clearance=0.13,
        ),
    ),
    layout=layout,
    subgoals={
        "reach": pick_cube.reached,
        "grasp": pick_cube.grasped,
        "lift": lifted,
        "over": over,
        "released_inside": released_inside,
    },
    success=released_inside,
    expert=expert,
    max_steps=120,
)
