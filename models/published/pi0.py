"""pi0 and pi0.5 as LeRobot publishes them, as our pair `paligemma_expert` and `pi0_flow`: every weight under our name.

| LeRobot's                                          | ours                                                            |
|----------------------------------------------------|-----------------------------------------------------------------|
| model.paligemma_with_expert.paligemma.model.       | backbone.                                                       |
| model.paligemma_with_expert.gemma_expert.model.    | head.expert.                                                    |
| model.                                             | head.                                                           |
| ...paligemma.lm_head.weight                        | the words' embedding, which it is tied to                       |
| ...gemma_expert.lm_head.weight                     | nothing: no word is said                                        |
| queries, output, MLP of the last language layer;   | nothing: an action expert reads keys and values, and these give |
| the norm behind it                                 | none                                                            |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data.normalize import Normalizer
from data.untrusted import load_json
from models.backbones.paligemma_expert import PRESETS
from models.config import PolicyConfig
from models.policy import PolicySpec
from models.published.lerobot import BEFORE, FETCH, SKIPPED, Feature, Folder

KINDS = ("pi0", "pi05")
MODULES = {  # LeRobot's -> ours; the first that fits
    "model.paligemma_with_expert.paligemma.model.": "backbone.",
    "model.paligemma_with_expert.gemma_expert.model.": "head.expert.",
    "model.": "head.",
}
EMBEDDING = "backbone.language_model.embed_tokens.weight"
WORDS_OUT = "model.paligemma_with_expert.paligemma.lm_head.weight"
UNREAD = "model.paligemma_with_expert.gemma_expert.lm_head.weight"
EMPTY = ".empty_camera_"  # in LeRobot's name for a camera that never is there
NEW_LINE, STATE_IN_WORDS = "pi0_new_line_processor", "pi05_prepare_state_tokenizer_processor_step"
# What the backbone does itself, or what does nothing where actions are not relative to the state.
PROMPT = {NEW_LINE, STATE_IN_WORDS, "tokenizer_processor"}
RELATIVE = {"relative_actions_processor", "absolute_actions_processor"}


class Pi0Folder(Folder):
    """A pi0 or pi0.5 as LeRobot saved it."""

    @property
    def cameras(self) -> tuple[Feature, ...]:
        """Those that are there: the others are masked, so nothing depends on them."""
        return tuple(f for f in super().cameras if EMPTY not in f.key)

    @property
    def state_in_prompt(self) -> bool:
        """Raises `BadInput` where it is not said how the words are put."""
        names = {step["registry_name"] for step in self._known(BEFORE)}
        if len(names & {NEW_LINE, STATE_IN_WORDS}) != 1:
            raise self.fault("does not say how a task is put in words", FETCH, BEFORE)
        return STATE_IN_WORDS in names

    def _scaling(self, file: str) -> dict[str, Any]:
        steps = [s for s in self._known(file) if "norm_map" in s.get("config", {})]
        if len(steps) != 1:
            raise self.fault(f"it scales {len(steps)} times", FETCH, file)
        return steps[0]

    def _known(self, file: str) -> list[dict[str, Any]]:
        """The steps of a processor, all of which are known here."""
        scaling = "normalizer_processor" if file == BEFORE else "unnormalizer_processor"
        try:
            steps = load_json(self.path, file)["steps"]
            names = [str(step["registry_name"]) for step in steps]
            relative = [s for s in steps if s["registry_name"] in RELATIVE and s.get("config", {}).get("enabled")]
        except (KeyError, TypeError):
            raise self.fault("holds no steps of a processor", FETCH, file) from None
        for name in sorted({*names} - SKIPPED - PROMPT - RELATIVE - {scaling}):
            raise self.fault(f"step {name[:60]!r} is not known here", "use a plain pi0", file)
        if relative:
            raise self.fault("its actions are relative to the state", "use one with absolute actions", file)
        return steps


def read(path: Path) -> tuple[PolicySpec, dict[str, Normalizer], dict[str, Tensor]]:
    """The policy in the folder `path`: its specification, how it scales, its weights by our names.

    Weights that it has beside ours keep their own names, for whoever fills them in to list. Raises `BadInput` for a
    folder that is none of LeRobot's pi0 and pi0.5, and for an option that is not known here.
    """
    config = load_json(path, "config.json")
    folder = Pi0Folder(path, config["type"] if isinstance(config, dict) and config.get("type") in KINDS else KINDS[0])
    side = folder.option("image_resolution")[0]
    folder.refuse_unless(
        n_obs_steps=1,
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        image_resolution=[side, side],
        use_relative_actions=False,
        time_sampling_beta_alpha=1.5,
        time_sampling_beta_beta=1.0,
        time_sampling_scale=0.999,
        time_sampling_offset=0.001,
        min_period=4e-3,
        max_period=4.0,
    )
    pi05 = folder.config["type"] == "pi05"
    backbone = {
        "preset": "published",
        "image_size": side,
        "tokenizer": str(path),
        "longest": folder.option("tokenizer_max_length"),
        "state_in_prompt": folder.state_in_prompt,
    }
    head = {"preset": "published", "pi05": pi05, "steps": folder.option("num_inference_steps")}
    spec = PolicySpec(
        config=PolicyConfig(
            backbone="paligemma_expert",
            backbone_options=backbone,
            head="pi0_flow",
            head_options=head,
            shift=0,
            pad_state=0 if pi05 else folder.option("max_state_dim"),  # pi0.5 reads it in words, without padding
            pad_action=folder.option("max_action_dim"),
        ),
        schema=folder.schema,
        horizon=folder.option("chunk_size"),
    )
    return spec, folder.normalizers(), renamed(folder.weights)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours for LeRobot's, less what the table above maps to nothing."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        name = name if name.startswith("model.") else f"model.{name}"  # openpi's own export has no prefix
        if name == WORDS_OUT:
            ours.setdefault(EMBEDDING, tensor)
        elif name != UNREAD:
            prefix = next(prefix for prefix in MODULES if name.startswith(prefix))
            ours[MODULES[prefix] + name.removeprefix(prefix)] = tensor
    unread = _unread(PRESETS["published"].layers.layers - 1)
    return {name: tensor for name, tensor in ours.items() if not unread.fullmatch(name)}


def _unread(last: int) -> re.Pattern[str]:
    """Of the language model with the last layer `last`."""
    parts = r"self_attn\.[qo]_proj|post_attention_layernorm|mlp\.(gate|up|down)_proj"
    return re.compile(rf"backbone\.language_model\.(layers\.{last}\.({parts})|norm)\.weight")
