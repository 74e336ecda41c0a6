"""What makes one environment; apart from `data.sim.env`, so that `--help` need not wait for gymnasium."""

from dataclasses import dataclass, field

from data.errors import BadInput
from data.schema import Component, Schema
from data.sim import controllers
from data.sim.looks import CAMERAS
from data.sim.randomization import Randomization
from data.sim.registry import SCENES

RENDERERS = ("auto", "sapien", "none")
ROBOT_BODIES = ("primitive", "mesh")
STATE_COMPONENTS = (
    *(Component(name=f"joint_{i}.pos", unit="rad") for i in range(7)),
    Component(name="gripper.pos", unit="m"),  # between the pads
    *(Component(name=f"tcp.{axis}", unit="m") for axis in "xyz"),  # world frame
    *(Component(name=f"tcp.q{part}", unit="1") for part in "wxyz"),  # with qx >= 0: pointing down is (0, 1, 0, 0)
)


@dataclass(frozen=True, kw_only=True)
class SimConfig:
    """Everything that makes one environment; JSON-able by `dataclasses.asdict`."""

    scene: str  # name in data.sim.registry
    image_size: tuple[int, int] = (128, 128)  # height, width in pixels
    cameras: tuple[str, ...] = ("head", "wrist")  # of data.sim.looks; none = no pictures
    control_mode: str = "delta_qpos"  # "delta_qpos", "qpos", "delta_ee_pose": see data.sim.controllers
    control_hz: int = 20  # actions per second
    substeps: int = 5  # physics steps per action
    max_steps: int | None = None  # then the episode is truncated; None: the scene's own
    renderer: str = "auto"  # "sapien"; "none": no pictures, no Vulkan; "auto": sapien if there are cameras
    device: str = "auto"  # where pictures are made: "auto", "cpu", "cuda:N"
    robot_body: str = "primitive"  # how the robot looks; "mesh": as in the package example-robot-data
    randomization: Randomization = field(default_factory=Randomization)
    scene_reset_interval: int = 50  # episodes after which what is seen is built anew (physics always is); 0: never
    expert: bool = False  # info carries "expert_action" for the state it comes with

    def __post_init__(self) -> None:
        if self.renderer not in RENDERERS:
            raise BadInput(f"unknown renderer {self.renderer!r}; use one of {', '.join(RENDERERS)}")
        if self.renderer == "sapien" and not self.cameras:
            raise BadInput("renderer 'sapien' without cameras; name some, or use renderer 'none'")
        if unknown := set(self.cameras) - set(CAMERAS):
            raise BadInput(f"unknown camera {sorted(unknown)[0]!r}; known: {', '.join(CAMERAS)}")
        if self.robot_body not in ROBOT_BODIES:
            raise BadInput(f"unknown robot_body {self.robot_body!r}; use one of {', '.join(ROBOT_BODIES)}")
        if min(self.image_size) < 1 or min(self.control_hz, self.substeps) < 1:
            raise BadInput("image_size, control_hz and substeps of a simulation must be at least 1")
        controllers.controller(self.control_mode)
        SCENES.module(self.scene)

    @property
    def seen(self) -> tuple[str, ...]:
        """The cameras that take pictures."""
        return () if self.renderer == "none" else self.cameras

    @property
    def subgoal_names(self) -> tuple[str, ...]:
        return tuple(SCENES.resolve(self.scene).subgoals)

    def schema(self) -> Schema:
        """What its observations and actions mean."""
        return Schema(
            cameras=self.seen,
            image_size=self.image_size,
            state=STATE_COMPONENTS,
            action=controllers.controller(self.control_mode).components,
            fps=self.control_hz,
            control_mode=self.control_mode,
        )
