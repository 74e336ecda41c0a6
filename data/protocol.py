"""Under which rules a policy was scored: one value, whose hash stands on every score."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version

from data.errors import BadInput
from data.sim.config import SimConfig
from data.sim.driver import resolve_device
from data.sim.execution import execution
from data.sim.registry import SCENES


@dataclass(frozen=True, kw_only=True)
class EvalProtocol:
    """Everything besides the policy that a success rate depends on. Scores with unequal hashes are not comparable."""

    scene: str  # registry name; its layout ranges, predicates and success are the simulator's code
    seeds: tuple[int, ...]  # one episode each, in this order: layout and randomisation (LIBERO: initial states)
    max_steps: int  # then the episode counts as failed
    waiting_steps: int = 0  # idle steps before the policy acts (LIBERO: 10, until all has settled; ours start at rest)
    replan: int | None = None  # actions executed per chunk; None: all of it
    temporal_ensemble: float | None = None  # ACT's m, when overlapping chunks are averaged
    control_mode: str
    control_hz: int  # actions per second
    substeps: int  # physics steps per action
    robot_body: str  # "primitive" or "mesh"
    cameras: tuple[str, ...]
    image_size: tuple[int, int]  # height, width in pixels
    orientation: str  # see `data.schema.Schema`
    gripper: str  # sign of the last action component, likewise
    randomization: dict[str, float | int | bool | str]  # the knobs, not what a seed drew
    renderer: str  # "sapien" or "none"
    simulator: str  # name and version
    device: str  # "cpu", "cuda" or "none": they round differently, while which of several GPUs does not matter

    @classmethod
    def of(
        cls,
        config: SimConfig,
        seeds: Sequence[int],
        *,
        replan: int | None = None,
        temporal_ensemble: float | None = None,
    ) -> "EvalProtocol":
        """The protocol of a rollout with these arguments on this machine. Raises `BadInput` as the rollout would."""
        execution(replan=replan, temporal_ensemble=temporal_ensemble)
        schema = config.schema()
        return cls(
            scene=config.scene,
            seeds=tuple(seeds),
            max_steps=config.max_steps or SCENES.resolve(config.scene).max_steps,
            replan=replan,
            temporal_ensemble=temporal_ensemble,
            control_mode=config.control_mode,
            control_hz=config.control_hz,
            substeps=config.substeps,
            robot_body=config.robot_body,
            cameras=config.seen,
            image_size=config.image_size,
            orientation=schema.orientation,
            gripper=schema.gripper,
            randomization=asdict(config.randomization),
            renderer="sapien" if config.seen else "none",
            simulator=f"sapien {version('sapien')}",
            device=resolve_device(config.device) if config.seen else "none",
        )

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "EvalProtocol":
        """Raises `BadInput` for a field that is unknown or missing: half a protocol has no hash worth comparing."""
        if wrong := set(value) ^ set(cls.__dataclass_fields__):
            raise BadInput(f"evaluation protocol: field {min(wrong)!r} is missing or unknown; write it with to_json")
        listed = {name: tuple(value[name]) for name in ("seeds", "cameras", "image_size")}
        return cls(**{**value, **listed})

    def refuse_collected(self, collected: Iterable[tuple[str, int]]) -> None:
        """Raise `BadInput` when a (scene, seed) that was collected would be evaluated: a score of memory, not skill."""
        seeds = {seed for scene, seed in collected if scene == self.scene}
        if seen := [seed for seed in self.seeds if seed in seeds]:
            raise BadInput(
                f"{len(seen)} evaluation seeds of {self.scene} were collected for training, e.g. {seen[0]}; "
                f"evaluate on others, e.g. from {max(seeds) + 1} on"
            )
