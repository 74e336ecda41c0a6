"""The tables of what can be named in a recipe or a checkpoint. Adding a part is one new file and one line here."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.errors import BadInput
from data.registry import Registry, did_you_mean

BACKBONES = Registry(
    "backbone",
    {
        "diffusion_rgb": "models.backbones.diffusion_rgb:DiffusionRgb",
        "resnet": "models.backbones.resnet:ResNet",
    },
)

HEADS = Registry(
    "head",
    {
        "act": "models.heads.act:ActHead",
        "diffusion": "models.heads.diffusion:DiffusionHead",
        "flow": "models.heads.flow:FlowHead",
        "gaussian": "models.heads.gaussian:GaussianHead",
    },
)

POLICIES = Registry(  # what a checkpoint can hold
    "policy",
    {
        "pair": "models.pair:Pair",  # any backbone with any head that fits it
        "critic": "models.critic:Critic",
    },
)

PHASES = Registry(
    "phase",
    {
        "bc": "models.phases.bc:BehaviourCloning",
        "chunk_critic": "models.phases.chunk_critic:ChunkCritic",
        "chunk_policy": "models.phases.chunk_policy:ChunkPolicy",
        "chunk_rl": "models.phases.chunk_rl:ChunkRL",
    },
)


def configure(part: type, options: Mapping[str, Any], *, whose: str) -> Any:
    """`part.Config(**options)`. Raises `BadInput` that names an unknown option or a value of the wrong type.

    `whose` says in words whose options these are, e.g. "backbone resnet".
    """
    known = [f.name for f in fields(part.Config)]
    for name in options:
        if name not in known:
            raise BadInput(f"{whose} has no option {name!r}{did_you_mean(name, known)}")
    try:
        return TypeAdapter(part.Config).validate_python(dict(options))
    except ValidationError as fault:
        error = fault.errors()[0]
        if isinstance(refused := error.get("ctx", {}).get("error"), BadInput):
            raise refused from None  # the part's own words
        where = ".".join(str(part) for part in error["loc"])
        raise BadInput(f"{whose}: option {where}: {error['msg']} (got {error['input']!r})") from None
