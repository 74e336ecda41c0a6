"""Push the cube away from the robot, onto the mark.

```
   TCP           cube            mark
    v            [ ]           +-----+
    |  behind ->  |   push ->  |     |       +x
```
"""

import numpy as np

from data.sim.scenes.base import Body, Part, Placement, Scene, State, Waypoint, block, distance

HALF = 0.025  # m, half the cube's edge
MARK = 0.05  # m, half the mark's edge: the cube's centre must come to lie inside
AHEAD = 0.13  # m from where the cube starts to the mark's centre
RANGE = ((-0.16, -0.04), (-0.12, 0.12))  # m: x and y of the cube at reset
BEHIND = HALF + 0.022  # m from the cube's centre to the TCP when it pushes
CLEAR = 0.03  # m: this much farther back on the way down, so that nothing is knocked
HEIGHT = 0.02  # m above the table at which the TCP pushes
ASIDE = 0.02  # m off the cube's line at which the push begins again from above


def layout(rng: np.random.Generator) -> dict[str, Placement]:
    x, y = (rng.uniform(*span) for span in RANGE)
    return {"cube": Placement(x=x, y=y, z=HALF), "mark": Placement(x=x + AHEAD, y=y, z=0.001)}


def behind(state: State) -> bool:
    """The TCP is low, close to the cube's near side, on its line."""
    back, aside = state.positions["cube"][:2] - state.tcp[:2]
    return bool(0 < back < BEHIND + CLEAR and abs(aside) < HALF and state.tcp[2] - state.table < 2 * HALF)


def moved(state: State) -> bool:
    return distance(state.positions["cube"][:2], state.initial["cube"][:2]) > 0.02


def on_mark(state: State) -> bool:
    return bool(np.all(np.abs(state.positions["cube"][:2] - state.positions["mark"][:2]) < MARK))


def expert(state: State) -> Waypoint:
    cube = state.positions["cube"]
    error = state.tcp - (cube - np.array([BEHIND + CLEAR, 0, 0]))
    low = state.table + HEIGHT
    aligned = abs(error[1]) < ASIDE and error[0] < CLEAR + 0.015
    if aligned and state.tcp[2] < low + HALF:
        return Waypoint(position=np.array([state.tcp[0] + 0.05, cube[1], low]), gripper=-1.0, speed=0.02)
    off = np.hypot(*np.clip(np.abs(error[:2]) - 0.012, 0, None))
    height = np.clip(4.0 * off, 0.0, 0.09)
    return Waypoint(position=np.array([cube[0] - BEHIND - CLEAR, cube[1], low + height]), gripper=-1.0)


SCENE = Scene(
    name="push_cube",
    task="push the blue cube onto the green mark",
    bodies=(
        block("cube", HALF, (0.05, 0.16, 0.7)),
        Body(
            name="mark",
            parts=(Part(half_size=(MARK, MARK, 0.001)),),
            color=(0.06, 0.5, 0.14),
            kind="marker",
        ),
    ),
    layout=layout,
    subgoals={"behind": behind, "move": moved, "on_mark": on_mark},
    success=on_mark,
    expert=expert,
    max_steps=80,
)
