"""What a scene looks like: materials, textures, lights and cameras, changed in place for every seed."""

import numpy as np
from jaxtyping import UInt8

from data.errors import BadInput
from data.sim import meshes
from data.sim.randomization import CLUTTER_BODIES, Drawn, texture
from data.sim.scenes.base import Body, Color, Part, Scene
from data.sim.shaders import shader_dir

HEAD_EYE, HEAD_TARGET, HEAD_FOV = (0.50, 0.28, 0.46), (-0.03, 0.0, 0.06), 0.72  # m, m, rad (vertical)
WRIST_EYE, WRIST_TARGET, WRIST_FOV = (0.075, 0.0, 0.01), (0.0, 0.0, 0.125), 1.3  # m in the hand's frame, rad
NEAR, FAR = 0.01, 10.0  # m
CAMERAS = ("head", "wrist")
FLOOR = -0.75  # m
SURFACES: dict[str, Color] = {"table": (0.42, 0.36, 0.30), "wall": (0.55, 0.60, 0.66), "floor": (0.28, 0.28, 0.30)}
ROBOT_COLORS: dict[str, Color] = {"light": (0.86, 0.87, 0.88), "dark": (0.18, 0.19, 0.21)}


def render_system(sapien, device: str):
    """SAPIEN's renderer on `device`. Raises `BadInput` if there is none."""
    try:
        return sapien.render.RenderSystem() if device == "auto" else sapien.render.RenderSystem(device)
    except RuntimeError as error:
        raise BadInput(
            f"SAPIEN finds no Vulkan device ({device}): {str(error)[:60]}; "
            "run `python -m data.sim.driver`, or use renderer 'none'"
        ) from error


