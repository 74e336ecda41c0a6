"""Domain randomisation: what a seed draws, knob by knob.

Every knob has its own generator, derived from (seed, knob's name): switching one on or off leaves what the others draw
untouched. All off is the plain scene in which only the objects' places vary.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal
from zlib import crc32

import numpy as np
from jaxtyping import UInt8

from data.sim.scenes.base import Body, Color, Part, Placement, Scene, Vector

CLUTTER_AREA = ((-0.32, 0.22), (-0.38, 0.38))  # m: x and y between which clutter stands
_CLUTTER: list[tuple[Literal["box", "ball"], Vector]] = [
    ("box", (0.02, 0.02, 0.04)),
    ("ball", (0.025, 0.025, 0.025)),
    ("box", (0.03, 0.018, 0.012)),
    ("box", (0.015, 0.015, 0.03)),
    ("box", (0.025, 0.025, 0.008)),
    ("ball", (0.018, 0.018, 0.018)),
]
CLUTTER_BODIES = tuple(
    Body(name=f"clutter_{i}", parts=(Part(half_size=half, shape=shape),), color=(0.5, 0.5, 0.5))
    for i, (shape, half) in enumerate(_CLUTTER)
)
CLUTTER_RADIUS = 0.045  # m around an object's centre that holds all of it
TEXTURE_SIZE = 64  # pixels


@dataclass(frozen=True, kw_only=True)
class Randomization:
    """The knobs of RoboTwin and F1-VLA's simulator, by their names there."""

    random_background: bool = False  # procedural textures on table, wall and floor
    random_light: bool = False  # direction, colour and strength of sun and ambient light
    random_appearance: bool = False  # colours of the robot, and shades of the objects (never their hue)
    cluttered_table: bool = False  # 2 to 6 distractors, clear of the scene's objects
    random_table_height: float = 0.0  # m: the table is lowered by up to this
    camera_jitter: float = 0.0  # m: each camera is displaced by up to this along each axis (wrist: a quarter of it)


@dataclass(frozen=True, kw_only=True)
class Clutter:
    """One distractor."""

    index: int  # which of CLUTTER_BODIES
    x: float  # m
    y: float  # m
    yaw: float  # rad
    color: Color


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one seed drew. The defaults are the plain scene."""

    layout: dict[str, Placement]
    table_texture: int | None = None  # seed of `texture`; None: plain
    wall_texture: int | None = None
    floor_texture: int | None = None
    ambient: Color = (0.42, 0.42, 0.42)
    sun: Color = (1.9, 1.85, 1.75)  # strength per channel
    sun_direction: tuple[float, float, float] = (-0.5, -0.35, -1.0)  # the way the light travels
    robot_shade: Color = (1.0, 1.0, 1.0)  # factor on the robot's colours
    object_shade: dict[str, float] = field(default_factory=dict)  # body -> factor on its colour
    clutter: tuple[Clutter, ...] = ()
    table_drop: float = 0.0  # m
    head_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, world frame
    wrist_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)  # m, hand frame

    def summary(self) -> dict[str, float | int | bool | str]:
        """Flat and JSON-able, as datasets record it: numbers named "sun.0", "layout.cube.x", "clutter" (a count)."""
        flat: dict[str, float | int | bool | str] = {"clutter": len(self.clutter)}
        for key, value in asdict(self).items():
            if key != "clutter" and value is not None:
                flat.update(_flatten(key, value))
        return flat


def _flatten(key: str, value: Any) -> dict[str, float | int]:
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, tuple):
        parts = enumerate(value)
    else:
        return {key: value}
    return {name: number for part, inner in parts for name, number in _flatten(f"{key}.{part}", inner).items()}


def generator(seed: int, knob: str) -> np.random.Generator:
    """The stream of one knob under one seed."""
    return np.random.default_rng([seed, crc32(knob.encode())])


def draw(knobs: Randomization, scene: Scene, seed: int) -> Drawn:
    """Everything that `reset(seed=seed)` of `scene` places, colours and lights."""
    layout = {
        name: Placement(**{key: float(value) for key, value in asdict(place).items()})
        for name, place in scene.layout(generator(seed, "layout")).items()
    }
    drawn: dict = {}
    if knobs.random_background:
        drawn |= _background(generator(seed, "random_background"))
    if knobs.random_light:
        drawn |= _light(generator(seed, "random_light"))
    if knobs.random_appearance:
        drawn |= _appearance(generator(seed, "random_appearance"), scene)
    if knobs.cluttered_table:
        drawn["clutter"] = _clutter(generator(seed, "cluttered_table"), scene, layout)
    if knobs.random_table_height:
        drawn["table_drop"] = float(generator(seed, "random_table_height").uniform(0, knobs.random_table_height))
    if knobs.camera_jitter:
        offsets = generator(seed, "camera_jitter").uniform(-1, 1, 6) * knobs.camera_jitter
        drawn |= {"head_offset": _floats(offsets[:3]), "wrist_offset": _floats(offsets[3:] / 4)}
    return Drawn(layout=layout, **drawn)


def texture(seed: int | None, plain: Color) -> UInt8[np.ndarray, "h w 4"]:
    """A tileable picture: checks, stripes or blotches in two random colours; one colour, `plain`, without a seed."""
    picture = np.full((TEXTURE_SIZE, TEXTURE_SIZE, 4), 255, np.uint8)
    if seed is None:
        picture[..., :3] = np.asarray(plain) * 255
        return picture
    rng = np.random.default_rng(seed)
    weight = _PATTERNS[rng.integers(len(_PATTERNS))](rng)[..., None]
    one, other = rng.uniform(0.1, 0.85, 3), rng.uniform(0.1, 0.85, 3)
    colors = one * weight + other * (1 - weight) + rng.normal(0, 0.015, (TEXTURE_SIZE, TEXTURE_SIZE, 1))
    picture[..., :3] = np.clip(colors, 0, 1) * 255
    return picture


def _checks(rng: np.random.Generator) -> np.ndarray:
    cell = TEXTURE_SIZE // int(rng.choice([2, 4, 8]))
    row, column = np.indices((TEXTURE_SIZE, TEXTURE_SIZE)) // cell
    return ((row + column) % 2).astype(float)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    waves = rng.integers([1, 0], [6, 5])
    row, column = np.indices((TEXTURE_SIZE, TEXTURE_SIZE)) / TEXTURE_SIZE
    return 0.5 + 0.5 * np.sin(2 * np.pi * (waves[0] * row + waves[1] * column))


def _blotches(rng: np.random.Generator) -> np.ndarray:
    """Noise with a 1/f spectrum: wood-, stone- or cloth-like."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(TEXTURE_SIZE), np.fft.fftfreq(TEXTURE_SIZE)))
    frequency[0, 0] = 1.0
    spectrum = np.fft.fft2(rng.normal(size=(TEXTURE_SIZE, TEXTURE_SIZE))) / frequency ** rng.uniform(0.8, 1.6)
    noise = np.real(np.fft.ifft2(spectrum))
    return (noise - noise.min()) / np.ptp(noise)


