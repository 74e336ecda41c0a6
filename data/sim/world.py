"""The physics of one episode: robot, table and bodies, built afresh where a seed puts them.

Built afresh, because PhysX remembers: in a simulation that is re-arranged instead, the same seed gives slightly other
motion each time (contact and solver caches). Building takes about 10 ms. What is seen is apart, in `data.sim.looks`.
"""

import math

import numpy as np
from jaxtyping import Float

from data.sim import robot
from data.sim.driver import load_sapien
from data.sim.kinematics import TCP_HEIGHT, rotation_matrix
from data.sim.randomization import CLUTTER_BODIES, Drawn
from data.sim.scenes.base import Body, Part, Scene, State

TABLE = Body(
    name="table", parts=(Part(half_size=(0.62, 0.75, 0.02), center=(0, 0, -0.02)),), color=(1, 1, 1), kind="fixed"
)
TABLE_CENTER = (-0.25, 0.0)  # m
FRICTION = 0.8  # of everything but the finger pads
DENSITY = 400.0  # kg/m³: a 4 cm cube weighs 26 g


class World:
    """One simulation, from its reset on. Needs no renderer."""

    def __init__(self, scene: Scene, drawn: Drawn, *, timestep: float) -> None:
        sapien = self._sapien = load_sapien()
        sapien.physx.set_scene_config(enable_enhanced_determinism=True)
        self._sim = sapien.Scene([sapien.physx.PhysxCpuSystem()])
        self._sim.set_timestep(timestep)
        self._robot = robot.build(sapien, self._sim)
        self._joints = self._robot.active_joints
        self._links = {link.name: link for link in self._robot.links}
        self._table_height = -drawn.table_drop
        self._add(TABLE, [*TABLE_CENTER, self._table_height])
        self._entities = {body.name: self._add(body, *self._place(drawn, body)) for body in scene.bodies}
        self._initial = {name: entity.pose.p.astype(float) for name, entity in self._entities.items()}
        self._clutter = {body.name: self._add(body, *place) for body, place in self._clutter_places(drawn)}
        self._robot.set_qpos(np.concatenate([robot.REST, [robot.FINGER_TRAVEL] * 2]))
        self.drive(robot.REST, robot.FINGER_TRAVEL)

    def drive(self, joints: Float[np.ndarray, "7"], finger: float) -> None:
        """Send the drives to angles (rad) and a finger position (m); the next `advance` moves."""
        for joint, target in zip(self._joints, [*joints, finger, finger], strict=True):
            joint.set_drive_target(float(target))

    def advance(self, substeps: int) -> None:
        for _ in range(substeps):
            self._sim.step()

    def state(self) -> State:
        """This instant, for predicates, experts and observations."""
        qpos = self._robot.get_qpos().astype(float)
        hand = self._links[robot.HAND].entity_pose
        rotation = rotation_matrix(hand.q.tolist())
        touching = self._touching()
        left, right = ({name for pair in touching if finger in pair for name in pair} for finger in robot.FINGERS)
        return State(
            q=qpos[:7],
            opening=float(qpos[7] + qpos[8]),
            tcp=hand.p.astype(float) + rotation[:, 2] * TCP_HEIGHT,
            tcp_quaternion=hand.q.astype(float),
            tcp_rotation=rotation,
            positions={name: entity.pose.p.astype(float) for name, entity in self._entities.items()},
            speeds={name: self._speed(entity) for name, entity in self._entities.items()},
            initial=self._initial,
            held=frozenset((left & right) - set(robot.FINGERS)),
            touching=touching,
            table=self._table_height,
        )

    def poses(self) -> dict:
        """Where everything is that `Looks` shows: name of link or body -> sapien.Pose."""
        links = {name: link.entity_pose for name, link in self._links.items()}
        return links | {name: entity.pose for name, entity in (self._entities | self._clutter).items()}

    def _touching(self) -> frozenset[frozenset[str]]:
        """Pairs of names that press on each other."""
        return frozenset(
            frozenset(body.entity.name for body in contact.bodies)
            for contact in self._sim.get_contacts()
            if any(any(point.impulse) for point in contact.points)
        )

    def _speed(self, entity) -> float:
        body = entity.find_component_by_type(self._sapien.physx.PhysxRigidDynamicComponent)
        return 0.0 if body is None or body.kinematic else math.hypot(*body.linear_velocity)

    def _place(self, drawn: Drawn, body: Body) -> tuple[list[float], float]:
        place = drawn.layout[body.name]
        return [place.x, place.y, place.z + self._table_height], place.yaw

    def _clutter_places(self, drawn: Drawn):
        for item in drawn.clutter:
            body = CLUTTER_BODIES[item.index]
            yield body, ([item.x, item.y, body.parts[0].half_size[2] + self._table_height], item.yaw)

    def _add(self, body: Body, position: list[float], yaw: float = 0.0):
        """An entity for `body`; a marker has a pose and nothing else."""
        entity = self._sapien.Entity()
        entity.name = body.name
        entity.set_pose(self._sapien.Pose(position, [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]))
        if body.kind != "marker":
            component = self._sapien.physx.PhysxRigidDynamicComponent()
            for part in body.parts:
                component.attach(self._collision(part))
            component.kinematic = body.kind == "fixed"
            entity.add_component(component)
        self._sim.add_entity(entity)
        return entity

    def _collision(self, part: Part):
        physx = self._sapien.physx
        material = physx.PhysxMaterial(FRICTION, FRICTION, 0.0)
        if part.shape == "ball":
            shape = physx.PhysxCollisionShapeSphere(radius=part.half_size[0], material=material)
        else:
            shape = physx.PhysxCollisionShapeBox(half_size=part.half_size, material=material)
        shape.local_pose = self._sapien.Pose(part.center)
        shape.set_density(DENSITY)
        return shape
