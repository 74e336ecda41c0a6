"""Q, V and the policy at once: the seed design's loop, with targets detached and weights clipped.

```
 L = L_Q + λ_V L_V + λ_π L_π
 separate (default)   three networks that share no weight and are clipped one by one: three optimisers in effect
 joint                all three read through the policy's backbone, so that the λ decide whom it serves
```
A night trains the critic first and the policy after it (`ChunkCritic`, `ChunkPolicy`): one critic serves every policy.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from models.config import ChunkRLConfig
from models.critic import Critic, CriticSpec
from models.pair import Pair
from models.phases.chunk_critic import TargetQ, expectile_part, q_part, soft_part
from models.phases.chunk_policy import advantage_weights, effective_sample_size
from models.types import Batch, Info, Observation, ParameterGroup, Phase, Transition


class ChunkRL(Phase):
    """Publishes the policy, carries the critic."""

    Config: ClassVar[type] = ChunkRLConfig
    reads: ClassVar[type[Batch]] = Transition

    def __init__(self, policy: Pair, config: ChunkRLConfig) -> None:
        super().__init__()
        if not isinstance(policy, Pair):
            raise BadInput(f"chunk_rl reads a pair's head; train policy {policy.spec.kind!r} by chunk_policy")
        if config.imitate != "executed":
            raise BadInput("imitate best_of_k needs a critic that has finished: train chunk_critic, then chunk_policy")
        if config.alpha and not hasattr(policy.head, "log_prob"):
            raise BadInput(f"alpha needs a likelihood, which head {policy.spec.config.head} has not; use head gaussian")
        self.policy = policy
        self.config = config
        self.critic = _critic_beside(policy, config)
        self.target = TargetQ(self.critic.twin)

    def parts(self) -> dict[str, nn.Module]:
        return {"critic": self.critic, "target": self.target}

    def followers(self) -> list[nn.Module]:
        return [self.target]

    def parameter_groups(self) -> list[ParameterGroup]:
        if self.config.joint:
            return super().parameter_groups()
        return [
            *self.groups_under("critic.twin", objective="q"),
            *self.groups_under("critic.value", objective="v"),
            *self.groups_under("policy.", objective="policy"),
        ]

    def forward(self, batch: Transition, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        config, critic = self.config, self.critic
        seen = critic.prepare(batch.observation, generator)
        q_loss, q_info = q_part(critic, batch, seen, generator)
        v_loss, v_info = self._value(batch, seen, generator)
        policy_loss, policy_info = self._policy(batch, seen, generator)
        loss = q_loss + config.lambda_v * v_loss + config.lambda_pi * policy_loss
        return loss, q_info | v_info | policy_info

    def after_step(self, step: int) -> None:
        self.target.follow(self.critic.twin, self.config.tau)

    def _value(
        self, batch: Transition, seen: Observation, generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        critic, config = self.critic, self.config
        if config.algorithm == "iql":
            return expectile_part(critic, self.target.twin, batch, seen, config.expectile)
        chunks, log_prob = self._drawn(batch, generator)
        return soft_part(critic, self.target.twin, batch, seen, chunks, log_prob=log_prob, alpha=config.alpha)

    @torch.no_grad()
    def _drawn(
        self, batch: Transition, generator: torch.Generator
    ) -> tuple[Float[Tensor, "b k h a"], Float[Tensor, "b k"] | None]:
        """The policy's chunks, in the schema's units, and their likelihood where it is asked for."""
        if batch.proposals is not None and not self.config.alpha:
            return batch.proposals, None
        policy, k = self.policy, self.config.samples
        context = policy.context(batch.observation).repeat(k)
        noise = torch.randn((len(batch) * k, *policy.head.noise_shape), generator=generator, device=policy.device)
        chunk = policy.head.sample(context, noise)
        log_prob = None
        if self.config.alpha:
            everything = policy.mask(torch.zeros_like(batch.action_is_pad).repeat_interleave(k, dim=0))
            log_prob = policy.head.log_prob(context, chunk, everything).unflatten(0, (-1, k))
        return policy.in_units(chunk).unflatten(0, (-1, k)), log_prob

    def _policy(
        self, batch: Transition, seen: Observation, generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        mask = self.critic.mask(batch.action_is_pad)
        with torch.no_grad():
            q = self.target.twin(seen, self.critic.normalised(batch.action, mask), mask).min(dim=-1).values
            weights = advantage_weights(q - self.critic.v(seen), self.config.beta, self.config.max_weight)
        loss, info = self.policy(batch, generator)
        return weights * loss, info | {"ess": effective_sample_size(weights), "weight": weights.mean()}


def _critic_beside(policy: Pair, config: ChunkRLConfig) -> Critic:
    """A critic of the policy's schema and normalisation; `joint` reads through the policy's own backbone."""
    mine, shared = policy.spec.config, config.critic
    if config.joint:
        same = ("backbone", "backbone_options", "normalization", "pad_state", "pad_action")
        shared = replace(shared, joint=True, **{name: getattr(mine, name) for name in same})
    spec = CriticSpec(config=shared, schema=policy.spec.schema, horizon=policy.spec.horizon)
    stats = {"state": policy.state.stats, "action": policy.action.stats}
    return Critic.build(spec, stats, trunk=policy.backbone if config.joint else None)
