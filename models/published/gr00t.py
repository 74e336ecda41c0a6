"""GR00T N1 and N1.5 as NVIDIA publishes them, as our pairs of Eagle and a flow-matching head.

```
 config.json                        sizes, steps, what was trained
 experiment_cfg/metadata.json       per robot: cameras, components of state and action, their statistics
 model-*.safetensors                backbone.*      -->  backbone.*, as models.layers.eagle_weights says
                                    action_head.*   -->  head.*, the same names
 tokenizer.json                     of the model's Eagle, which NVIDIA keeps beside its code and not beside the weights
```
| model_type | backbone  | head              | tokens  |
|------------|-----------|-------------------|---------|
| gr00t_n1   | eagle     | flow_matching     | 1536    |
| gr00t_n1_5 | eagle_1_5 | flow_matching_1_5 | 2048    |

What the folder does not say stands in GR00T's code, robot by robot: that pictures lose 5 % of each side's pixels, in
which order the parts of a state are joined, and how they are scaled. Here: .95; the order of the metadata; [-1, 1]
between minimum and maximum, which is what its template for new robots does. `gr1`, whose state goes in as sines and
cosines, is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.normalize import Normalizer, Stats
from data.schema import Component, Schema
from data.untrusted import fault, load_json
from models.backbones.eagle import Eagle
from models.backbones.eagle_1_5 import Eagle15
from models.config import PolicyConfig
from models.heads.flow_matching_1_5 import PRESETS as EARS
from models.layers.eagle import EagleVLM
from models.layers.eagle_weights import our_names
from models.layers.flow_dit import PREFIX
from models.layers.flow_dit import PRESETS as DIT_PRESETS
from models.layers.pretrained import WHOLE, read_weights
from models.policy import PolicySpec

CONFIG, METADATA, TOKENIZER = "config.json", "experiment_cfg/metadata.json", "tokenizer.json"
# robot -> which of all robots' weights are its own
PROJECTORS = {"oxe_droid": 17, "agibot_genie1": 26, "new_embodiment": 31}
CROP = 0.95
EPSILON = 1e-6  # smallest half of a range: a component that never moved stays where it was
FETCH = "fetch it again"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a `model_type` is here."""

    backbone: str
    eagle: type[EagleVLM]
    head: str


KINDS = {
    "gr00t_n1": Kind(backbone="eagle", eagle=Eagle, head="flow_matching"),
    "gr00t_n1_5": Kind(backbone="eagle_1_5", eagle=Eagle15, head="flow_matching_1_5"),
}
Weights = dict[str, Tensor]


def read(path: Path, robot: str = "") -> tuple[PolicySpec, dict[str, Normalizer], Weights]:
    """The policy in the folder `path`: its specification, how it scales, its weights by our names.

    robot: one of the metadata's; may be left out where there is only one, or one of them is new_embodiment. Weights
    that are beside ours keep their own names, for whoever fills them in to list. Raises `BadInput` for a folder that is
    none of a GR00T N1 or N1.5, and for sizes that no preset has.
    """
    config = load_json(path, CONFIG)
    kind = KINDS.get(config.get("model_type", "") if isinstance(config, dict) else "")
    if kind is None:
        raise fault(path, CONFIG, f"model_type is not one of {', '.join(KINDS)}", "name a GR00T N1 or N1.5")
    weights = read_weights(path)
    robot, metadata = _robot(path, robot)
    cfg, head_cfg = _part(path, config, "backbone_cfg"), _part(path, config, "action_head_cfg")
    backbone = _backbone_options(path, kind, cfg, weights)
    head = _head_options(path, head_cfg, weights, robot)
    spec = PolicySpec(
        config=PolicyConfig(
            backbone=kind.backbone,
            backbone_options=backbone,
            head=kind.head,
            head_options=head,
            normalization="min_max",
            shift=0,
            pad_state=_shape(path, weights, f"{PREFIX}state_encoder.layer1.W", 3)[1],
            pad_action=_shape(path, weights, f"{PREFIX}action_encoder.W1.W", 3)[1],
        ),
        schema=_schema(path, metadata),
        horizon=int(head_cfg.get("action_horizon") or config["action_horizon"]),
    )
    normalizers = {feature: _normalizer(path, metadata, feature) for feature in ("state", "action")}
    return spec, normalizers, renamed(weights, layers=_select(kind, backbone))


