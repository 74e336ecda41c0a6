"""Policies by name: which backbone, which head, and what else belongs to them. `flywheel policies` prints the table.

```
 named("act", "small")                                  the PolicyConfig of a recipe
 named("pi05", backbone_options={"tokenizer": folder})  "published" unless said; what is given here comes on top
```
| preset    | for                                                                                |
|-----------|------------------------------------------------------------------------------------|
| tiny      | tests: a few ms per step                                                           |
| small     | 64-pixel pictures on two CPU cores: learns pick_cube in minutes                    |
| published | the paper's sizes and scaling; `models.published.loading` reads weights of that size |

Imports no torch, so that a recipe may call it.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from data.errors import BadInput
from data.registry import did_you_mean
from models.config import PolicyConfig

PRESETS = ("tiny", "small", "published")
Options = dict[str, Any]  # fields of PolicyConfig; options of the parts as dictionaries inside


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name."""

    about: str
    backbone: str
    head: str
    always: Options = field(default_factory=dict)  # beside the parts' own preset of that name
    tiny: Options = field(default_factory=dict)
    small: Options = field(default_factory=dict)
    published: Options = field(default_factory=dict)

    @property
    def parts(self) -> str:
        return f"{self.backbone} + {self.head}"


def _backbone(**options: Any) -> Options:
    return {"backbone_options": options}


def _head(**options: Any) -> Options:
    return {"head_options": options}


# a quick look at the chunk itself learns in fewer steps than its noise does
DIFFUSION = {
    "tiny": {"shift": 0, **_head(prediction="sample")},
    "small": {"shift": 2, **_head(prediction="sample")},
    "published": {
        "shift": 6,  # half of what a crop of 84 leaves of 96 pixels
        "normalization": "min_max",
        **_backbone(preset="resnet18"),
        **_head(sampler="ddpm", steps=100, clip=1.0),
    },
}
GR00T = {
    "always": {"normalization": "min_max"},
    "tiny": {"shift": 0},
    "small": {"shift": 2},
    "published": {"pad_state": 64, "pad_action": 32, **_backbone(crop=0.95)},
}
PI0 = {
    "tiny": {"shift": 0},
    "small": {"shift": 2, **_head(draws=4)},
    "published": {"pad_state": 32, "pad_action": 32},
}

ZOO: dict[str, Entry] = {
    "act": Entry(
        about="action chunking transformer (2304.13705)",
        backbone="act",
        head="act",
        tiny={"shift": 0},
        small={"shift": 2},
        published={"shift": 0},
    ),
    "diffusion_policy": Entry(
        about="UNet that denoises chunks (2303.04137)", backbone="diffusion_rgb", head="diffusion", **DIFFUSION
    ),
    "dp_clip": Entry(
        about="the same, told the task by CLIP",
        backbone="diffusion_rgb",
        head="diffusion",
        always=_backbone(language="clip"),
        **DIFFUSION,
    ),
    "flow_dit": Entry(
        about="GR00T's action head on a small convolutional trunk",
        backbone="resnet",
        head="flow_matching",
        tiny={"shift": 0, **_backbone(preset="small", width=16, keypoints=4, grid=2)},
        small={"shift": 2},
        published=_backbone(preset="resnet18", width=512),
    ),
    "gr00t_n1": Entry(about="SmolLM2 and SigLIP, DiT (2503.14734)", backbone="eagle", head="flow_matching", **GR00T),
    "gr00t_n1_5": Entry(about="Qwen3 and SigLIP, DiT", backbone="eagle_1_5", head="flow_matching_1_5", **GR00T),
    "pi0": Entry(
        about="PaliGemma with an action expert (2410.24164)", backbone="paligemma_expert", head="pi0_flow", **PI0
    ),
    "pi05": Entry(
        about="the same, time by adaptive norms and state in words (2504.16054)",
        backbone="paligemma_expert",
        head="pi0_flow",
        always={
            "normalization": "min_max",  # the words are bins of [-1, 1]
            **_backbone(state_in_prompt=True, longest=200),
            **_head(pi05=True),
        },
        **PI0,
    ),
    "statevla": Entry(
        about="Mamba that knows the state, Mamba that moves (StateVLA)",
        backbone="statevla",
        head="statevla",
        tiny={"shift": 0},
        small={"shift": 2},
        published={
            "shift": 0,
            "normalization": "mean_std_signs",
            **_backbone(language="clip"),
            **_head(gripper=-1),
        },
    ),
}


def named(name: str, preset: str = "published", **changes: Any) -> PolicyConfig:
    """The policy `name` at a size of `PRESETS`. `changes` are fields of PolicyConfig; options of parts are added.

    Raises `BadInput` with a did-you-mean.
    """
    if name not in ZOO:
        raise BadInput(f"unknown policy {name!r}{did_you_mean(name, ZOO)}")
    if preset not in PRESETS:
        raise BadInput(f"policy {name}: unknown preset {preset!r}{did_you_mean(preset, PRESETS)}")
    known = [f.name for f in fields(PolicyConfig)]
    for option in changes:
        if option not in known:
            raise BadInput(f"policy {name}: no option {option!r}{did_you_mean(option, known)}")
    entry = ZOO[name]
    sizes = {**_backbone(preset=preset), **_head(preset=preset)}
    return PolicyConfig(
        **_merged(
            {"backbone": entry.backbone, "head": entry.head}, sizes, entry.always, getattr(entry, preset), changes
        )
    )


def _merged(*layers: Options) -> Options:
    """Later ones on top; dictionaries inside are merged."""
    whole: Options = {}
    for layer in layers:
        for name, value in layer.items():
            whole[name] = {**whole.get(name, {}), **value} if isinstance(value, dict) else value
    return whole
