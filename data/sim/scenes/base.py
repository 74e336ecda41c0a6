"""What a scene is: a layout drawn from a seed, named predicates of the state, a success, and a scripted expert.

```
 y                   world frame: metres, z up, the table's top at z = -table_drop, the robot's base at x = -0.615,
 ^                   its TCP at rest above the origin, pointing down
 |
 +--> x  (away from the robot)
```
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

Vector = tuple[float, float, float]
Color = tuple[float, float, float]  # linear RGB in [0, 1]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One box or ball of a body, in the body's frame, in metres."""

    half_size: Vector  # a ball has its radius in all three
    center: Vector = (0.0, 0.0, 0.0)
    shape: Literal["box", "ball"] = "box"


@dataclass(frozen=True, kw_only=True)
class Body:
    """One object of a scene."""

    name: str
    parts: tuple[Part, ...]
    color: Color
    kind: Literal["dynamic", "fixed", "marker"] = "dynamic"  # moves; stays where the layout put it; only seen
    clearance: float = 0.12  # m around its centre that clutter keeps free: half the hand


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the layout puts a body; `z` is the height of its centre above the table's top."""

    x: float  # m
    y: float  # m
    z: float  # m
    yaw: float = 0.0  # rad


@dataclass(frozen=True, kw_only=True)
class State:
    """All that predicates and experts may look at: one instant of the simulation."""

    q: Float[np.ndarray, "7"]  # rad
    opening: float  # m between the finger pads
    tcp: Float[np.ndarray, "3"]  # m
    tcp_quaternion: Float[np.ndarray, "4"]  # w x y z
    tcp_rotation: Float[np.ndarray, "3 3"]
    positions: dict[str, Float[np.ndarray, "3"]]  # body -> centre, m
    speeds: dict[str, float]  # body -> m/s
    initial: dict[str, Float[np.ndarray, "3"]]  # body -> centre at reset, m
    held: frozenset[str]  # bodies that both fingers press on
    touching: frozenset[frozenset[str]] = field(default_factory=frozenset)  # pairs of bodies in contact
    table: float  # height of the table's top, m

    def up(self, body: str) -> float:
        """How far `body` stands above where it was at reset, in metres."""
        return float(self.positions[body][2] - self.initial[body][2])


@dataclass(frozen=True, kw_only=True)
class Waypoint:
    """What an expert wants next: the TCP's place, pointing down, and the gripper."""

    position: Float[np.ndarray, "3"]  # m
    gripper: float  # +1 opens, -1 closes
    speed: float = 0.03  # m per control step, at most


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One task. Adding one is a file with such a value and a line in `data.sim.registry`."""

    name: str
    task: str  # the instruction, in words
    bodies: tuple[Body, ...]
    layout: Callable[[np.random.Generator], dict[str, Placement]]  # body -> place; the whole range of the randomisation
    subgoals: dict[str, Callable[[State], bool]]  # in the order in which they are usually reached
    success: Callable[[State], bool]
    expert: Callable[[State], Waypoint]
    max_steps: int  # at 20 Hz; then the episode is truncated
    hold_steps: int = 3  # consecutive steps for which success must be true


def block(name: str, half: float, color: Color) -> Body:
    """A cube of edge 2·half metres."""
    return Body(name=name, parts=(Part(half_size=(half, half, half)),), color=color)


def distance(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    return math.dist(a, b)
