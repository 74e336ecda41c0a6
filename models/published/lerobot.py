"""What every policy that LeRobot saved has in common on disk: features, the numbers that scale them, weights.

```
config.json                    features, sizes
model.safetensors              weights; before LeRobot 0.4 also the statistics, as buffers
policy_preprocessor.json       since then: how inputs are scaled, and the file with the statistics
policy_postprocessor.json      how actions are scaled back
```
Only JSON and safetensors are read, without LeRobot. Of the processors the names and options count, never a class path.
LeRobot's own migration of the buffers takes each "_" of a camera's name for a "."; here names come from the features.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from data.lerobot_format import canonical
from data.normalize import Normalizer, Stats
from data.schema import ACTION, IMAGE, STATE, Component, Schema
from data.untrusted import fault, load_json
from models.checkpoint import read_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
AROUND = "observation.environment_state"
# What need not happen here: names are mapped and the device is chosen by us, a batch is one already.
SKIPPED = {"rename_observations_processor", "to_batch_processor", "device_processor"}
SCALING = {"normalizer_processor", "unnormalizer_processor"}
BUFFERS = ("normalize_inputs.buffer_", "unnormalize_outputs.buffer_", "normalize_targets.buffer_")
EPSILON = 1e-8  # LeRobot's, beside a deviation
FETCH = "fetch it again"

Numbers = dict[str, Float64[np.ndarray, " d"]]  # "mean", "std", "min", "max", "q01", "q99" -> per component


@dataclass(frozen=True, kw_only=True)
class Affine:
    """(x - center) / width."""

    center: Float64[np.ndarray, " d"]
    width: Float64[np.ndarray, " d"]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input or output of the policy."""

    key: str  # LeRobot's name of it
    type: str  # VISUAL, STATE, ENV or ACTION
    shape: tuple[int, ...]