def renamed(weights: Mapping[str, Tensor], *, layers: int) -> Weights:
    """Ours for NVIDIA's, less what no feature depends on. layers: of the language model that are read."""
    eagle = our_names(weights, layers=layers)
    ours: Weights = {}
    for name, tensor in weights.items():
        if name.startswith(PREFIX):
            ours["head." + name.removeprefix(PREFIX)] = tensor
        elif name not in eagle:
            ours[name] = tensor
        elif eagle[name]:
            ours["backbone." + eagle[name]] = tensor
    return ours


# -- sizes -----------------------------------------------------------------------------------------------------------


def _backbone_options(path: Path, kind: Kind, cfg: dict[str, Any], weights: Weights) -> dict[str, Any]:
    found = {ours: name for name, ours in our_names(weights, layers=1).items() if ours}

    def shape(name: str, dims: int = 2) -> tuple[int, ...]:
        return _shape(path, weights, found.get(name, name), dims)

    seen = shape("vision.vision_model.embeddings.patch_embedding.weight", 4)[0]
    rows, width = shape("language.embed_tokens.weight")
    sizes = {name: (size.vision.width, size.language.width) for name, size in kind.eagle.presets.items()}
    preset = next((name for name, widths in sizes.items() if widths == (seen, width)), None)
    if preset is None:
        raise fault(path, CONFIG, f"SigLIP {seen} and words {width} wide", "no such Eagle is known here")
    if not (path / TOKENIZER).is_file():
        raise fault(path, TOKENIZER, "is missing", "copy the one of GR00T's eagle2_hg_model there")
    linear = 2 if "connector.3.weight" in found else 1
    joined = shape("connector.1.weight" if linear == 2 else "connector.0.weight")[1] // seen
    projected = shape("project.weight")[0] if "project.weight" in found else None
    tuned = {"tune_llm": cfg.get("tune_llm", True), "tune_visual": cfg.get("tune_visual", True)}
    return {
        "preset": preset,
        "select_layer": cfg.get("select_layer"),
        "project_to_dim": projected,
        "shuffle": round(joined**0.5),
        "connector": linear,
        "vocabulary": rows,
        "crop": CROP,
        "tokenizer": str(path),
        **tuned,
        "pretrained": "" if all(tuned.values()) else str(path),
    }


def _select(kind: Kind, options: dict[str, Any]) -> int:
    """Layers of the language model that are built."""
    selected = options["select_layer"]
    return kind.eagle.presets[options["preset"]].language.layers if selected in (None, -1) else selected


def _head_options(path: Path, cfg: dict[str, Any], weights: Weights, robot: str) -> dict[str, Any]:
    robots, hidden, _ = _shape(path, weights, f"{PREFIX}action_decoder.layer1.W", 3)
    dit = _part(path, cfg, "diffusion_model_cfg")
    sizes = {name: (size.hidden, size.layers, size.heads, size.head) for name, size in DIT_PRESETS.items()}
    asked = hidden, *(dit.get(name) for name in ("num_layers", "num_attention_heads", "attention_head_dim"))
    preset = next((name for name, size in sizes.items() if size == asked), None)
    if preset is None:
        raise fault(path, CONFIG, f"diffusion_model_cfg has sizes {asked}", "no such DiT is known here")
    known = EARS[preset].heads
    if (heads := (cfg.get("vl_self_attention_cfg") or {}).get("num_attention_heads", known)) != known:
        raise fault(path, CONFIG, f"vl_self_attention_cfg has {heads} heads", f"only {known} are known here")
    tuned = {name: cfg.get(name, True) for name in ("tune_projector", "tune_diffusion_model")}
    return {
        "preset": preset,
        "steps": cfg.get("num_inference_timesteps", 4),
        "max_embodiments": robots,
        "embodiment": PROJECTORS[robot],
        "interleave_self_attention": dit.get("interleave_self_attention", False),
        **tuned,
        "pretrained": "" if all(tuned.values()) else str(path),
        **({"use_vlln": cfg["use_vlln"]} if "use_vlln" in cfg else {}),
    }


