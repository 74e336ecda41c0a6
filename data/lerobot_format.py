"""What all LeRobot versions share: `meta/info.json`, where each episode lies, and our names for foreign keys."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data.schema import ACTION, IMAGE, REWARD, STATE, SUBGOAL, SUCCESS
from data.untrusted import RESTORE, fault, load_json

INFO = "meta/info.json"
FLYWHEEL = "meta/flywheel.json"  # ours: schema and sub-goal names
ROLLOUTS = "meta/rollouts.parquet"  # ours: one row per episode, who acted where
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")  # columns every version has

# Keys that other collections use, with "/" read as ".", and what they mean here.
ALIASES = {
    "state": STATE,
    "actions": ACTION,
    "reward": REWARD,
    "success": SUCCESS,
    "subgoal": SUBGOAL + "reached",
}
STATE_PARTS = ("joint_states", "gripper_states")  # of a state that is recorded in parts, as LIBERO's; in this order


def canonical(key: str, *, visual: bool) -> str:
    """Our name of a stored feature: `observation/image` -> `observation.images.image`, `actions` -> `action`."""
    name = key.replace("/", ".")
    short = name.removeprefix(IMAGE).removeprefix("observation.").removeprefix("obs.")
    if visual:
        return IMAGE + short
    return short if short in STATE_PARTS else ALIASES.get(name, name)


# ---------------------------------------------------------------- meta/info.json

_FIELD = r"\{(?:chunk_index|file_index|episode_chunk|episode_index)(?::0[1-9]d)?\}|\{video_key\}"
_TEMPLATE = re.compile(rf"(?:[A-Za-z0-9_.\-/]|{_FIELD}){{1,200}}")


def _template(value: str) -> str:
    if not _TEMPLATE.fullmatch(value) or value.startswith("/") or ".." in value:
        raise ValueError("is no path template below the dataset")
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # some writers say 30.0


Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]{0,99}$")]
Template = Annotated[str, AfterValidator(_template)]
Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
_STRICT = ConfigDict(strict=True, frozen=True, extra="allow")  # allow: later LeRobot versions add keys


class Feature(BaseModel):
    """One feature as `info.json` declares it."""

    model_config = _STRICT
    dtype: Literal[
        "image", "video", "string", "bool", "float16", "float32", "float64",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    ]  # fmt: skip
    shape: Annotated[list[Annotated[int, Field(ge=1, le=100_000)]], Field(min_length=1, max_length=4)]
    names: Any = None

    @property
    def visual(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def height_width(self) -> tuple[int, int]:
        """Of a camera; some writers declare channels first."""
        a, b, c = self.shape
        return (b, c) if a == 3 and c != 3 else (a, b)

    @property
    def component_names(self) -> list[str]:
        """Of a vector: as declared, flat or in groups, or numbered when the declaration does not fit the width."""
        groups = self.names.values() if isinstance(self.names, dict) else [self.names]
        flat = [str(n) for group in groups if isinstance(group, list) for n in group]
        return flat if len(flat) == self.shape[0] else [str(i) for i in range(self.shape[0])]


class Info(BaseModel):
    """`meta/info.json`, as far as we read it."""

    model_config = _STRICT
    codebase_version: Literal["v2.0", "v2.1", "v3.0"]
    fps: Annotated[int, Field(ge=1, le=1000), BeforeValidator(_whole)]
    features: Annotated[dict[Key, Feature], Field(min_length=1)]
    total_episodes: Annotated[Count, Field(ge=1)]
    total_frames: Annotated[Count, Field(ge=1)]
    total_tasks: Count
    chunks_size: Annotated[Count, Field(ge=1)] = 1000
    data_path: Template
    video_path: Template | None = None


def load_info(root: Path) -> Info:
    raw = load_json(root, INFO)
    try:
        info = Info.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(p) for p in first["loc"] if p != "[key]") or "the whole file"
        remedy = "correct it, or convert the dataset with LeRobot's tools"
        raise fault(root, INFO, f"{at}: {first['msg'].removeprefix('Value error, ')}", remedy) from None
    _check_features(root, info)
    return info


def _check_features(root: Path, info: Info) -> None:
    names: dict[str, str] = {}
    for key, feature in info.features.items():
        if (twin := names.setdefault(canonical(key, visual=feature.visual), key)) != key:
            raise fault(root, INFO, f"features '{twin}' and '{key}' mean the same", "drop one of them")
        if feature.visual and (len(feature.shape) != 3 or 3 not in (feature.shape[0], feature.shape[2])):
            raise fault(root, INFO, f"{key}: shape {feature.shape} is no RGB picture", "drop this camera")
        if feature.dtype == "video" and "{video_key}" not in (info.video_path or ""):
            raise fault(root, INFO, f"video_path is {info.video_path!r}: no place for '{key}'", "use LeRobot's own")
        if key in BOOKKEEPING and feature.shape != [1]:
            raise fault(root, INFO, f"{key}: shape is {feature.shape}", "declare [1]")
    if ACTION not in names:
        raise fault(root, INFO, "declares no feature 'action'", "record the executed actions")
    for name in (ACTION, STATE, *STATE_PARTS):
        if (feature := info.features.get(names.get(name, ""))) and len(feature.shape) != 1:
            raise fault(root, INFO, f"{name}: shape {feature.shape} is no vector", "flatten it")


# ---------------------------------------------------------------- what both layouts say


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What `meta/` says, whichever layout it is written in."""

    root: Path
    info: Info
    tasks: dict[int, str]  # task_index -> instruction
    # One row per episode, in order: episode_index, length, data_file, and for each video feature KEY
    # "file/KEY" and "start/KEY", the frame of that file with which the episode begins.
    episodes: pl.DataFrame
    stats: dict[str, dict[str, Any]] | None  # per feature; None when the layout keeps none for the whole dataset

    @property
    def cameras(self) -> dict[str, str]:
        """Camera name -> stored feature key."""
        return {canonical(k, visual=True).removeprefix(IMAGE): k for k, f in self.info.features.items() if f.visual}

    @property
    def vectors(self) -> dict[str, Feature]:
        """Our name of everything that is no picture -> how it is stored."""
        return {canonical(k, visual=False): f for k, f in self.info.features.items() if not f.visual}

    @property
    def state_parts(self) -> tuple[str, ...]:
        """The columns that make up the state, if no single one is the state."""
        whole = STATE in self.vectors or not set(STATE_PARTS) <= self.vectors.keys()
        return () if whole else STATE_PARTS


