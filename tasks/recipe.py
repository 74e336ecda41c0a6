"""A recipe: one whole night, as one frozen value. Every field can be overridden on the command line.

The parts are the configurations of what they configure (`SimConfig`, `ChunkConfig`, `FitConfig`, ...); only what
belongs to the night itself (how many episodes, which seeds, who acts) is defined here.
"""

import json
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from data.chunk_config import ChunkConfig
from data.errors import BadInput
from data.registry import did_you_mean
from data.relabel_config import Relabel
from data.sim.config import SimConfig
from models.config import ChunkCriticConfig, ChunkPolicyConfig, CriticConfig, FitConfig, JepaConfig, PolicyConfig


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Which rollouts a night adds."""

    scenes: tuple[str, ...] = ()  # registered scenes; none = sim.scene alone
    policy: str = "oracle"  # who acts: oracle, random, champion, or the folder of a checkpoint
    noise: tuple[float, ...] = (0.1,)  # std on the oracle's arm actions, action units; several: batches take turns
    episodes: int = 200  # episodes per scene and night; 0 = learn from dataset.sources alone
    batch: int = 20  # episodes per committed batch: what a kill can cost at most
    nights: int = 1  # nights collected so far, this one included; each adds its own seeds
    first_seed: int = 0  # seed of the first episode


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How batches become one training set."""

    held_out: float = 0.05  # share of episodes kept from training, for the per-dimension action error
    failures: bool = False  # also train on episodes that failed
    sources: tuple[str, ...] = ()  # folders of LeRobot v3 or v2.1 datasets recorded elsewhere, added to the rollouts


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The protocol of the score."""

    episodes: int = 50  # unseen seeds, one episode each
    first_seed: int = 1_000_000  # seed of the first episode; refused if it was collected
    replan: int = 5  # actions of a chunk executed before the policy is asked again
    ensemble: float | None = None  # average overlapping chunks instead, with this m (ACT's temporal ensembling: 0.01)
    self_test: int = 4  # expert episodes recorded and replayed before any score counts
    expert_rate: float = 0.75  # success that the expert must reach in them
    samples: int = 4  # answers per held-out decision, over which the action error is averaged
    best_of: int = 1  # chunks proposed per decision, of which the critic's favourite is executed; 1 = no critic


@dataclass(frozen=True, kw_only=True)
class Improve:
    """How a cloned policy gets better by its own rollouts."""

    start: str = ""  # folder of the checkpoint to improve, or champion; empty = the one this night clones
    episodes: int = 300  # rollouts of it per scene and night
    batch: int = 50  # episodes per committed batch
    first_seed: int = 100_000  # seed of the first of them; each night adds its own
    relabel: Relabel = field(default_factory=Relabel)
    critic: CriticConfig = field(default_factory=CriticConfig)
    critic_loss: ChunkCriticConfig = field(default_factory=ChunkCriticConfig)
    critic_fit: FitConfig = field(default_factory=FitConfig)
    policy_loss: ChunkPolicyConfig = field(default_factory=ChunkPolicyConfig)
    fit: FitConfig = field(default_factory=FitConfig)  # of the policy; cloning continued trains alike


@dataclass(frozen=True, kw_only=True)
class Represent:
    """How an encoder is learnt before the policy, whose head then acts by it alone (StateVLA's two phases)."""

    phase: Literal[1, 2] = 2  # what `flywheel train` ends with: 1 = the encoder, 2 = the policy; also --phase
    start: str = ""  # folder of an artefact of jepa to act by; empty = learn one; also --checkpoint
    loss: JepaConfig = field(default_factory=JepaConfig)
    fit: FitConfig = field(default_factory=FitConfig)  # of the encoder, which the probe looks at every fit.save_every


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One night."""

    name: str  # registered name of this recipe
    about: str  # one line for people
    model: str  # name in the MLflow registry
    workers: int = 2  # simulator processes
    sim: SimConfig = field(default_factory=lambda: SimConfig(scene="pick_cube"))
    collect: Collect = field(default_factory=Collect)
    dataset: Dataset = field(default_factory=Dataset)
    chunks: ChunkConfig = field(default_factory=ChunkConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    evaluate: Evaluate = field(default_factory=Evaluate)
    improve: Improve | None = None  # none: the night ends with the cloned policy
    represent: Represent | None = None  # none: the policy's backbone learns with its head

    def __post_init__(self) -> None:
        plan, score = self.collect, self.evaluate
        if self.improve and self.represent:
            raise BadInput("represent keeps a policy from pictures, improve trains it on them; choose one")
        if min(plan.batch, plan.nights, score.episodes, score.samples, self.workers) < 1:
            raise BadInput("collect.batch and .nights, evaluate.episodes and .samples, and workers must be at least 1")
        if not plan.noise or min(plan.noise) < 0:
            raise BadInput(f"collect.noise {list(plan.noise)} must be one or more numbers of at least 0")
        if plan.episodes < (0 if self.dataset.sources else 1):
            raise BadInput("collect.episodes must be at least 1, or 0 together with dataset.sources")
        last = plan.first_seed + plan.nights * plan.episodes
        if score.best_of > 1 and self.improve is None:
            raise BadInput(f"evaluate.best_of {score.best_of} ranks by a critic, which only `improve` makes; use 1")
        if plan.first_seed < score.first_seed + score.episodes and score.first_seed < last:
            raise BadInput(
                f"evaluate.first_seed {score.first_seed}: its seeds are collected (collect.first_seed "
                f"{plan.first_seed} to {last - 1}); evaluate on others, e.g. from {last} on"
            )

    @property
    def only_represents(self) -> bool:
        """Whether `flywheel train` ends with the encoder."""
        return self.represent is not None and self.represent.phase == 1

    @property
    def scenes(self) -> tuple[str, ...]:
        """The scenes that are collected."""
        return self.collect.scenes or (self.sim.scene,)

    def to_json(self) -> dict[str, Any]:
        return jsonable(self)


ALIASES = {"phase": "represent.phase", "checkpoint": "represent.start"}  # as StateVLA's own commands have them


def jsonable(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values."""
    return json.loads(json.dumps(asdict(config)))


def rebuild[T](kind: type[T], value: dict[str, Any]) -> T:
    """A configuration from the JSON of `jsonable`."""
    return TypeAdapter(kind).validate_python(value)


def override(recipe: Recipe, overrides: dict[str, str]) -> Recipe:
    """`recipe` with `{"fit.lr": "1e-4"}` applied. Raises `BadInput` for an unknown option or a wrong value."""
    known = options(recipe)
    nested = recipe.to_json()
    for alias, text in overrides.items():
        name = ALIASES.get(alias, alias)
        parent = nested
        *path, last = name.split(".")
        for part in path:
            parent = parent.get(part) if isinstance(parent, dict) else None
        if name not in known and not _in_free_form(recipe, name):
            raise BadInput(f"unknown option --{name}{did_you_mean(name, known)}")
        assert isinstance(parent, dict)
        value = _parsed(text)
        parent[last] = [value] if isinstance(parent.get(last), list) and not isinstance(value, list) else value
    try:
        return rebuild(Recipe, nested)
    except ValidationError as fault:
        error = fault.errors()[0]
        if isinstance(refused := error.get("ctx", {}).get("error"), BadInput):
            raise refused from None  # a configuration's own words
        where = ".".join(str(part) for part in error["loc"])
        raise BadInput(f"option --{where}: {error['msg']} (got {error['input']!r})") from None


def options(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested dataclass: `{"fit.lr": 0.0003, ...}`."""
    leaves: dict[str, Any] = {}
    for f in fields(value):
        item = getattr(value, f.name)
        leaves |= options(item, f"{prefix}{f.name}.") if is_dataclass(item) else {prefix + f.name: item}
    return leaves


def _in_free_form(recipe: Recipe, name: str) -> bool:
    """`policy.head_options.dim`: the last part is checked by whoever the dictionary configures."""
    parent = name.rpartition(".")[0]
    return isinstance(options(recipe).get(parent), dict)


def _parsed(text: str) -> Any:
    """`3`, `true`, `[1, 2]` and `null` as JSON; `a,b` as a list; anything else as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text.split(",") if "," in text else text


def hint(type_: Any) -> str:
    """A type as a person writes it: `int`, `one of a b`, `list of str`."""
    origin = typing.get_origin(type_)
    if origin is typing.Literal:
        return "one of " + " ".join(str(a) for a in typing.get_args(type_))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(hint(a) for a in typing.get_args(type_))
    if origin is tuple:
        return "list of " + hint(typing.get_args(type_)[0])
    return "none" if type_ is type(None) else getattr(type_, "__name__", str(type_))
