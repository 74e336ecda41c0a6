"""PI0 and PI05 of LeRobot's own classes, narrow and shallow, as the folder LeRobot would have saved.

LeRobot's configuration has no widths: they are constants of its code. So a tiny model exists inside `tiny()` only,
which puts small numbers in their place; whoever builds or loads one does so in there.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.policies.pi05 import modeling_pi05
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
    make_default_policy_processor_steps,
)
from lerobot.processor.factory import make_policy_processor_pipelines
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from transformers.models.auto import CONFIG_MAPPING as KINDS

from data.schema import Schema
from models.tokenizers import find_tokenizer, write_tiny_tokenizer

CONFIG_MAPPING = cast(Any, KINDS)
VOCABULARY = 264  # rows of the embedding; the tiny tokenizer has 262 tokens


@dataclass(frozen=True, kw_only=True)
class Size:
    """Widths in features, depths in layers."""

    width: int = 32  # of the language model
    expert: int = 16  # of the action expert
    depth: int = 2  # of both
    head: int = 8  # per attention head, of which there are 8
    mlp: int = 2  # hidden width of both, in widths
    vision: int = 16
    vision_depth: int = 1
    vision_mlp: int = 32
    image: int = 28  # pixels per side; a patch has 14


SMALLEST = Size()


@contextmanager
def tiny(size: Size = SMALLEST) -> Iterator[None]:
    """Inside, LeRobot's PI0 and PI05 have the widths of `size`."""

    def gemma(variant: str) -> modeling_pi0.GemmaConfig:
        width = size.expert if variant == "gemma_300m" else size.width
        return modeling_pi0.GemmaConfig(
            width=width, depth=size.depth, mlp_dim=size.mlp * width, num_heads=8, num_kv_heads=1, head_dim=size.head
        )

    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05):
            stack.enter_context(patch.object(module, "get_gemma_config", gemma))
            stack.enter_context(patch.object(module, "CONFIG_MAPPING", {"paligemma": lambda: _paligemma(size),
                                                                        "gemma": _expert}))  # fmt: skip
        yield


def _paligemma(size: Size) -> Any:
    vision = CONFIG_MAPPING["siglip_vision_model"](
        hidden_size=size.vision, num_hidden_layers=size.vision_depth, num_attention_heads=2, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    config = CONFIG_MAPPING["paligemma"](vision_config=vision, text_config=CONFIG_MAPPING["gemma"]())
    _hold(config.vision_config, intermediate_size=size.vision_mlp, projection_dim=size.width)
    _hold(config.text_config, vocab_size=VOCABULARY)
    return config


def _expert(**options: Any) -> Any:
    return CONFIG_MAPPING["gemma"](**{**options, "vocab_size": VOCABULARY})


def _hold(config: Any, **values: int) -> None:
    """Give `config` these values, whatever LeRobot assigns to them later."""
    kind: Any = type(config)

    def assign(self: Any, name: str, value: Any) -> None:
        kind.__setattr__(self, name, values.get(name, value))

    config.__class__ = type(kind.__name__, (kind,), {"__setattr__": assign})
    for name in values:
        setattr(config, name, values[name])


def policy(
    kind: str,
    schema: Schema,
    *,
    horizon: int = 6,
    size: Size = SMALLEST,
    empty_cameras: int = 0,
    relative: bool = False,
    seed: int = 0,
) -> Any:
    """A PI0Policy or PI05Policy for the observations of `schema`, every weight random: its gates start at 0."""
    pictures = {f"{OBS_IMAGES}.{camera}": _feature("VISUAL", 3, *schema.image_size) for camera in schema.cameras}
    config = {"pi0": PI0Config, "pi05": PI05Config}[kind](
        input_features={**pictures, OBS_STATE: _feature("STATE", len(schema.state))},
        output_features={ACTION: _feature("ACTION", len(schema.action))},
        chunk_size=horizon, n_action_steps=horizon, empty_cameras=empty_cameras,
        image_resolution=(size.image, size.image), device="cpu", num_inference_steps=4,
        use_relative_actions=relative, action_feature_names=[c.name for c in schema.action],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        made = {"pi0": PI0Policy, "pi05": PI05Policy}[kind](config)
        for parameter in made.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(torch.randn_like(parameter) * scale)
    return made.eval()


def write(folder: Path, kind: str, schema: Schema, **options: Any) -> Path:
    """The same as a folder: configuration, weights, processors with their statistics, tokenizer. Returns the folder."""
    made = policy(kind, schema, **options)
    write_tiny_tokenizer(folder)
    made.save_pretrained(folder)
    for pipeline in processors(folder, made.config):
        pipeline.save_pretrained(folder)
    return folder


def processors(folder: Path, config: Any) -> tuple[Any, Any]:
    """LeRobot's own, as `make_pi0_pre_post_processors` has them, but with the tokenizer that lies in `folder`."""
    steps = make_default_policy_processor_steps(config, statistics(config))
    tokenizer = TokenizerProcessorStep(
        tokenizer=find_tokenizer(folder), max_length=config.tokenizer_max_length, padding_side="right"
    )
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    absolute = AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative)
    start = [steps.rename_observations, steps.add_batch_dim]
    if config.type == "pi0":
        steps_in = [*start, Pi0NewLineProcessor(), tokenizer, steps.to_device, relative, steps.normalize]
    else:
        state = Pi05PrepareStateTokenizerProcessorStep(max_state_dim=config.max_state_dim)
        steps_in = [*start, relative, steps.normalize, state, tokenizer, steps.to_device]
    steps_out = [steps.unnormalize, absolute, steps.to_cpu]
    return make_policy_processor_pipelines(input_steps=steps_in, output_steps=steps_out)


def statistics(config: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Numbers for every mode of normalisation; the actions come out within [-1, 1], mostly."""
    rng = np.random.default_rng(0)

    def of(width: int) -> dict[str, torch.Tensor]:
        mean, std = rng.normal(0, 0.1, width), rng.uniform(0.2, 0.4, width)
        values = {"mean": mean, "std": std, "q01": mean - 2 * std, "q99": mean + 2 * std}
        return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}

    return {
        OBS_STATE: of(config.input_features[OBS_STATE].shape[0]),
        ACTION: of(config.output_features[ACTION].shape[0]),
    }


def _feature(kind: str, *shape: int) -> PolicyFeature:
    return PolicyFeature(type=FeatureType[kind], shape=shape)
