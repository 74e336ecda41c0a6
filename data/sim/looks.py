"""What an episode looks like: a render-only twin of the physics, kept from seed to seed and re-coloured in place.

```
 World (physics, per episode) -- poses() --> Looks (meshes, materials, lights, cameras) -- take() --> uint8 pictures
```
"""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from data.errors import BadInput
from data.sim import meshes, robot
from data.sim.driver import load_sapien
from data.sim.randomization import CLUTTER_BODIES, Drawn, texture
from data.sim.scenes.base import Body, Color, Part, Scene
from data.sim.world import TABLE, TABLE_CENTER

CAMERAS = ("head", "wrist")
HEAD_EYE, HEAD_TARGET, HEAD_FOV = (0.48, 0.22, 0.44), (-0.04, 0.0, 0.085), 0.68  # m, m, rad (vertical)
WRIST_EYE, WRIST_TARGET, WRIST_FOV = (0.09, 0.0, 0.015), (0.03, 0.0, 0.125), 1.2  # m in the hand's frame, rad
NEAR, FAR = 0.01, 10.0  # m
FLOOR = -0.75  # m
ELSEWHERE = (0.0, 0.0, -5.0)  # m: where unused clutter waits, out of sight
SURFACES: dict[str, Color] = {"table": (0.42, 0.36, 0.30), "wall": (0.55, 0.60, 0.66), "floor": (0.28, 0.28, 0.30)}
SHADER = Path(__file__).parent / "shader"


