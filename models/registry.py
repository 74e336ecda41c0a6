"""The tables of what can be named in a recipe or a checkpoint. Adding a part is one new file and one line here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from data.errors import BadInput
from data.registry import Registry, did_you_mean
from models import plugins


class OpenRegistry(Registry):
    """A table that plugins add to: they are imported when it does not have a name, or all names are asked for."""

    def __iter__(self) -> Iterator[str]:
        plugins.load()
        return super().__iter__()

    def module(self, name: str) -> str:
        if name not in self.table:
            plugins.load()
        return super().module(name)


BACKBONES = OpenRegistry(
    "backbone",
    {
        "act": "models.backbones.act:ActBackbone",
        "diffusion_rgb": "models.backbones.diffusion_rgb:DiffusionRgb",
        "eagle": "models.backbones.eagle:Eagle",
        "eagle_1_5": "models.backbones.eagle_1_5:Eagle15",
        "mamba": "models.backbones.mamba:MambaBackbone",
        "paligemma_expert": "models.backbones.paligemma_expert:PaligemmaExpert",
        "resnet": "models.backbones.resnet:ResNet",
        "statevla": "models.backbones.statevla:StateVLA",
    },
)

HEADS = OpenRegistry(
    "head",
    {
        "act": "models.heads.act:ActHead",
        "diffusion": "models.heads.diffusion:DiffusionHead",
        "flow": "models.heads.flow:FlowHead",
        "flow_matching": "models.heads.flow_matching:FlowMatchingHead",
        "flow_matching_1_5": "models.heads.flow_matching_1_5:FlowMatching15Head",
        "gaussian": "models.heads.gaussian:GaussianHead",
        "pi0_flow": "models.heads.pi0_flow:Pi0FlowHead",
        "statevla": "models.heads.statevla:StateVLAHead",
    },
)

POLICIES = OpenRegistry(  # what a checkpoint can hold
    "policy",
    {
        "pair": "models.pair:Pair",  # any backbone with any head that fits it
        "critic": "models.critic:Critic",
        "encoder": "models.encoder:Encoder",
    },
)

PHASES = OpenRegistry(
    "phase",
    {
        "bc": "models.phases.bc:BehaviourCloning",
        "chunk_critic": "models.phases.chunk_critic:ChunkCritic",
        "chunk_policy": "models.phases.chunk_policy:ChunkPolicy",
        "chunk_rl": "models.phases.chunk_rl:ChunkRL",
        "flow_matching": "models.phases.flow_matching:FlowMatching",
        "jepa": "models.phases.jepa:Jepa",
    },
)


Kind = Literal["policy", "backbone", "head", "phase"]
OPEN = {
    "policy": (POLICIES, ("Config", "assemble")),
    "backbone": (BACKBONES, ("Config", "gives")),
    "head": (HEADS, ("Config", "needs")),
    "phase": (PHASES, ("Config", "reads")),
}  # and what a class of the kind must have


def register[T: type](name: str, *, kind: Kind = "policy") -> Callable[[T], T]:
    """Decorates a class of a user's own, which can then be named in a recipe, a checkpoint and on the command line.

    Raises `BadInput` for a name that is taken and a class that lacks what its kind needs.
    """

    def add(part: T) -> T:
        table, needed = OPEN[kind]
        where = f"{part.__module__}:{part.__qualname__}"
        if "." in part.__qualname__:
            raise BadInput(f"{kind} {name!r} ({where}) is inside of something; put it at the top of its module")
        for attribute in needed:
            if not hasattr(part, attribute):
                raise BadInput(f"{kind} {name!r} ({where}) has no {attribute}; CONTRIBUTING.md shows one that is whole")
        table.register(name, where)
        return part

    return add


def modules(policy: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that a policy's answers stand on and that are chosen by name in its configuration."""
    kind = policy.get("kind", "pair")
    parts = (BACKBONES.module(policy["backbone"]), HEADS.module(policy["head"])) if kind == "pair" else ()
    return POLICIES.module(kind), *parts


def configure(part: type, options: Mapping[str, Any], *, whose: str) -> Any:
    """`part.Config(**options)`. Raises `BadInput` that names an unknown option or a value of the wrong type.

    `whose` says in words whose options these are, e.g. "backbone resnet".
    """
    known = getattr(part.Config, "model_fields", None) or [f.name for f in fields(part.Config)]  # pydantic's or not
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
