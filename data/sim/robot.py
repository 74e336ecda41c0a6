"""A Franka Panda that needs no download: built from its published kinematics, masses and capsule geometry.

`robot_body="mesh"` shows the meshes of the package `example-robot-data` instead; the physics stays the same, so equal
seeds and actions give equal motion under either look.
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from data.errors import BadInput
from data.sim import meshes
from data.sim.kinematics import FLANGE_HEIGHT, HAND_TURN, JOINT_HIGH, JOINT_LOW, JOINT_ORIGINS

BASE = (-0.615, 0.0, 0.0)  # m: the base stands here, so that the TCP rests above the world's origin
REST = np.array([0.0, np.pi / 8, 0.0, -5 * np.pi / 8, 0.0, 3 * np.pi / 4, np.pi / 4])  # rad
FINGER_TRAVEL = 0.04  # m per finger; the opening is twice that
FINGER_HEIGHT = 0.0584  # m along z of the hand's frame, where the fingers' frames are
FINGERS = ("panda_leftfinger", "panda_rightfinger")
HAND = "panda_hand"

# Drives act on acceleration: a joint is a critically damped oscillator whatever the arm's pose, and covers most of a
# commanded step within one control period of 50 ms.
ARM_STIFFNESS = 6400.0  # 1/s²
ARM_DAMPING = 160.0  # 1/s
ARM_ARMATURE = 0.3  # kg m²: the rotors' inertia seen through the gears; keeps joints from disturbing one another
LEAST_INERTIA = 1e-4  # kg m²: the solver dislikes less
ARM_FORCE = 200.0  # N m, about twice what the real joints hold: enough for the accelerations above
FINGER_STIFFNESS = 1000.0  # N/m
FINGER_DAMPING = 100.0  # N s/m
FINGER_FORCE = 70.0  # N, the real hand's continuous grasp force
FINGER_FRICTION = 2.0  # rubber pads

_HALF = float(np.sqrt(0.5))
X_TO_Z = (_HALF, 0.0, -_HALF, 0.0)  # quaternions w x y z
X_TO_Y, X_TO_MINUS_Y = (_HALF, 0.0, 0.0, _HALF), (_HALF, 0.0, 0.0, -_HALF)

COLORS = {"robot_light": (0.86, 0.87, 0.88), "robot_dark": (0.18, 0.19, 0.21)}


@dataclass(frozen=True, kw_only=True)
class Capsule:
    """A capsule in its link's frame, in metres."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float
    dark: bool = False  # the grey of the joints instead of the white of the links


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box in its link's frame, in metres."""

    center: tuple[float, float, float]
    half_size: tuple[float, float, float]
    dark: bool = False


@dataclass(frozen=True, kw_only=True)
class Link:
    """One rigid part. Masses: Gaz et al. 2019, "Dynamic identification of the Franka Emika Panda robot"."""

    name: str
    mass: float  # kg
    shapes: tuple[Capsule | Box, ...]
    solid: bool = True  # takes part in collisions