_PATTERNS = (_checks, _stripes, _blotches)


def _floats(values) -> tuple:
    return tuple(float(value) for value in values)


def _background(rng: np.random.Generator) -> dict:
    table, wall, floor = (int(value) for value in rng.integers(0, 2**31, 3))
    return {"table_texture": table, "wall_texture": wall, "floor_texture": floor}


def _light(rng: np.random.Generator) -> dict:
    return {
        "ambient": _floats(rng.uniform(0.25, 0.6) * rng.uniform(0.85, 1.15, 3)),
        "sun": _floats(rng.uniform(1.0, 2.6) * rng.uniform(0.75, 1.25, 3)),
        "sun_direction": (*_floats(rng.uniform(-0.9, 0.9, 2)), -1.0),
    }


def _appearance(rng: np.random.Generator, scene: Scene) -> dict:
    robot = _floats(rng.uniform(0.55, 1.1) * rng.uniform(0.85, 1.15, 3))
    return {"robot_shade": robot, "object_shade": {body.name: float(rng.uniform(0.6, 1.25)) for body in scene.bodies}}


def _clutter(rng: np.random.Generator, scene: Scene, layout: dict[str, Placement]) -> tuple[Clutter, ...]:
    """Discs that overlap neither each other nor the scene's objects; one that finds no room in 50 tries is left out."""
    taken = [(layout[body.name].x, layout[body.name].y, body.clearance) for body in scene.bodies]
    placed: list[Clutter] = []
    for index in rng.permutation(len(CLUTTER_BODIES))[: rng.integers(2, len(CLUTTER_BODIES) + 1)]:
        color, yaw = _unlike(rng, scene), float(rng.uniform(-np.pi, np.pi))
        for x, y in np.transpose([rng.uniform(*span, 50) for span in CLUTTER_AREA]):
            if all(np.hypot(x - a, y - b) > radius + CLUTTER_RADIUS for a, b, radius in taken):
                placed.append(Clutter(index=int(index), x=float(x), y=float(y), yaw=yaw, color=color))
                taken.append((x, y, CLUTTER_RADIUS))
                break
    return tuple(placed)


def _unlike(rng: np.random.Generator, scene: Scene) -> Color:
    """A colour whose hue is far from those of the scene's objects, so that "the red cube" stays the only one."""
    while True:
        color = rng.uniform(0.05, 0.8, 3)
        if all(np.linalg.norm(color / color.max() - np.divide(b.color, max(b.color))) > 0.6 for b in scene.bodies):
            return _floats(color)
