"""Bring the TCP to a ball that hangs in the air."""

import numpy as np

from data.sim.scenes.base import Body, Part, Placement, Scene, State, Waypoint, distance

RADIUS = 0.022  # m: of the ball, and within which the TCP counts as there
RANGE = ((-0.12, 0.10), (-0.2, 0.2), (0.06, 0.26))  # m: x, y, z above the table


def layout(rng: np.random.Generator) -> dict[str, Placement]:
    x, y, z = (rng.uniform(*span) for span in RANGE)
    return {"goal": Placement(x=x, y=y, z=z)}


def near(state: State) -> bool:
    return distance(state.tcp, state.positions["goal"]) < 0.06


def reached(state: State) -> bool:
    return distance(state.tcp, state.positions["goal"]) < RADIUS


def expert(state: State) -> Waypoint:
    return Waypoint(position=state.positions["goal"], gripper=1.0)


SCENE = Scene(
    name="reach",
    task="move the gripper to the green ball",
    bodies=(
        Body(
            name="goal",
            parts=(Part(half_size=(RADIUS, RADIUS, RADIUS), shape="ball"),),
            color=(0.05, 0.55, 0.12),
            kind="marker",
        ),
    ),
    layout=layout,
    subgoals={"near": near, "reach": reached},
    success=reached,
    expert=expert,
    max_steps=50,
)