# -- robot -----------------------------------------------------------------------------------------------------------


def _robot(path: Path, robot: str) -> tuple[str, dict[str, Any]]:
    """The robot that is asked for, or the only one, and what the metadata say of it."""
    found = load_json(path, METADATA)
    if not isinstance(found, dict) or not found:
        raise fault(path, METADATA, "names no robot", FETCH)
    name = robot or (next(iter(found)) if len(found) == 1 else "new_embodiment")
    if name not in found:
        raise fault(path, METADATA, f"is of {', '.join(found)}, not of {name}", "name one of them")
    if name == "gr1":
        raise fault(path, METADATA, "gr1's state goes in as sines and cosines", "use a model tuned on your robot")
    if name not in PROJECTORS:
        raise fault(path, METADATA, f"which projector is {name[:40]}'s is not known", f"one of {', '.join(PROJECTORS)}")
    return name, _part(path, found, name, METADATA)


def _schema(path: Path, metadata: Mapping[str, Any]) -> Schema:
    """Rate and names as the folder has them; units and control mode are not known."""
    try:
        modalities = metadata["modalities"]
        videos = modalities["video"]
        sizes = {tuple(int(pixels) for pixels in video["resolution"]) for video in videos.values()}
        rates = {float(video["fps"]) for video in videos.values()}
        (columns, rows), rate = next(iter(sizes)), next(iter(rates))
        parts = {
            feature: tuple(
                Component(name=f"{name}_{i}", unit="")
                for name, part in modalities[feature].items()
                for i in range(int(part["shape"][0]))
            )
            for feature in ("state", "action")
        }
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError):
        raise fault(path, METADATA, "modalities are not cameras, state and action", FETCH) from None
    if len(sizes) > 1 or len(rates) > 1:
        raise fault(path, METADATA, f"pictures of {sorted(sizes)}", "only one size and rate for all is known here")
    return Schema(
        cameras=tuple(videos),
        image_size=(rows, columns),
        **parts,
        fps=round(rate),
        control_mode="?",
        gripper="?",
        orientation="?",
    )


def _normalizer(path: Path, metadata: Mapping[str, Any], feature: str) -> Normalizer:
    """Minimum and maximum to [-1, 1]. A component that never moved is read as 0 and answered with its only value."""
    try:
        parts = [metadata["statistics"][feature][name] for name in metadata["modalities"][feature]]
        columns = {
            name: np.concatenate([np.asarray(part[name], np.float64).reshape(-1) for part in parts])
            for name in ("min", "max", "mean", "std")
        }
        low, high, mean, std = (columns[name] for name in ("min", "max", "mean", "std"))
        still, reach = low == high, 1e6 if feature == "state" else EPSILON
        low, high = np.where(still, low - reach, low), np.where(still, high + reach, high)
        stats = Stats(count=1, mean=mean, m2=std**2, min=low, max=high)
    except (KeyError, TypeError, ValueError):
        raise fault(path, METADATA, f"holds no min, max, mean and std of {feature}", FETCH) from None
    return Normalizer(stats=stats, mode="min_max", floor=EPSILON)


# -- reading ---------------------------------------------------------------------------------------------------------


def _part(path: Path, whole: Mapping[str, Any], name: str, file: str = CONFIG) -> dict[str, Any]:
    part = whole.get(name)
    if not isinstance(part, dict):
        raise fault(path, file, f"has no {name}", FETCH)
    return part


def _shape(path: Path, weights: Weights, name: str, dims: int) -> tuple[int, ...]:
    """Raises `BadInput` for a weight that is missing or has not `dims` dimensions."""
    if name not in weights:
        raise fault(path, WHOLE, f"{name} is missing", FETCH)
    if weights[name].ndim != dims:
        raise fault(path, WHOLE, f"{name} is {list(weights[name].shape)}", FETCH)
    return tuple(weights[name].shape)
