"""The physics behind an environment: robot, table and bodies, built once and re-arranged for every seed.

SAPIEN ends the process (no exception) when something visible is added to a scene without a render system, so all that
is only seen lives in `data.sim.looks`, which a physics-only world does not have.
"""

import numpy as np
from jaxtyping import Float, UInt8

from data.sim import robot
from data.sim.driver import load_sapien
from data.sim.kinematics import TCP_HEIGHT, rotation_matrix
from data.sim.looks import Looks, render_system
from data.sim.randomization import CLUTTER_BODIES, Drawn
from data.sim.scenes.base import Body, Part, Scene, State

TABLE = Body(
    name="table", parts=(Part(half_size=(0.62, 0.75, 0.02), center=(0, 0, -0.02)),), color=(1, 1, 1), kind="fixed"
)
TABLE_CENTER = (-0.25, 0.0)  # m
PARKED = -5.0  # m: unused clutter floats here, under everything
FRICTION = 0.8  # of everything but the finger pads
DENSITY = 400.0  # kg/m³: a 4 cm cube weighs 26 g


class World:
    """One simulation. With `cameras` it renders; without, it needs no Vulkan device."""

    def __init__(
        self,
        scene: Scene,
        *,
        cameras: tuple[str, ...],  # of data.sim.looks.CAMERAS
        image_size: tuple[int, int],  # height, width in pixels
        clutter: bool,  # whether distractors may be asked for
        robot_body: str,  # "primitive" or "mesh"
        device: str,  # "auto", "cpu", "cuda:N": where pictures are made
        timestep: float,  # s
    ) -> None:
        self.scene = scene
        sapien = self._sapien = load_sapien(device)
        sapien.physx.set_scene_config(enable_enhanced_determinism=True)
        systems = [sapien.physx.PhysxCpuSystem()]
        if cameras:
            systems.append(render_system(sapien, device))
        self._sim = sapien.Scene(systems)
        self._sim.set_timestep(timestep)
        self.looks = Looks(sapien, self._sim, cameras, image_size) if cameras else None
        self._robot = robot.build(sapien, self._sim, body=robot_body, looks=self.looks)
        self._joints = self._robot.active_joints
        self._hand = next(link for link in self._robot.links if link.name == robot.HAND)
        self._table = self._add(TABLE)
        self._entities = {body.name: self._add(body) for body in scene.bodies}
        self._clutter = [self._add(body) for body in CLUTTER_BODIES] if clutter else []
        if self.looks:
            self.looks.mount_cameras(self._hand.entity)
        self._initial: dict[str, np.ndarray] = {}
        self._table_height = 0.0

    def arrange(self, drawn: Drawn) -> None:
        """Put everything where `drawn` says: the robot at rest, the bodies placed, nothing moving."""
        self._table_height = -drawn.table_drop
        self._robot.set_qpos(np.concatenate([robot.REST, [robot.FINGER_TRAVEL] * 2]))
        self._robot.set_qvel(np.zeros(9))
        self.drive(robot.REST, robot.FINGER_TRAVEL)
        self._put(self._table, [*TABLE_CENTER, self._table_height])
        for name, place in drawn.layout.items():
            position = np.array([place.x, place.y, place.z + self._table_height])
            self._put(self._entities[name], position, place.yaw)
            self._initial[name] = position
        self._arrange_clutter(drawn)
        if self.looks:
            self.looks.apply(self.scene, drawn)

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
        hand = self._hand.entity_pose
        rotation = rotation_matrix(hand.q.astype(float))
        poses = {name: entity.get_pose() for name, entity in self._entities.items()}
        touching = self._touching()
        left, right = ({name for pair in touching if finger in pair for name in pair} for finger in robot.FINGERS)
        return State(
            q=qpos[:7],
            opening=float(qpos[7] + qpos[8]),
            tcp=hand.p.astype(float) + rotation[:, 2] * TCP_HEIGHT,
            tcp_quaternion=hand.q.astype(float),
            tcp_rotation=rotation,
            positions={name: pose.p.astype(float) for name, pose in poses.items()},
            rotations={name: rotation_matrix(pose.q.astype(float)) for name, pose in poses.items()},
            speeds={name: self._speed(entity) for name, entity in self._entities.items()},
            initial=self._initial,
            held=frozenset((left & right) - set(robot.FINGERS)),
            touching=touching,
            table=self._table_height,
        )

    def images(self) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """One picture per camera, taken now."""
        return self.looks.take(self._sim) if self.looks else {}

    def snapshot(self) -> dict[str, np.ndarray]:
        """The physics as arrays; `restore` brings it back."""
        bodies = self._moving()
        return {
            "qpos": self._robot.get_qpos(),
            "qvel": self._robot.get_qvel(),
            "targets": np.array([joint.get_drive_target()[0, 0] for joint in self._joints]),
            "poses": np.array([[*b.entity.pose.p, *b.entity.pose.q] for b in bodies], np.float32).reshape(-1, 7),
            "velocities": np.array([[*b.linear_velocity, *b.angular_velocity] for b in bodies], np.float32).reshape(-1, 6),
        }

    def restore(self, snapshot: dict[str, np.ndarray]) -> None:
        """Back to a `snapshot` taken under the same arrangement."""
        self._robot.set_qpos(snapshot["qpos"])
        self._robot.set_qvel(snapshot["qvel"])
        self.drive(snapshot["targets"][:7], snapshot["targets"][7])
        for body, pose, velocity in zip(self._moving(), snapshot["poses"], snapshot["velocities"], strict=True):
            body.entity.set_pose(self._sapien.Pose(pose[:3], pose[3:]))
            body.linear_velocity, body.angular_velocity = velocity[:3], velocity[3:]

    def _arrange_clutter(self, drawn: Drawn) -> None:
        used = {item.index: item for item in drawn.clutter}
        for index, entity in enumerate(self._clutter):
            item = used.get(index)
            if item:
                height = CLUTTER_BODIES[index].parts[0].half_size[2] + self._table_height
                self._put(entity, [item.x, item.y, height], item.yaw)
            else:
                self._put(entity, [0.3 * index, 0.0, PARKED])
            self._rigid(entity).disable_gravity = item is None

    def _put(self, entity, position, yaw: float = 0.0) -> None:
        entity.set_pose(self._sapien.Pose(position, [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]))
        body = self._rigid(entity)
        if body is not None and not body.kinematic:
            body.linear_velocity, body.angular_velocity = np.zeros(3), np.zeros(3)

    def _touching(self) -> frozenset[frozenset[str]]:
        """Pairs of names that press on each other."""
        pairs = set()
        for contact in self._sim.get_contacts():
            names = frozenset(body.entity.name for body in contact.bodies)
            if names not in pairs and any(np.any(point.impulse) for point in contact.points):
                pairs.add(names)
        return frozenset(pairs)

    def _speed(self, entity) -> float:
        body = self._rigid(entity)
        return 0.0 if body is None or body.kinematic else float(np.linalg.norm(body.linear_velocity))

    def _moving(self) -> list:
        bodies = [self._rigid(entity) for entity in [*self._entities.values(), *self._clutter]]
        return [body for body in bodies if body is not None and not body.kinematic]

    def _rigid(self, entity):
        return entity.find_component_by_type(self._sapien.physx.PhysxRigidDynamicComponent)

    def _add(self, body: Body):
        """An entity for `body`, at the origin until it is put somewhere."""
        entity = self._sapien.Entity()
        entity.name = body.name
        if body.kind != "marker":
            component = self._sapien.physx.PhysxRigidDynamicComponent()
            for part in body.parts:
                component.attach(self._collision(part))
            component.kinematic = body.kind == "fixed"
            entity.add_component(component)
        if self.looks:
            entity.add_component(self.looks.visual(body))
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