class Folder:
    """A policy as LeRobot saved it. Raises `BadInput` for what is missing, damaged or of another kind."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.config = path, load_json(path, CONFIG)
        found = self.config.get("type") if isinstance(self.config, dict) else None
        if found != kind:
            raise self.fault(f"type is {str(found)[:40]!r}, not {kind!r}", "name a folder that LeRobot saved")
        tensors = read_tensors(path / WEIGHTS)
        self.weights = {n.replace("._orig_mod", ""): t for n, t in tensors.items() if not n.startswith(BUFFERS)}
        self._buffers = {name: tensor for name, tensor in tensors.items() if name.startswith(BUFFERS)}

    def fault(self, what: str, remedy: str, file: str = CONFIG) -> Exception:
        return fault(self.path, file, what, remedy)

    def option(self, name: str) -> Any:
        if name not in self.config:
            raise self.fault(f"has no {name!r}", "save it again with LeRobot 0.2 or newer")
        return self.config[name]

    def refuse_unless(self, **expected: Any) -> None:
        """Raise `BadInput` for an option that is there and has another value: what it does is not known here."""
        for name, value in expected.items():
            if self.config.get(name, value) != value:
                raise self.fault(f"{name} is {str(self.config[name])[:60]}", f"only {value} is known here")

    # -- features ----------------------------------------------------------------------------------------------------

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        try:
            whole = {**self.option("input_features"), **self.option("output_features")}
            return tuple(Feature(key=k, type=f["type"], shape=tuple(map(int, f["shape"]))) for k, f in whole.items())
        except (KeyError, TypeError, ValueError):
            raise self.fault("input_features and output_features are no features", FETCH) from None

    @property
    def cameras(self) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.type == "VISUAL")

    def width(self, key: str) -> int:
        """Components of a vector; 0 if the policy does without."""
        return next((f.shape[0] for f in self.features if f.key == key), 0)

    @property
    def schema(self) -> Schema:
        """What the folder says of it: shapes. Components are numbered; rate, control mode and units are not known."""
        sizes = {f.shape[1:] for f in self.cameras}
        if len(sizes) > 1 or any(len(f.shape) != 3 or f.shape[0] != 3 for f in self.cameras):
            raise self.fault(f"pictures of {sorted(sizes)}", "only RGB of one size is known here")
        height, width = next(iter(sizes), (0, 0))
        return Schema(
            cameras=tuple(canonical(f.key, visual=True).removeprefix(IMAGE) for f in self.cameras),
            image_size=(height, width),
            state=_numbered("state", self.width(STATE)) + _numbered("environment", self.width(AROUND)),
            action=_numbered("action", self.width(ACTION)),
            fps=0,
            control_mode="?",
            gripper="?",
            orientation="?",
        )

    # -- scaling -----------------------------------------------------------------------------------------------------

    def normalizers(self) -> dict[str, Normalizer]:
        """Of the state, the environment's components last, and of the action."""
        state = [self.affine(key) for key in (STATE, AROUND) if self.width(key)]
        center = np.concatenate([a.center for a in state]) if state else np.zeros(0)
        width = np.concatenate([a.width for a in state]) if state else np.zeros(0)
        return {"state": _normalizer(Affine(center=center, width=width)), "action": _normalizer(self.affine(ACTION))}

    def affine(self, key: str) -> Affine:
        """How the feature is scaled. A picture's numbers are three, for values in [0, 1]."""
        feature = next((f for f in self.features if f.key == key), None)
        if feature is None:
            raise self.fault(f"has no feature {key}", FETCH)
        d, mode = feature.shape[0], self._modes.get(feature.type, "IDENTITY")
        if mode == "IDENTITY":
            return Affine(center=np.zeros(d), width=np.ones(d))
        numbers = self._numbers.get(key, {})
        wanted = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}.get(mode)
        if wanted is None:
            raise self.fault(f"normalisation {mode[:30]} of {key}", "only MEAN_STD, MIN_MAX, QUANTILES are known here")
        if any(numbers.get(name, np.zeros(0)).shape != (d,) for name in wanted):
            raise self.fault(f"no {' and '.join(wanted)} of {d} numbers to scale {key} with", FETCH, WEIGHTS)
        first, second = (numbers[name] for name in wanted)
        return Affine(center=first, width=second + EPSILON) if mode == "MEAN_STD" else _between(first, second)

    @cached_property
    def _modes(self) -> dict[str, str]:
        """Type of a feature -> how LeRobot scales it."""
        steps = self._steps
        modes = steps[0]["config"]["norm_map"] if steps else self.option("normalization_mapping")
        return {str(name): str(mode) for name, mode in modes.items()}

    @cached_property
    def _numbers(self) -> dict[str, Numbers]:
        """Feature -> its statistics."""
        if self._buffers:
            return self._of_buffers()
        found: dict[str, Numbers] = {}
        for step in self._steps:
            for name, tensor in read_tensors(self.path / Path(step.get("state_file", "")).name).items():
                key, _, what = name.rpartition(".")
                found.setdefault(key, {})[what] = _vector(tensor)
        return found

    def _of_buffers(self) -> dict[str, Numbers]:
        keys = {f.key.replace(".", "_"): f.key for f in self.features}
        found: dict[str, Numbers] = {}
        for name, tensor in self._buffers.items():
            feature, _, what = name.removeprefix(next(b for b in BUFFERS if name.startswith(b))).rpartition(".")
            if feature not in keys:
                raise self.fault(f"{name[:80]} scales no feature of {CONFIG}", FETCH, WEIGHTS)
            found.setdefault(keys[feature], {})[what] = _vector(tensor)
        return found

    @cached_property
    def _steps(self) -> list[dict[str, Any]]:
        """The two steps that scale, with their options; none in a folder from before there were processors."""
        if self._buffers:
            return []
        return [self._scaling(file) for file in (BEFORE, AFTER)]

    def _scaling(self, file: str) -> dict[str, Any]:
        content = load_json(self.path, file)
        try:
            steps = [s for s in content["steps"] if s["registry_name"] not in SKIPPED]
            unknown = [s["registry_name"] for s in steps if s["registry_name"] not in SCALING]
            scaling = [s for s in steps if s["registry_name"] in SCALING and "norm_map" in s["config"]]
        except (KeyError, TypeError):
            raise self.fault("holds no steps of a processor", FETCH, file) from None
        if unknown or len(scaling) != 1:
            what = f"step {str(unknown[0])[:60]!r} is not known here" if unknown else f"it scales {len(scaling)} times"
            raise self.fault(what, "only what LeRobot makes for this policy is", file)
        return scaling[0]


def _normalizer(affine: Affine) -> Normalizer:
    """Whatever the mode was: a mean and a deviation say it too."""
    center, width = affine.center, affine.width
    stats = Stats(count=1, mean=center, m2=width**2, min=center - width, max=center + width)
    return Normalizer(stats=stats, mode="mean_std", floor=EPSILON)


def _between(low: Float64[np.ndarray, " d"], high: Float64[np.ndarray, " d"]) -> Affine:
    """[low, high] to [-1, 1]. A component that never moved becomes -1, as LeRobot's, and stays where it was."""
    width = np.where(high > low, (high - low) / 2, 1e-4 * np.maximum(1.0, np.abs(low)))  # seen in float32
    return Affine(center=low + width, width=width)


def _vector(tensor: Tensor) -> Float64[np.ndarray, " d"]:
    return tensor.double().flatten().numpy()


def _numbered(name: str, count: int) -> tuple[Component, ...]:
    return tuple(Component(name=f"{name}_{i}", unit="") for i in range(count))


def picture_scale(folder: Folder) -> dict[str, list[list[float]]]:
    """`picture_mean` and `picture_std` of a backbone."""
    scales = [folder.affine(camera.key) for camera in folder.cameras]
    return {"picture_mean": [s.center.tolist() for s in scales], "picture_std": [s.width.tolist() for s in scales]}
