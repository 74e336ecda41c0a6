"""A policy answers an observation with a chunk of actions: what training, acting and evaluation know of every kind.

```
 observation, noise --answer--> [b h w] --invert, clip--> environment's units
```
The kinds are `models.pair.Pair`, any backbone with any head, and `models.custom.Custom`, a user's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import Component, Schema
from models.config import LoraOptions, PolicyConfig
from models.devices import uses_bf16
from models.lora import add_adapters
from models.reading import Reader, Spec
from models.registry import POLICIES
from models.types import Batch, Info, Observation


@dataclass(frozen=True, kw_only=True)
class PolicySpec(Spec[PolicyConfig]):
    """All that decides a policy's architecture and meaning."""

    @property
    def kind(self) -> str:
        return self.config.kind

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PolicySpec":
        return cls(
            horizon=value["horizon"],
            config=PolicyConfig.from_json(value["config"]),
            schema=Schema.from_json(value["schema"]),
        )


class Policy(Reader):
    """What a checkpoint holds, a phase trains and a rollout asks."""

    Spec = PolicySpec

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of what an answer starts from, per sample; (0,) for a deterministic policy."""
        raise NotImplementedError

    @classmethod
    def build(cls, spec: PolicySpec, stats: Mapping[str, Stats], *, seed: int = 0) -> "Policy":
        """A new policy, its weights a function of `seed`. `stats` has "state" and "action", in the schema's order.

        Raises `BadInput` for unknown names and options, a pair that does not fit, statistics of another width.
        """
        normalizers = {name: Normalizer(stats=stats[name], mode=spec.config.normalization) for name in stats}
        return _equipped(POLICIES.resolve(spec.kind).assemble(spec, normalizers, seed=seed, new=True), seed)

    @classmethod
    def restore(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer]) -> "Policy":
        """The architecture of `spec`, for weights that a checkpoint is about to fill in."""
        return _equipped(POLICIES.resolve(spec.kind).assemble(spec, normalizers, seed=0, new=False), 0)

    @classmethod
    def assemble(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer], *, seed: int, new: bool) -> Self:
        """One of this kind; a `new` one begins from the published weights that its options name, if they do."""
        raise NotImplementedError

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        return self.loss(batch, generator)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        """Loss per sample: over real steps and real components only.

        Noise, times and (in training mode) augmentation are drawn from `generator`, which is on the policy's device.
        """
        raise NotImplementedError

    def answer(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h w"]:
        """k normalised chunks for each observation as recorded, both on the policy's device."""
        raise NotImplementedError

    def predict_action(
        self,
        observation: Observation,
        generator: torch.Generator | None = None,
        *,
        noise: Float[Tensor, "b ..."] | None = None,
    ) -> Float[Tensor, "b h a"]:
        """Chunks of actions in the environment's units, a function of the observation and the noise.

        `noise` [b, *noise_shape] is drawn from `generator` unless given.
        """
        if noise is None:
            shape = (len(observation), *self.noise_shape)
            noise = torch.randn(shape, generator=generator, device=self.device)
        return self.propose(observation, noise[:, None])[:, 0]

    inference = predict_action  # as InternManip's policies call it
    get_action = predict_action  # as GR00T's do

    @torch.no_grad()
    def propose(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h a"]:
        """As `predict_action`, but k chunks for each observation."""
        with torch.autocast(self.device.type, torch.bfloat16, uses_bf16(self.spec.config.precision, self.device)):
            return self.in_units(self.answer(observation.to(self.device), noise.to(self.device)))

    def in_units(self, chunk: Float[Tensor, "*b h w"]) -> Float[Tensor, "*b h a"]:
        """What the network answered, in the environment's units and limits."""
        chunk = self.action.invert(chunk.float()[..., : len(self.spec.schema.action)])
        return within_limits(chunk, self.spec.schema.action)


def with_lora(policy: Policy, options: LoraOptions, *, seed: int = 0) -> Policy:
    """`policy` with adapters beside its weights, which stand still from now on. Raises `BadInput` if it has some."""
    spec = policy.spec
    if spec.config.lora.rank:
        raise BadInput(f"policy.lora.rank is {options.rank}, but the policy has adapters already; train those")
    policy.spec = replace(spec, config=replace(spec.config, lora=options))
    add_adapters(dict(policy.named_children()), options, seed=seed)
    return policy


def _equipped(policy: Policy, seed: int) -> Policy:
    """With the adapters and the compilation that its configuration asks for."""
    config, networks = policy.spec.config, dict(policy.named_children())
    if config.lora.rank:
        add_adapters(networks, config.lora, seed=seed)
    if config.compile:
        for network in networks.values():
            compile_in_place(network)
    return policy


def compile_in_place(network: nn.Module) -> None:
    """Whatever is called of a backbone, a head or a policy of a user's own. No name of a weight changes."""
    network.compile()
    for method in ("loss", "sample"):  # of a head
        if hasattr(network, method):
            setattr(network, method, torch.compile(getattr(network, method)))


def within_limits(chunk: Float[Tensor, "*b a"], action: tuple[Component, ...]) -> Float[Tensor, "*b a"]:
    """`chunk` clipped to the lowest and highest value of each component.

    A unit with a number in it ("1", "0.1 rad") is a scale, and the component a command in [-1, 1]; a bare one ("rad")
    has no limit.
    """
    highest = chunk.new_tensor([1.0 if c.unit[:1].isdigit() else float("inf") for c in action])
    return chunk.clamp(-highest, highest)
