"""Q over chunks, and with it V: what a night's rollouts say about every decision taken in them.

```
 Q(x, A)  ->  r + γ^h (1 - terminal) · V(x')          both Qs, squared error, target detached
 V(x)     <-  models.phases.chunk_value               from a Polyak copy of Q
```
Learns from executed chunks only (`Transition`): a reward belongs to the actions that earned it.
Kostrikov et al. 2021 (arXiv 2110.06169) for the default algorithm.
"""

from copy import deepcopy
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.errors import BadInput
from models.config import ChunkCriticConfig
from models.critic import Critic, TwinQ
from models.phases.chunk_value import expectile_loss, soft_value_loss
from models.types import Batch, Info, Observation, ParameterGroup, Phase, Transition


def td_target(
    reward: Float[Tensor, " b"], discount: Float[Tensor, " b"], next_value: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """What Q is drawn to. `discount` is γ^h, and 0 where the task ended inside the chunk: then nothing follows."""
    return (reward + discount * next_value).detach()


def critic_loss(q: Float[Tensor, "b 2"], target: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Squared error, a mean over the two Qs."""
    return ((q - target[:, None]) ** 2).mean(dim=-1)


class TargetQ(nn.Module):
    """A copy of Q that follows it slowly, never learns, and has no dropout."""

    def __init__(self, twin: TwinQ) -> None:
        super().__init__()
        self.twin = deepcopy(twin).requires_grad_(False).eval()

    def follow(self, twin: TwinQ, tau: float) -> None:
        """Take over the share `tau` of `twin`'s weights."""
        get_ema_multi_avg_fn(1 - tau)(list(self.twin.parameters()), list(twin.parameters()), None)


class ChunkCritic(Phase):
    """Publishes the critic. The policy whose chunks enter `sarsa_entropy` is present through its proposals."""

    Config: ClassVar[type] = ChunkCriticConfig
    reads: ClassVar[type[Batch]] = Transition

    def __init__(self, critic: Critic, config: ChunkCriticConfig) -> None:
        super().__init__()
        if config.alpha:
            raise BadInput("alpha needs the likelihood of a policy that learns too: train chunk_rl with head gaussian")
        self.policy = critic
        self.config = config
        self.target = TargetQ(critic.twin)

    def parts(self) -> dict[str, nn.Module]:
        return {"target": self.target}

    def followers(self) -> list[nn.Module]:
        return [self.target]

    def parameter_groups(self) -> list[ParameterGroup]:
        if self.policy.spec.config.joint:
            return super().parameter_groups()
        return self.groups_under("policy.twin", objective="q") + self.groups_under("policy.value", objective="v")

    def forward(self, batch: Transition, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        critic, config = self.policy, self.config
        seen = critic.prepare(batch.observation, generator)
        q_loss, q_info = q_part(critic, batch, seen, generator)
        if config.algorithm == "iql":
            v_loss, v_info = expectile_part(critic, self.target.twin, batch, seen, config.expectile)
        else:
            if batch.proposals is None:
                raise BadInput("algorithm sarsa_entropy averages Q over a policy's chunks; relabel first, or use iql")
            v_loss, v_info = soft_part(critic, self.target.twin, batch, seen, batch.proposals)
        return q_loss + config.lambda_v * v_loss, q_info | v_info

    def after_step(self, step: int) -> None:
        self.target.follow(self.policy.twin, self.config.tau)


def q_part(
    critic: Critic, batch: Transition, seen: Observation, generator: torch.Generator
) -> tuple[Float[Tensor, " b"], Info]:
    """Q's loss per sample. `seen` is the batch's observation, prepared."""
    mask = critic.mask(batch.action_is_pad)
    with torch.no_grad():
        target = td_target(batch.reward, batch.discount, critic.v(critic.prepare(batch.next, generator)))
    q = critic.q(seen, critic.normalised(batch.action, mask), mask)
    loss = critic_loss(q, target)
    return loss, {
        "q_loss": loss.mean().detach(),
        "q": q.mean().detach(),
        "q_disagreement": (q[:, 0] - q[:, 1]).abs().mean().detach(),
    }


def expectile_part(
    critic: Critic, target: TwinQ, batch: Transition, seen: Observation, expectile: float
) -> tuple[Float[Tensor, " b"], Info]:
    """V's loss against the executed chunks' Q."""
    mask = critic.mask(batch.action_is_pad)
    with torch.no_grad():
        q = target(seen, critic.normalised(batch.action, mask), mask).min(dim=-1).values
    v = critic.v(seen)
    loss = expectile_loss(q - v, expectile)
    return loss, _of_value(loss, v, q)


def soft_part(
    critic: Critic,
    target: TwinQ,
    batch: Transition,
    seen: Observation,
    chunks: Float[Tensor, "b k h a"],
    *,
    log_prob: Float[Tensor, "b k"] | None = None,
    alpha: float = 0.0,
) -> tuple[Float[Tensor, " b"], Info]:
    """V's loss against the Q of a policy's `chunks`, in the schema's units. `log_prob` is per dimension."""
    mask = critic.mask(torch.zeros(chunks.shape[:3], dtype=torch.bool, device=chunks.device))
    with torch.no_grad():
        q = target.of_many(seen, critic.normalised(chunks, mask), mask).min(dim=-1).values
    v = critic.v(seen)
    loss = soft_value_loss(v, q, log_prob, alpha)
    return loss, _of_value(loss, v, q.mean(dim=1))


def _of_value(loss: Tensor, v: Tensor, q: Tensor) -> Info:
    return {"v_loss": loss.mean().detach(), "v": v.mean().detach(), "advantage": (q - v).mean().detach()}
