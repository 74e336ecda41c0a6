"""Temporal JEPA: an encoder learns by foretelling its own next state from this one and the action (StateVLA, phase 1).

```
 o_t     --encoder--> z_t --+--predictor--> ẑ_{t+1} = z_t + Δ(z_t, a_t)
 a_t ------------------------'                 |  squared error, plus VICReg of z_t and ẑ_{t+1}
 o_{t+1} --target---> z_{t+1} <----------------'            models.layers.vicreg
             ^ follows the encoder, never learns: momentum .996 -> 1
```
Where this differs from the published code:
* The target is a copy of the whole backbone. There, only the Mamba layers are; the tokens and the projection that z
  and its target share can then give in to each other.
* Variance and covariance are of z_t and of its prediction, over the batch of all processes; there, of the prediction
  and of one process alone. Not of what z is before its last norm: that norm's gain would then shrink what the error
  sees, and the loss with it (features' deviation .3 instead of .85 on the squares of tests/test_jepa.py).
* The momentum is a function of the step, so that a resumed run goes on where it was, not at .996 again.

The loss alone does not say how good an encoder is: its target moves with it. `models.probe` does. With chunks of more
than one action the predictor reads the whole chunk, and foretells the state after it.
"""

import math
from copy import deepcopy
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from data.errors import BadInput
from models.config import JepaConfig
from models.encoder import Encoder
from models.layers.vicreg import covariance_floor, covariance_loss, effective_rank, gathered, variance_loss
from models.seeds import derive
from models.types import Batch, Info, Phase, Transition


def momentum(step: int, total: int, start: float) -> float:
    """What the target keeps of itself after step `step` of `total`: from `start` to 1 along half a cosine."""
    return 1 - (1 - start) * (math.cos(math.pi * step / total) + 1) / 2


class TemporalPredictor(nn.Module):
    """The next z, by what changes. At the start nothing does: the last layer is zero."""

    def __init__(self, *, width: int, action: int, hidden: int) -> None:
        """action: numbers in a chunk."""
        super().__init__()
        self.of_state = nn.Linear(width, hidden)
        self.of_action = nn.Linear(action, hidden)
        self.change = nn.Sequential(
            *(nn.Linear(2 * hidden, hidden), nn.SiLU(), nn.LayerNorm(hidden)),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.LayerNorm(hidden)),
            last := nn.Linear(hidden, width),
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z: Float[Tensor, "b d"], chunk: Float[Tensor, "b h a"]) -> Float[Tensor, "b d"]:
        return z + self.change(torch.cat([self.of_state(z), self.of_action(chunk.flatten(1))], dim=-1))


class Target(nn.Module):
    """A copy of a backbone that follows it, never learns, and has no dropout."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = deepcopy(backbone).requires_grad_(False).eval()

    def follow(self, backbone: nn.Module, momentum: float) -> None:
        """Keep the share `momentum` of each weight."""
        get_ema_multi_avg_fn(momentum)(list(self.backbone.parameters()), list(backbone.parameters()), None)


class Jepa(Phase):
    """Publishes the encoder; carries its target and the predictor."""

    Config: ClassVar[type] = JepaConfig
    reads: ClassVar[type[Batch]] = Transition

    def __init__(self, encoder: Encoder, config: JepaConfig) -> None:
        super().__init__()
        if not config.total_steps:
            raise BadInput("phase jepa: total_steps is 0; give the steps of its fit, which the target's momentum spans")
        self.policy, self.config = encoder, config
        width, spec = encoder.backbone.width, encoder.spec
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("predictor"))  # or two runs of one recipe would differ
            self.predictor = TemporalPredictor(
                width=width, action=spec.horizon * spec.action_width, hidden=config.hidden
            )
        self.target = Target(encoder.backbone)

    def parts(self) -> dict[str, nn.Module]:
        return {"predictor": self.predictor, "target": self.target}

    def followers(self) -> list[nn.Module]:
        return [self.target]

    def after_step(self, step: int) -> None:
        now = momentum(step, self.config.total_steps, self.config.momentum)
        self.target.follow(self.policy.backbone, now)

    def forward(self, batch: Transition, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        encoder = self.policy
        chunk = encoder.normalised(batch.action, encoder.mask(batch.action_is_pad))
        drawn = generator.get_state()
        z = encoder.backbone(encoder.prepare(batch.observation, generator)).pooled
        generator.set_state(drawn)  # both moments are shifted and coloured alike, or z would have to be blind to it
        with torch.no_grad():
            following = self.target.backbone(encoder.prepare(batch.next, generator)).pooled
        foretold = self.predictor(z, chunk)
        with torch.autocast(z.device.type, enabled=False):
            return self._loss(z.float(), foretold.float(), following.float())

    def _loss(
        self, z: Float[Tensor, "b d"], foretold: Float[Tensor, "b d"], following: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error per sample; what is of the batch as a whole counts alike for each."""
        error = ((foretold - following) ** 2).mean(dim=-1)
        every, config = [gathered(z), gathered(foretold)], self.config
        if len(every[0]) < 2:
            raise BadInput("phase jepa compares the samples of a batch with each other: give fit.batch_size 2 or more")
        variance = torch.stack([variance_loss(rows) for rows in every]).mean()
        covariance = torch.stack([covariance_loss(rows) for rows in every]).mean()
        loss = error + config.variance * variance + config.covariance * covariance
        info = {"jepa_mse": error.mean(), "jepa_variance": variance, "jepa_covariance": covariance}
        info["jepa_covariance_excess"] = covariance - covariance_floor(*every[0].shape)
        info["jepa_rank"] = effective_rank(every[0].detach())
        return loss, {name: value.detach() for name, value in info.items()}
