"""StateVLA's policy: a small causal Mamba says where noisy actions should move, a classifier where the gripper goes.

```
 [σ 1] [z 1] [noisy actions H] --Mamba--> velocity of each action        σ = 1 noise, σ = 0 action (noise_at_1)
        z ----------------------MLP-----> one logit per step: the gripper's sign
```
| preset    | width, layers, states, MLP inside | draws | for                            |
|-----------|-----------------------------------|-------|--------------------------------|
| tiny      | 128, 1, 4, none                   | 8     | tests                          |
| small     | 128, 2, 16, 256                   | 4     | CPU                            |
| published | 256, 3, 64, 256                   | 1     | GPU; there with gripper -1     |

A gripper that is only ever commanded -1 or +1 is no quantity to regress: half-way is never right. With `gripper` its
component is left out of the flow and its sign classified (binary cross-entropy), which asks that it enters and leaves
the network as it is: `normalization="mean_std_signs"`, or min_max. The answer is then exactly -1 or +1.

The published classifier sees z alone and may close before the arm, which z does not tell it the sampled way of, has
arrived: `reads_chunk` shows it the arm's chunk too. `margin` keeps it from chattering:

    p(+1)       .9   .8   .45  .55  .48  .1   .2         margin .2: it switches only where p is beyond .5 ± .2
    sign        +    +    -    +    -    -    -
    with margin +    +    +    +    +    -    -
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from data.errors import BadInput
from models.flow import CONVENTIONS, euler
from models.layers.embedding import sinusoid
from models.layers.mamba import MambaConfig, MambaStack
from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes

POSITION_STD = 0.02  # of learned positions at the start


@dataclass(frozen=True, kw_only=True)
class _Size:
    mamba: MambaConfig
    layers: int
    draws: int


PRESETS = {
    "tiny": _Size(mamba=MambaConfig(dim=128, state=4), layers=1, draws=8),
    "small": _Size(mamba=MambaConfig(dim=128, intermediate=256), layers=2, draws=4),
    "published": _Size(mamba=MambaConfig(dim=256, state=64, intermediate=256), layers=3, draws=1),
}


@dataclass(frozen=True, kw_only=True)
class StateVLAHeadConfig:
    """Options of the `statevla` head."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above
    time: Literal["uniform", "beta"] = "uniform"  # distribution of training times
    steps: int = 4  # Euler steps when acting
    draws: int = 0  # (noise, time) pairs per training sample; the backbone runs once for all; 0 = the preset's
    gripper: int | None = None  # number of the component that is only ever -1 or +1; -1 = the network's last one
    pos_weight: float = 1.0  # what a +1 of it counts beside a -1: their number divided by that of the +1 balances them
    margin: float = 0.0  # how far from 1/2 its probability must be to switch within a chunk; below .5
    reads_chunk: bool = False  # its classifier also reads the arm's chunk

    def __post_init__(self) -> None:
        if self.steps < 1 or self.draws < 0:
            raise BadInput(f"head statevla: steps {self.steps} must be at least 1 and draws {self.draws} at least 0")
        if not 0 <= self.margin < 0.5 or self.pos_weight <= 0:
            raise BadInput(
                f"head statevla: margin {self.margin} must be in [0, .5) and pos_weight {self.pos_weight} above 0"
            )