class Looks:
    """Everything visible of one simulation."""

    def __init__(self, sapien, sim, cameras: tuple[str, ...], image_size: tuple[int, int]) -> None:
        if unknown := set(cameras) - set(CAMERAS):
            raise BadInput(f"unknown camera {sorted(unknown)[0]!r}; known: {', '.join(CAMERAS)}")
        self._sapien, self._sim, self._size = sapien, sim, image_size
        self._names = cameras
        self._cameras: dict = {}
        software = sim.render_system.device.cuda_id < 0 if hasattr(sim.render_system.device, "cuda_id") else True
        self._shader = str(shader_dir()) if software else "default"
        sapien.render.set_camera_shader_dir(self._shader)
        self._textures = {name: self._texture(color) for name, color in SURFACES.items()}
        self._materials = {name: self._textured(name) for name in SURFACES}
        self._robot = {name: self._plain(color) for name, color in ROBOT_COLORS.items()}
        self._sun = sim.add_directional_light([0, 0, -1], [1, 1, 1])
        self._add_room()

    def visual(self, body: Body):
        """The picture of `body`, a component for its entity."""
        if body.name not in self._materials:
            self._materials[body.name] = self._plain(body.color)
        component = self._sapien.render.RenderBodyComponent()
        mesh = meshes.merge(*(_part_mesh(part) for part in body.parts))
        component.attach(self._shape(mesh, self._materials[body.name]))
        return component

    def robot_visual(self, light: list[meshes.Mesh], dark: list[meshes.Mesh]):
        """The picture of one link: its white and its grey parts."""
        component = self._sapien.render.RenderBodyComponent()
        for name, parts in (("light", light), ("dark", dark)):
            if parts:
                component.attach(self._shape(meshes.merge(*parts), self._robot[name]))
        return component

    def mount_cameras(self, hand) -> None:
        """Make the cameras: "head" stands in the room, "wrist" rides on the entity `hand`."""
        mount = self._sapien.Entity()
        self._sim.add_entity(mount)
        for name in self._names:
            camera = self._sapien.render.RenderCameraComponent(self._size[1], self._size[0])
            camera.set_fovy(HEAD_FOV if name == "head" else WRIST_FOV, compute_x=True)
            camera.near, camera.far, camera.name = NEAR, FAR, name
            (mount if name == "head" else hand).add_component(camera)
            self._cameras[name] = camera

    def apply(self, scene: Scene, drawn: Drawn) -> None:
        """Colours, textures, lights and camera places of one seed."""
        for name, seed in (
            ("table", drawn.table_texture),
            ("wall", drawn.wall_texture),
            ("floor", drawn.floor_texture),
        ):
            self._textures[name].upload(texture(seed, SURFACES[name]))
        for name, color in ROBOT_COLORS.items():
            self._robot[name].set_base_color(_rgba(np.multiply(color, drawn.robot_shade)))
        for body in scene.bodies:
            shade = (drawn.object_shade or {}).get(body.name, 1.0)
            self._materials[body.name].set_base_color(_rgba(np.multiply(body.color, shade)))
        for item in drawn.clutter:
            self._materials[CLUTTER_BODIES[item.index].name].set_base_color(_rgba(item.color))
        self._sim.ambient_light = drawn.ambient
        self._sun.color = drawn.sun
        turn = self._sapien.math.shortest_rotation([1, 0, 0], drawn.sun_direction)
        self._sun.entity.set_pose(self._sapien.Pose([0, 0, 0], turn))
        offsets = {"head": drawn.head_offset, "wrist": drawn.wrist_offset}
        places = {"head": (HEAD_EYE, HEAD_TARGET), "wrist": (WRIST_EYE, WRIST_TARGET)}
        for name, camera in self._cameras.items():
            eye, target = places[name]
            camera.local_pose = self._look_at(np.add(eye, offsets[name]), target, up=(0, 0, 1) if name == "head" else (1, 0, 0))

    def take(self, sim) -> dict[str, UInt8[np.ndarray, "height width 3"]]:
        """Render every camera and copy the pictures."""
        sim.update_render()
        for camera in self._cameras.values():
            camera.take_picture()
        return {name: _to_uint8(camera.get_picture("Color")) for name, camera in self._cameras.items()}

    def _look_at(self, eye, target, up):
        """Camera pose: SAPIEN's cameras look along x, with y to the left and z up."""
        forward = np.subtract(target, eye) / np.linalg.norm(np.subtract(target, eye))
        left = np.cross(up, forward)
        left /= np.linalg.norm(left)
        matrix = np.eye(4)
        matrix[:3, :3] = np.stack([forward, left, np.cross(forward, left)], axis=1)
        matrix[:3, 3] = eye
        return self._sapien.Pose(matrix)

    def _add_room(self) -> None:
        """A wall behind the robot and a floor."""
        for name, mesh in (
            ("wall", meshes.box((-1.6, 0, 0.5), (0.05, 3.0, 1.3))),
            ("floor", meshes.box((0, 0, FLOOR - 0.05), (1.6, 3.0, 0.05))),
        ):
            entity = self._sapien.Entity()
            component = self._sapien.render.RenderBodyComponent()
            component.attach(self._shape(mesh, self._materials[name]))
            entity.add_component(component)
            self._sim.add_entity(entity)

    def _shape(self, mesh: meshes.Mesh, material):
        return self._sapien.render.RenderShapeTriangleMesh(
            mesh.vertices, mesh.triangles, mesh.normals, mesh.uvs, material
        )

    def _plain(self, color: Color):
        return self._sapien.render.RenderMaterial(base_color=_rgba(color), roughness=0.5, specular=0.4)

    def _texture(self, color: Color):
        return self._sapien.render.RenderTexture2D(texture(None, color), "R8G8B8A8Unorm", srgb=False)

    def _textured(self, name: str):
        material = self._sapien.render.RenderMaterial(roughness=0.9, specular=0.1)
        material.set_base_color_texture(self._textures[name])
        return material


def _part_mesh(part: Part) -> meshes.Mesh:
    if part.shape == "ball":
        return meshes.capsule(part.center, part.center, part.half_size[0])
    return meshes.box(part.center, part.half_size)


def _rgba(color) -> list[float]:
    return [float(min(value, 1.0)) for value in color] + [1.0]


def _to_uint8(picture) -> UInt8[np.ndarray, "height width 3"]:
    return (np.clip(picture[..., :3], 0, 1) * 255).astype(np.uint8)