def first(mask: ArrayLike) -> int | None:
    """Position of the first True."""
    mask = np.asarray(mask)
    return int(mask.argmax()) if mask.any() else None


def check_meta(meta: Meta, file: str) -> Meta:
    """`meta` when its episode table (in `file`) and tasks agree with `info.json`."""
    info, episodes, root = meta.info, meta.episodes, meta.root
    index, length = episodes["episode_index"], episodes["length"]
    if len(episodes) != info.total_episodes:
        raise fault(root, file, f"lists {len(episodes)} episodes, but info.json says {info.total_episodes}", RESTORE)
    if (wrong := first(index.to_numpy() != np.arange(len(index)))) is not None:
        raise fault(root, file, f"row {wrong} is episode {index[wrong]}", "list the episodes 0, 1, 2 ... in order")
    if (shortest := cast(int, length.min())) < 1:
        raise fault(root, file, f"episode {length.arg_min()}: length is {shortest}", "drop empty episodes")
    if length.sum() != info.total_frames:
        what = f"lengths add up to {length.sum()}, but info.json says {info.total_frames} frames"
        raise fault(root, file, what, RESTORE)
    if len(meta.tasks) != info.total_tasks:
        raise fault(root, INFO, f"total_tasks is {info.total_tasks}, but {len(meta.tasks)} are listed", RESTORE)
    for number, task in meta.tasks.items():
        if len(task) > 10_000 or any(ord(c) < 32 for c in task):
            raise fault(root, file, f"task {number} holds control characters or is endless", "write plain words")
    return meta