class StateVLAHead(nn.Module):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = StateVLAHeadConfig
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    likes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: StateVLAHeadConfig, sizes: Sizes) -> None:
        """Raises `BadInput` for a gripper that is no component."""
        super().__init__()
        size = PRESETS[config.preset]
        mamba, self.draws = size.mamba, config.draws or size.draws
        self.config, self.horizon, self.convention = config, sizes.horizon, CONVENTIONS["noise_at_1"]
        self.gripper = _gripper(config.gripper, sizes.action)
        width = sizes.action - (self.gripper is not None)  # of the arm
        self.noise_shape = (sizes.horizon, width)
        self.time = _mlp(mamba.dim, mamba.dim, mamba.dim, hidden_layers=1)
        self.of_state = nn.Linear(sizes.context, mamba.dim)
        self.of_action = nn.Linear(width, mamba.dim)
        self.places = nn.Parameter(POSITION_STD * torch.randn(sizes.horizon + 2, mamba.dim))
        self.mixer = MambaStack(mamba, size.layers)
        self.velocity_of = nn.Linear(mamba.dim, width)
        if self.gripper is not None:
            seen = sizes.context + (sizes.horizon * width if config.reads_chunk else 0)
            self.classifier = _mlp(seen, mamba.dim, sizes.horizon, hidden_layers=2)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error of the arm's velocity, plus the cross-entropy of the gripper's sign.

        Raises `BadInput` for a gripper that is neither -1 nor +1 inside the network.
        """
        chunk = self._arm(action)
        arm = self._flow_loss(context, chunk, self._arm(mask), generator)
        info = {"pos_rot_loss": arm.mean().detach()}
        if self.gripper is None:
            return arm, info
        sign, counts = action[..., self.gripper], mask[..., self.gripper]
        self._refuse_unless_signs(sign, counts)
        gripper = self._gripper_loss(context, chunk, sign, counts)
        return arm + gripper, info | {"gripper_loss": gripper.mean().detach()}

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h w"]:
        arm = euler(self.convention, lambda x, t: self.velocity(x, t, context), noise, self.config.steps)
        if self.gripper is None:
            return arm
        sign = steady_signs(self._logits(context, arm).sigmoid(), self.config.margin).to(arm.dtype)
        return torch.cat([arm[..., : self.gripper], sign[..., None], arm[..., self.gripper :]], dim=-1)

    def velocity(self, x_t: Float[Tensor, "b h a"], t: Float[Tensor, " b"], context: Context) -> Float[Tensor, "b h a"]:
        """dx/dσ at x_t, of the arm alone."""
        time = self.time(sinusoid(t, self.places.shape[1], longest=4.0, shortest=4e-3).to(self.places.dtype))
        first = torch.stack([time, self.of_state(context.pooled)], dim=1)
        tokens = torch.cat([first, self.of_action(x_t)], dim=1) + self.places
        return self.velocity_of(self.mixer(tokens)[:, 2:])

    def _flow_loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> Float[Tensor, " b"]:
        draws = self.draws
        context, action, mask = context.repeat(draws), *(v.repeat_interleave(draws, dim=0) for v in (action, mask))
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        t = self.convention.sample_time((len(action),), generator, self.config.time)
        x_t = self.convention.interpolate(noise, action, t)
        error = (self.velocity(x_t, t, context) - self.convention.velocity(noise, action)) ** 2
        return masked_mean(error, mask).unflatten(0, (-1, draws)).mean(dim=1)

    def _gripper_loss(
        self, context: Context, arm: Float[Tensor, "b h a"], sign: Float[Tensor, "b h"], counts: Bool[Tensor, "b h"]
    ) -> Float[Tensor, " b"]:
        opens, logits = (sign + 1) / 2, self._logits(context, arm)
        weight = logits.new_tensor(self.config.pos_weight)
        entropy = F.binary_cross_entropy_with_logits(logits, opens, reduction="none", pos_weight=weight)
        return masked_mean(entropy[..., None], counts[..., None])

    def _logits(self, context: Context, arm: Float[Tensor, "b h a"]) -> Float[Tensor, "b h"]:
        assert context.pooled is not None, "the head needs it"
        seen = torch.cat([context.pooled, arm.flatten(1)], dim=-1) if self.config.reads_chunk else context.pooled
        return self.classifier(seen).float()

    def _arm(self, x: Shaped[Tensor, "b h w"]) -> Shaped[Tensor, "b h a"]:
        """All components but the gripper's."""
        g = self.gripper
        return x if g is None else torch.cat([x[..., :g], x[..., g + 1 :]], dim=-1)

    def _refuse_unless_signs(self, sign: Float[Tensor, "b h"], counts: Bool[Tensor, "b h"]) -> None:
        if not (counts.any() & (sign.abs() == 1).logical_or(~counts).all()):
            raise BadInput(
                f"head statevla: action component {self.gripper} is not always -1 or +1 inside the network; use "
                "normalization mean_std_signs if the data's is, or gripper null"
            )


def steady_signs(probability: Float[Tensor, "b h"], margin: float) -> Float[Tensor, "b h"]:
    """-1 or +1 per step, switching only where the probability of +1 is further than `margin` from a half."""
    sure = (probability - 0.5).abs() > margin
    sure[:, 0] = True  # the first step has nothing to stay with
    steps = torch.arange(probability.shape[1], device=probability.device)
    last_sure = steps.where(sure, 0).cummax(dim=1).values
    return torch.where(probability.gather(1, last_sure) > 0.5, 1.0, -1.0)


def _gripper(asked: int | None, width: int) -> int | None:
    """Number of the gripper's component, counted from the first."""
    if asked is None:
        return None
    if not -width <= asked < width or width < 2:
        raise BadInput(f"head statevla: gripper {asked} is none of {width} action components beside an arm's")
    return asked % width


def _mlp(width: int, hidden: int, out: int, *, hidden_layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(hidden_layers):
        parts += [nn.Linear(width, hidden), nn.SiLU()]
        width = hidden
    return nn.Sequential(*parts, nn.Linear(width, out))