LINKS = (
    Link(
        name="panda_link0",
        mass=0.63,
        solid=False,
        shapes=(
            Box(center=(-0.04, 0, 0.02), half_size=(0.11, 0.095, 0.02), dark=True),
            Capsule(start=(-0.08, 0, 0.07), end=(0, 0, 0.07), radius=0.065),
            Capsule(start=(0, 0, 0.06), end=(0, 0, 0.13), radius=0.075),
        ),
    ),
    Link(
        name="panda_link1",
        mass=4.97,
        solid=False,
        shapes=(
            Capsule(start=(0, 0, -0.15), end=(0, 0, -0.03), radius=0.065),
            Capsule(start=(0, -0.07, 0), end=(0, 0.0, 0), radius=0.062),
        ),
    ),
    Link(
        name="panda_link2",
        mass=0.65,
        solid=False,
        shapes=(
            Capsule(start=(0, 0, 0), end=(0, 0, 0.07), radius=0.06, dark=True),
            Capsule(start=(0, 0, 0.04), end=(0, -0.16, 0.0), radius=0.058),
        ),
    ),
    Link(
        name="panda_link3",
        mass=3.23,
        solid=False,
        shapes=(
            Capsule(start=(0, 0, -0.13), end=(0, 0, -0.06), radius=0.062),
            Capsule(start=(0.02, 0, -0.05), end=(0.0825, 0.0, 0), radius=0.058),
        ),
    ),
    Link(
        name="panda_link4",
        mass=3.59,
        shapes=(
            Capsule(start=(0, 0, -0.06), end=(0, 0, 0.06), radius=0.056, dark=True),
            Capsule(start=(0, 0, 0), end=(-0.0825, 0.1, 0), radius=0.06),
        ),
    ),
    Link(
        name="panda_link5",
        mass=1.23,
        shapes=(
            Capsule(start=(0, 0, -0.26), end=(0, 0, -0.2), radius=0.06),
            Capsule(start=(0, 0.04, -0.2), end=(0, 0.06, -0.04), radius=0.04),
            Capsule(start=(0, 0.0, 0), end=(0, 0.06, 0), radius=0.048),
        ),
    ),
    Link(
        name="panda_link6",
        mass=1.67,
        shapes=(
            Capsule(start=(0, 0, -0.05), end=(0, 0, 0.01), radius=0.05, dark=True),
            Capsule(start=(0, 0, 0), end=(0.088, 0.0, 0), radius=0.046),
        ),
    ),
    Link(
        name="panda_link7",
        mass=0.74,
        shapes=(
            Capsule(start=(0, 0, -0.03), end=(0, 0, 0.055), radius=0.045),
            Capsule(start=(0, 0, 0.07), end=(0, 0, 0.08), radius=0.042, dark=True),
        ),
    ),
    Link(
        name=HAND,
        mass=0.73,
        shapes=(
            Box(center=(0, 0, 0.02), half_size=(0.03, 0.045, 0.03)),
            Box(center=(0, 0, 0.045), half_size=(0.024, 0.1, 0.018)),
        ),
    ),
    Link(
        name=FINGERS[0],
        mass=0.015,
        shapes=(Box(center=(0, 0.008, 0.027), half_size=(0.0105, 0.008, 0.027), dark=True),),
    ),
    Link(
        name=FINGERS[1],
        mass=0.015,
        shapes=(Box(center=(0, -0.008, 0.027), half_size=(0.0105, 0.008, 0.027), dark=True),),
    ),
)


def build(sapien, sim):
    """Add the robot's physics to `sim`, its base at BASE, and return the articulation."""
    robot = _articulation(sapien, sim)
    robot.set_root_pose(sapien.Pose(BASE))
    _set_drives(robot)
    return robot


@dataclass(frozen=True, kw_only=True)
class Visual:
    """One piece of a link's look, in the link's frame."""

    mesh: meshes.Mesh | Path  # a file brings its own colours
    color: str | None = None  # one of COLORS, for a mesh
    yaw: float = 0.0  # rad about z


def visuals(body: str) -> dict[str, list[Visual]]:
    """What each link looks like, for a `robot_body` of "primitive" or "mesh"."""
    if body == "primitive":
        return {link.name: _primitives(link) for link in LINKS}
    turns = {FINGERS[1]: np.pi}  # one file serves both fingers
    pairs = zip(LINKS, _mesh_files(), strict=True)
    return {link.name: [Visual(mesh=file, yaw=turns.get(link.name, 0.0))] for link, file in pairs}


def _primitives(link: Link) -> list[Visual]:
    pieces = []
    for color, dark in (("robot_light", False), ("robot_dark", True)):
        shapes = [_mesh(shape) for shape in link.shapes if shape.dark == dark]
        if shapes:
            pieces.append(Visual(mesh=meshes.merge(*shapes), color=color))
    return pieces


def _mesh_files() -> list[Path]:
    """The visual meshes of LINKS in the package example-robot-data (Apache-2.0). Raises `BadInput` if it is absent."""
    places = [Path(place) / "cmeel.prefix/share/example-robot-data/robots/panda_description" for place in sys.path]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise BadInput("robot_body 'mesh' needs the package example-robot-data; run `uv pip install -e '.[meshes]'`")
    names = [*(f"link{i}" for i in range(8)), "hand", "finger", "finger"]
    return [found / "meshes" / "visual" / f"{name}.dae" for name in names]


