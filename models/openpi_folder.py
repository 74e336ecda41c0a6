"""A checkpoint of openpi's, written as the folder LeRobot would have saved.

```
 params/                                -->  model.safetensors     streamed: one array in memory at a time
 params/ (shapes), `TRAINED`            -->  config.json
 assets/<asset>/norm_stats.json         -->  norm/<asset>.json     a `Normalizer` each for state and action
    of the only asset                   -->  policy_preprocessor.json, policy_postprocessor.json and their numbers
```
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import ACTION, STATE
from data.untrusted import fault, load_json
from models.checkpoint import refuse_other_names, write_json
from models.openpi import Kind, Tree, kind_of, read_params, refuse_unless_complete, to_lerobot
from models.tokenizers import HUB_ID

WEIGHTS = "model.safetensors"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")  # openpi's, all of 224 px
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # numpy's names -> safetensors'
EPSILON = 1e-6  # openpi adds it to every width it divides by
RESTORE = "fetch it again"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What openpi's training configuration knows and a checkpoint does not say."""

    horizon: int = 50  # actions of a chunk
    state_in_prompt: bool = True  # pi0.5 only: the state is part of the words
    relative: bool = False  # actions, but for the gripper's, are relative to the state
    action_names: tuple[str, ...] = ()  # needed to tell the gripper's


LIBERO = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
TRAINED = {  # checkpoint -> its training (`src/openpi/training/config.py`)
    "pi0_base": Training(),
    "pi05_base": Training(),
    "pi0_libero": Training(relative=True, action_names=LIBERO),
    "pi05_libero": Training(horizon=10, state_in_prompt=False, action_names=LIBERO),
    "pi0_droid": Training(horizon=10),
    "pi05_droid": Training(horizon=15),
}


def convert(folder: Path, out: Path, *, name: str, log: Any = print) -> None:
    """Fill the empty folder `out` from openpi's checkpoint `folder`; `name` is the checkpoint's among openpi's.

    Raises `BadInput` for what is missing, damaged or no pi0 or pi0.5; `log` is told what was assumed.
    """
    tree = read_params(folder)
    refuse_unless_complete(tree, where=folder.name)
    write_folder(out, tree, read_norms(folder, kind_of(tree)), name=name, log=log)


def write_folder(
    out: Path, tree: Tree, norms: Mapping[str, Mapping[str, Normalizer]], *, name: str, log: Any = print
) -> None:
    """The same from arrays, and from what `read_norms` returns."""
    if name not in TRAINED:
        log(f"{name} is none of openpi's own, so how it was trained is unknown: no processors, chunks of 50 assumed")
    numbers = next(iter(norms.values())) if name in TRAINED and len(norms) == 1 else {}
    training = TRAINED.get(name, Training())
    config = _config(tree, training, numbers)
    write_weights(out / WEIGHTS, tree, wanted=_names(config))
    config._save_pretrained(out)
    for asset, norm in norms.items():
        path = out / "norm" / f"{asset}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {feature: normalizer.to_json() for feature, normalizer in norm.items()})
    if name in TRAINED:
        write_processors(out, config, training, numbers)


# -- weights ---------------------------------------------------------------------------------------------------------


def write_weights(path: Path, tree: Tree, *, wanted: Iterable[str]) -> None:
    """LeRobot's tensors as safetensors, in openpi's arithmetic; `wanted` are the names LeRobot asks for.

    The library of that format wants all tensors in memory at once, 26 GB for pi0; so this writes the header itself
    (https://huggingface.co/docs/safetensors: length, JSON, bytes) and then one tensor after the other.
    """
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in to_lerobot(_shapes(tree))}
    refuse_other_names(path, layout, dict.fromkeys(wanted))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPES[dtype.name], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # what stays zero takes no room on the disk
    for name, tensor in to_lerobot(tree):
        if any(tensor.strides):  # else the expert's unused head: zeros already
            dtype, shape = layout[name]
            start = 8 + len(text) + header[name]["data_offsets"][0]
            np.memmap(path, dtype, "r+", offset=start, shape=shape)[...] = tensor


def _shapes(tree: Tree) -> Tree:
    """The same names with arrays of the same shapes that take no memory."""
    for name, leaf in tree.items():
        if leaf.dtype.name not in DTYPES:
            raise BadInput(f"{name} is {leaf.dtype.name}; weights are float32, bfloat16 or float16")
    return {name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) for name, leaf in tree.items()}


def _names(config: Any) -> list[str]:
    """The tensors of LeRobot's model, built without memory."""
    import torch
    from lerobot.policies.pi0.modeling_pi0 import PI0Pytorch
    from lerobot.policies.pi05.modeling_pi05 import PI05Pytorch

    with torch.device("meta"):
        model = {"pi0": PI0Pytorch, "pi05": PI05Pytorch}[config.type](config)
    return [f"model.{name}" for name in model.state_dict()]


# -- configuration ---------------------------------------------------------------------------------------------------