class Looks:
    """The visible side of one scene on one device."""

    def __init__(
        self,
        scene: Scene,
        *,
        cameras: tuple[str, ...],  # of CAMERAS
        image_size: tuple[int, int],  # height, width in pixels
        robot_body: str,  # "primitive" or "mesh"
        device: str,  # "auto", "cpu", "cuda:N"
    ) -> None:
        self._scene = scene
        self._sapien = load_sapien(device)
        self._sim = self._sapien.Scene([_render_system(self._sapien, device)])
        self._sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
        self._sapien.render.set_camera_shader_dir(str(SHADER))
        self._textures = {name: self._texture(color) for name, color in SURFACES.items()}
        self._materials = {name: self._textured(self._textures[name]) for name in SURFACES}
        self._entities: dict = {}
        self._sun = self._sim.add_directional_light([0, 0, -1], [1, 1, 1])
        self._add_room()
        self._add_robot(robot_body)
        for body in (*scene.bodies, *CLUTTER_BODIES):
            self._add_body(body)
        self._cameras = {name: self._camera(name, image_size) for name in cameras}

    def apply(self, drawn: Drawn) -> None:
        """Colours, textures, lights and camera places of one seed."""
        seeds = {"table": drawn.table_texture, "wall": drawn.wall_texture, "floor": drawn.floor_texture}
        for name, seed in seeds.items():
            self._textures[name].upload(texture(seed, SURFACES[name]))
        for name, color in robot.COLORS.items():
            self._materials[name].set_base_color(_rgba(np.multiply(color, drawn.robot_shade)))
        for body in self._scene.bodies:
            shade = drawn.object_shade.get(body.name, 1.0)
            self._materials[body.name].set_base_color(_rgba(np.multiply(body.color, shade)))
        for item in drawn.clutter:
            self._materials[CLUTTER_BODIES[item.index].name].set_base_color(_rgba(item.color))
        for body in CLUTTER_BODIES:
            self._entities[body.name].set_pose(self._sapien.Pose(ELSEWHERE))
        self._entities["table"].set_pose(self._sapien.Pose([*TABLE_CENTER, -drawn.table_drop]))
        self._sim.ambient_light = drawn.ambient
        self._sun.color = drawn.sun
        turn = self._sapien.math.shortest_rotation([1, 0, 0], drawn.sun_direction)
        self._sun.entity.set_pose(self._sapien.Pose([0, 0, 0], turn))
        self._aim(drawn)

    def take(self, poses: dict) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """One picture per camera, with links and bodies at `poses` (name -> sapien.Pose)."""
        for name, pose in poses.items():
            self._entities[name].set_pose(pose)
        self._sim.update_render()
        for camera in self._cameras.values():
            camera.take_picture()
        return {name: without_alpha(camera.get_picture("Color")) for name, camera in self._cameras.items()}

    def _aim(self, drawn: Drawn) -> None:
        """The head camera stands in the room, the wrist camera rides on the hand."""
        places = {
            "head": (np.add(HEAD_EYE, drawn.head_offset), HEAD_TARGET, (0, 0, 1)),
            "wrist": (np.add(WRIST_EYE, drawn.wrist_offset), WRIST_TARGET, (1, 0, 0)),
        }
        for name, camera in self._cameras.items():
            camera.local_pose = self._look_at(*places[name])

    def _look_at(self, eye, target, up):
        """Camera pose: SAPIEN's cameras look along x, with y to the left and z up."""
        forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
        left = np.cross(up, forward)
        left /= np.linalg.norm(left)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([forward, left, np.cross(forward, left)], axis=1)
        matrix[:3, 3] = eye
        return self._sapien.Pose(matrix)

    def _camera(self, name: str, image_size: tuple[int, int]):
        height, width = image_size
        camera = self._sapien.render.RenderCameraComponent(width, height)
        camera.set_fovy(HEAD_FOV if name == "head" else WRIST_FOV, compute_x=True)
        camera.near, camera.far = NEAR, FAR
        self._entities["floor" if name == "head" else robot.HAND].add_component(camera)  # the floor never moves
        return camera

    def _add_room(self) -> None:
        """A wall behind the robot, and a floor."""
        wall, floor = meshes.box((-1.6, 0, 0.5), (0.05, 3.0, 1.3)), meshes.box((0, 0, FLOOR - 0.05), (1.6, 3.0, 0.05))
        for name, mesh in {"wall": wall, "floor": floor, "table": _mesh(TABLE)}.items():
            self._add(name, [self._shape(mesh, self._materials[name])])

    def _add_robot(self, body: str) -> None:
        for name, color in robot.COLORS.items():
            self._materials[name] = self._plain(color)
        for link, pieces in robot.visuals(body).items():
            self._add(link, [self._piece(piece) for piece in pieces])

    def _add_body(self, body: Body) -> None:
        self._materials[body.name] = self._plain(body.color)
        self._add(body.name, [self._shape(_mesh(body), self._materials[body.name])])

    def _add(self, name: str, shapes: list) -> None:
        component = self._sapien.render.RenderBodyComponent()
        for shape in shapes:
            component.attach(shape)
        entity = self._entities[name] = self._sapien.Entity()
        entity.add_component(component)
        self._sim.add_entity(entity)

    def _piece(self, piece: robot.Visual):
        if isinstance(piece.mesh, Path):
            shape = self._sapien.render.RenderShapeTriangleMesh(str(piece.mesh))
        else:
            shape = self._shape(piece.mesh, self._materials[piece.color or "robot_light"])
        shape.local_pose = self._sapien.Pose([0, 0, 0], [np.cos(piece.yaw / 2), 0, 0, np.sin(piece.yaw / 2)])
        return shape

    def _shape(self, mesh: meshes.Mesh, material):
        return self._sapien.render.RenderShapeTriangleMesh(
            mesh.vertices, mesh.triangles, mesh.normals, mesh.uvs, material
        )

    def _plain(self, color: Color):
        return self._sapien.render.RenderMaterial(base_color=_rgba(color), specular=0.5)

    def _texture(self, color: Color):
        return self._sapien.render.RenderTexture2D(texture(None, color), "R8G8B8A8Unorm", srgb=False)

    def _textured(self, picture):
        material = self._sapien.render.RenderMaterial(specular=0.0)
        material.set_base_color_texture(picture)
        return material


def without_alpha(rgba: UInt8[np.ndarray, "height width 4"]) -> UInt8[np.ndarray, "height width 3"]:
    """RGB, channel by channel: `rgba[..., :3].copy()` takes five times as long, 6 % of a whole step."""
    rgb = np.empty((*rgba.shape[:2], 3), np.uint8)
    for channel in range(3):
        rgb[..., channel] = rgba[..., channel]
    return rgb


def _render_system(sapien, device: str):
    """SAPIEN's renderer on `device`. Raises `BadInput` if there is none."""
    try:
        return sapien.render.RenderSystem() if device == "auto" else sapien.render.RenderSystem(device)
    except RuntimeError as error:
        raise BadInput(
            f"SAPIEN finds no Vulkan device ({device}): {str(error)[:60]}; "
            "run `python -m data.sim.driver`, or use renderer 'none'"
        ) from error


def _mesh(body: Body) -> meshes.Mesh:
    return meshes.merge(*(_part_mesh(part) for part in body.parts))


def _part_mesh(part: Part) -> meshes.Mesh:
    if part.shape == "ball":
        return meshes.capsule(part.center, part.center, part.half_size[0])
    return meshes.box(part.center, part.half_size)


def _rgba(color) -> list[float]:
    return [float(min(value, 1.0)) for value in color] + [1.0]