def _set_drives(robot) -> None:
    for link in robot.links:
        link.disable_gravity = True  # the real arm compensates its own weight
        for shape in link.collision_shapes:
            shape.set_collision_groups([1, 1, 1, 0])  # bit in common: the robot's links pass through one another
    for joint in robot.active_joints[:7]:
        joint.set_armature([ARM_ARMATURE])
        joint.set_drive_properties(ARM_STIFFNESS, ARM_DAMPING, ARM_FORCE, mode="acceleration")
    for joint in robot.active_joints[7:]:
        joint.set_drive_properties(FINGER_STIFFNESS, FINGER_DAMPING, FINGER_FORCE, mode="force")


def _articulation(sapien, sim):
    builder = sim.create_articulation_builder()
    friction = sapien.physx.PhysxMaterial(FINGER_FRICTION, FINGER_FRICTION, 0.0)
    links = []
    for index, link in enumerate(LINKS):
        parent = None if index == 0 else links[min(index - 1, 8)]  # both fingers hang on the hand
        part = builder.create_link_builder(parent)
        part.set_name(link.name)
        _set_joint(sapien, part, index)
        center, inertia = _inertia(link)
        part.set_mass_and_inertia(link.mass, sapien.Pose(center), inertia)
        if link.solid:
            for shape in link.shapes:
                _add_collision(sapien, part, shape, friction if link.name in FINGERS else None)
        links.append(part)
    return builder.build(fix_root_link=True)


def _set_joint(sapien, part, index: int) -> None:
    """Join link `index` to its parent. SAPIEN's joints turn about, or slide along, the x axis of their own frame."""
    if index == 0:
        return
    if index <= 7:
        position, roll = JOINT_ORIGINS[index - 1]
        name, kind, limits = f"panda_joint{index}", "revolute", (JOINT_LOW[index - 1], JOINT_HIGH[index - 1])
        origin, turn = sapien.Pose(position, [np.cos(roll / 2), np.sin(roll / 2), 0, 0]), X_TO_Z
    elif index == 8:
        name, kind, limits = "panda_hand_joint", "fixed", ()
        origin = sapien.Pose([0, 0, FLANGE_HEIGHT], [np.cos(HAND_TURN / 2), 0, 0, np.sin(HAND_TURN / 2)])
        turn = X_TO_Z
    else:
        name, kind, limits = f"panda_finger_joint{index - 8}", "prismatic", (0.0, FINGER_TRAVEL)
        origin, turn = sapien.Pose([0, 0, FINGER_HEIGHT]), X_TO_Y if index == 9 else X_TO_MINUS_Y
    axis = sapien.Pose([0, 0, 0], turn)
    part.set_joint_name(name)
    part.set_joint_properties(kind, [limits], origin * axis, axis)


@cache
def _inertia(link: Link) -> tuple[np.ndarray, np.ndarray]:
    """Centre (m) and principal inertia (kg m²): the mass spread evenly over the box around the link's shapes."""
    corners = np.concatenate([_corners(shape) for shape in link.shapes])
    low, high = corners.min(axis=0), corners.max(axis=0)
    square = (high - low) ** 2
    return (low + high) / 2, np.maximum(link.mass / 12 * (square.sum() - square), LEAST_INERTIA)


def _corners(shape: Capsule | Box) -> np.ndarray:
    if isinstance(shape, Box):
        return np.stack([np.subtract(shape.center, shape.half_size), np.add(shape.center, shape.half_size)])
    ends = np.array([shape.start, shape.end])
    return np.concatenate([ends - shape.radius, ends + shape.radius])


def _add_collision(sapien, part, shape: Capsule | Box, material) -> None:
    if isinstance(shape, Box):
        part.add_box_collision(sapien.Pose(shape.center), shape.half_size, material)
        return
    along = np.subtract(shape.end, shape.start)
    turn = sapien.math.shortest_rotation([1, 0, 0], along / np.linalg.norm(along))
    pose = sapien.Pose(np.add(shape.start, shape.end) / 2, turn)
    part.add_capsule_collision(pose, shape.radius, float(np.linalg.norm(along) / 2), material)


def _mesh(shape: Capsule | Box) -> meshes.Mesh:
    if isinstance(shape, Box):
        return meshes.box(shape.center, shape.half_size)
    return meshes.capsule(shape.start, shape.end, shape.radius)