def _config(tree: Tree, training: Training, numbers: Mapping[str, Normalizer]) -> Any:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    padded = tree["action_in_proj/kernel"].shape[0]
    width = {name: len(numbers[name].center) if name in numbers else padded for name in (STATE, ACTION)}
    side = math.isqrt(tree["PaliGemma/img/pos_embedding"].shape[1]) * tree["PaliGemma/img/embedding/kernel"].shape[0]
    picture = PolicyFeature(type=FeatureType.VISUAL, shape=(3, side, side))
    options: dict[str, Any] = {
        "paligemma_variant": _variant(tree, ""),
        "action_expert_variant": _variant(tree, "_1"),
        "dtype": "bfloat16" if tree["action_in_proj/kernel"].dtype.name == "bfloat16" else "float32",
        "chunk_size": training.horizon,
        "n_action_steps": training.horizon,
        "max_state_dim": padded,
        "max_action_dim": padded,
        "image_resolution": (side, side),
        "use_relative_actions": training.relative,
        "action_feature_names": list(training.action_names) or None,
        "input_features": {
            **{f"observation.images.{camera}": picture for camera in CAMERAS},
            STATE: PolicyFeature(type=FeatureType.STATE, shape=(width[STATE],)),
        },
        "output_features": {ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(width[ACTION],))},
        "device": "cpu",
        "push_to_hub": False,
    }
    return {"pi0": PI0Config, "pi05": PI05Config}[kind_of(tree)](**options)


def _variant(tree: Tree, suffix: str) -> str:
    """LeRobot's name for these widths."""
    from lerobot.policies.pi0.modeling_pi0 import get_gemma_config

    layers = "PaliGemma/llm/layers"
    depth, heads, width, head = tree[f"{layers}/attn/q_einsum{suffix}/w"].shape
    kv_heads, mlp = tree[f"{layers}/attn/kv_einsum{suffix}/w"].shape[2], tree[f"{layers}/mlp{suffix}/linear"].shape[1]
    found = {"width": width, "depth": depth, "mlp_dim": mlp, "num_heads": heads, "num_kv_heads": kv_heads}
    found |= {"head_dim": head}
    for variant in ("gemma_2b", "gemma_300m") if not suffix else ("gemma_300m", "gemma_2b"):
        if vars(get_gemma_config(variant)) == found:
            return variant
    raise BadInput(f"gemma{suffix} has {found}: LeRobot has no such variant; only gemma_2b and gemma_300m are known")


# -- statistics ------------------------------------------------------------------------------------------------------


def read_norms(folder: Path, kind: Kind) -> dict[str, dict[str, Normalizer]]:
    """Asset -> feature -> how openpi normalises it: pi0 by mean and deviation, pi0.5 by the 1 % and 99 % quantiles.

    The quantiles take the places of minimum and maximum, components that openpi only padded are left out, and the
    count of rows, which openpi does not keep, is 1.
    """
    found = {}
    assets = folder / "assets"
    for path in sorted(assets.rglob("norm_stats.json")):
        file = str(path.relative_to(folder))
        try:
            stats = load_json(folder, file)["norm_stats"]
            found[str(path.parent.relative_to(assets))] = {
                feature: _normalizer(stats[name], kind) for feature, name in ((STATE, "state"), (ACTION, "actions"))
            }
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadInput):
                raise
            raise fault(folder, file, f"holds no statistics of state and actions ({error})", RESTORE) from None
    return found


def _normalizer(stats: Mapping[str, Any], kind: Kind) -> Normalizer:
    names = ("mean", "std", "q01", "q99") if kind == "pi05" else ("mean", "std")
    mean, std, *quantiles = (np.array(stats[name], np.float64) for name in names)
    low, high = quantiles or (mean - std, mean + std)
    if not all(v.shape == mean.shape == (len(mean),) and np.isfinite(v).all() for v in (mean, std, low, high)):
        raise ValueError("vectors of different lengths, or NaN")
    real = np.flatnonzero(mean.astype(bool) | std.astype(bool))
    width = int(real[-1]) + 1 if len(real) else 0
    part = slice(0, width)
    merged = Stats(count=1, mean=mean[part], m2=std[part] ** 2, min=low[part], max=high[part])
    return Normalizer(stats=merged, mode="min_max" if kind == "pi05" else "mean_std", floor=EPSILON)


# -- processors ------------------------------------------------------------------------------------------------------


def write_processors(out: Path, config: Any, training: Training, numbers: Mapping[str, Normalizer]) -> None:
    """LeRobot's steps around the model, with `numbers` if there are any, as LeRobot saves them."""
    from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
    from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
    from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep, TokenizerProcessorStep
    from lerobot.processor import make_default_policy_processor_steps as make_steps
    from lerobot.processor.factory import make_policy_processor_pipelines

    steps = make_steps(config, {name: _lerobot_stats(normalizer) for name, normalizer in numbers.items()})
    steps.normalize.eps = steps.unnormalize.eps = EPSILON
    if config.type == "pi05" and training.state_in_prompt:
        prompt = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
    else:
        prompt = Pi0NewLineProcessor()
    words = TokenizerProcessorStep(tokenizer=HUB_ID, max_length=config.tokenizer_max_length)
    words.tokenizer, words.tokenizer_name = None, HUB_ID  # saved is its name; naming it at once would download it
    excluded, names = config.relative_exclude_joints, config.action_feature_names
    relative = RelativeActionsProcessorStep(enabled=training.relative, exclude_joints=excluded, action_names=names)
    absolute = AbsoluteActionsProcessorStep(enabled=training.relative, relative_step=relative)
    before = [steps.rename_observations, steps.add_batch_dim, relative, steps.normalize, prompt, words, steps.to_device]
    after = [steps.unnormalize, absolute, steps.to_cpu]
    for pipeline in make_policy_processor_pipelines(input_steps=before, output_steps=after):
        pipeline.save_pretrained(out)


def _lerobot_stats(normalizer: Normalizer) -> dict[str, Any]:
    stats = normalizer.stats
    named = {"mean_std": {"mean": stats.mean, "std": stats.std}, "min_max": {"q01": stats.min, "q99": stats.max}}
    return {name: value.astype(np.float32) for name, value in named[normalizer.mode].items()}
