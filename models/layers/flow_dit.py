"""What GR00T's two action heads have in common: a DiT that tells, for a noisy chunk and a time, where the chunk moves.

```
 Context.tokens --(1.5: norm, self-attention)--> keys and values ---+        once per observation
 Context.state  --of this robot--> [state]                          |
 x_t, t         --of this robot--> [a_0 ... a_h-1] + positions      |
                                                                    v
                         [state, (1.5: learnt tokens,) a_0 ... a_h-1] --DiT--> last h --of this robot--> velocity
```
Time runs from noise (0) to data (1), is drawn from GR00T's Beta and told in 1000 buckets (`models.flow`).

| preset    | DiT: layers, heads x width | hidden | robots | positions | dropout | draws | for                 |
|-----------|----------------------------|--------|--------|-----------|---------|-------|---------------------|
| tiny      | 2, 4 x 16                  | 64     | 2      | 64        | 0       | 8     | tests               |
| small     | 4, 4 x 24                  | 96     | 4      | 64        | 0       | 1     | CPU                 |
| published | 16, 32 x 48                | 1024   | 32     | 1024      | 0.2     | 1     | GPU: GR00T N1, N1.5 |

"hidden" is the width between the maps of a robot's state encoder and action decoder, and of what the DiT answers. At
the published widths a robot's weights and the positions begin at 0.02·N(0, 1), as GR00T's do. In the narrow presets
tokens would then be near nothing beside what attention adds, and the steps of a chunk alike: both begin at about 1.

What differs from LeRobot's and InternManip's heads, besides `models.layers.dit` and `models.layers.embodiment`:
* The loss is per sample, over executed entries, and 0 where there are none; theirs is a mean over the batch, 0/0 there.
* The state is one token of the Context's state: of which rank a state is, their documents leave open.
* Without self-attention no token of the chunk sees another. Nobody would read the state's, so it is not built then.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data.errors import BadInput
from models.flow import CONVENTIONS
from models.layers.dit import DiT, DiTSize, bucket_of
from models.layers.eagle_weights import refuse_unfit
from models.layers.embodiment import ActionEncoder, CategoryLinear, CategoryMLP
from models.layers.masked import masked_mean
from models.layers.pretrained import read_weights
from models.types import Context, Info, Sizes

PREFIX = "action_head."  # of the head's weights in a published GR00T
PROJECTOR = ("state_encoder", "action_encoder", "action_decoder", "position_embedding")  # what is the robot's own

Field = Callable[[Float[Tensor, "r h a"], Float[Tensor, " r"]], Float[Tensor, "r h a"]]  # x_t, t -> dx/dt


@dataclass(frozen=True, kw_only=True)
class FlowDitSize:
    """All numbers that decide the weights' shapes."""

    layers: int
    heads: int
    head: int  # width of a head
    hidden: int
    robots: int
    positions: int  # longest chunk
    dropout: float  # share
    draws: int  # (noise, time) pairs per training sample
    narrow: bool  # begin with larger weights than GR00T's


PRESETS = {
    "tiny": FlowDitSize(
        layers=2, heads=4, head=16, hidden=64, robots=2, positions=64, dropout=0.0, draws=8, narrow=True
    ),
    "small": FlowDitSize(
        layers=4, heads=4, head=24, hidden=96, robots=4, positions=64, dropout=0.0, draws=1, narrow=True
    ),
    "published": FlowDitSize(
        layers=16, heads=32, head=48, hidden=1024, robots=32, positions=1024, dropout=0.2, draws=1, narrow=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class FlowDitConfig:
    """Options of the `flow_matching` and `flow_matching_1_5` heads."""

    preset: Literal["tiny", "small", "published"] = "small"  # sizes; see the table in models.layers.flow_dit
    steps: int = 4  # Euler steps when acting
    max_embodiments: int = 0  # robots there is room for; 0 = the preset's
    embodiment: int = 0  # which of them this one is
    interleave_self_attention: bool = True  # every second block lets the tokens see each other, as published
    tune_projector: bool = True  # train what is the robot's own, and the positions; false needs pretrained
    tune_diffusion_model: bool = True  # train the DiT; false needs pretrained
    pretrained: str = ""  # folder with safetensors of a GR00T of these sizes; empty = from scratch

    def __post_init__(self) -> None:
        if not (self.pretrained or (self.tune_projector and self.tune_diffusion_model)):
            name = "tune_projector" if self.tune_diffusion_model else "tune_diffusion_model"
            raise BadInput(f"head flow_matching: {name} false would keep random weights; name weights in pretrained")
        if self.steps < 1:
            raise BadInput(f"head flow_matching: steps is {self.steps}; give at least 1")
        robots = self.max_embodiments or PRESETS[self.preset].robots
        if not 0 <= self.embodiment < robots:
            raise BadInput(
                f"head flow_matching: embodiment is {self.embodiment}; give 0 to {robots - 1}, or more max_embodiments"
            )


class FlowDit(nn.Module):
    """Where a noisy chunk moves, and how far off that is. Parts are named as in GR00T."""

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    likes: ClassVar[frozenset[str]] = frozenset()
    # a new robot's own rows cannot be made of another's by an adapter
    lora_trains_fully: ClassVar[tuple[str, ...]] = (*PROJECTOR, "future_tokens")

    def __init__(self, config: FlowDitConfig, sizes: Sizes, *, draws: int, extra: int = 0) -> None:
        """draws: (noise, time) pairs per training sample, 0 = the preset's. extra: learnt tokens after the state's.

        Raises `BadInput` for a chunk longer than there are positions.
        """
        super().__init__()
        size, interleave = PRESETS[config.preset], config.interleave_self_attention
        if sizes.horizon > size.positions:
            raise BadInput(
                f"head flow_matching: horizon {sizes.horizon} is above the {size.positions} of {config.preset}"
            )
        if draws < 0:
            raise BadInput(f"head flow_matching: draws is {draws}; give at least 1, or 0 for the preset's")
        self.config, self.draws, self.robot = config, draws or size.draws, config.embodiment
        self.convention = CONVENTIONS["data_at_1"]
        self.noise_shape = (sizes.horizon, sizes.action)
        dit = DiTSize(
            layers=size.layers,
            heads=size.heads,
            head=size.head,
            out=size.hidden,
            dropout=size.dropout,
            interleave=interleave,
        )
        robots, hidden, width = config.max_embodiments or size.robots, size.hidden, dit.width
        self.model = DiT(dit, sizes.context)
        self.state_encoder = CategoryMLP(robots, sizes.state, hidden, width) if interleave else None
        self.action_encoder = ActionEncoder(robots, sizes.action, width)
        self.action_decoder = CategoryMLP(robots, hidden, hidden, sizes.action)
        self.position_embedding = _table(size.positions, width)
        self.future_tokens = _table(extra, width) if extra and interleave else None
        if size.narrow:
            self._begin_larger()
        for name, part in self.named_children():
            if name in PROJECTOR:
                part.requires_grad_(config.tune_projector)
        self.model.requires_grad_(config.tune_diffusion_model)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error of the velocity, a mean over valid entries and draws."""
        predicted, target = self.velocities(context, action, generator)
        errors = ((predicted - target) ** 2).unflatten(0, (-1, self.draws))
        loss = masked_mean(errors.mean(dim=1), mask)
        return loss, {"velocity_mse": loss.mean().detach()}

    def velocities(
        self, context: Context, action: Float[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, "r h a"], Float[Tensor, "r h a"]]:
        """Predicted and true, at random noise and times: r = b·draws rows, each sample's in a row."""
        action = action.repeat_interleave(self.draws, dim=0)
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        t = self.convention.sample_time((len(action),), generator, "beta")
        x_t = self.convention.interpolate(noise, action, t)
        return self.field(context)(x_t, t), self.convention.velocity(noise, action)

    def field(
        self, context: Context
    ) -> Callable[[Float[Tensor, "r h a"], Float[Tensor, " r"]], Float[Tensor, "r h a"]]:
        """dx/dt as a function of x_t and t. The context is read once, however often the function is called.

        r = b·k rows for a context of b: each sample k times in a row.
        """
        tokens, is_pad = self.read(context), context.token_is_pad
        memory, before = self.model.remember(tokens, is_pad), self._before(context)

        def velocity(x_t: Float[Tensor, "r h a"], t: Float[Tensor, " r"]) -> Float[Tensor, "r h a"]:
            bucket, h = bucket_of(t), x_t.shape[1]
            x = self.action_encoder(x_t, bucket, self.robot) + self.position_embedding.weight[:h]
            if before is not None:
                x = torch.cat([before.repeat_interleave(len(x) // len(before), dim=0), x], dim=1)
            return self.action_decoder(self.model(x, bucket, memory)[:, -h:], self.robot)

        return velocity

    def read(self, context: Context) -> Float[Tensor, "b n d"]:
        """The context's tokens as the DiT attends to them."""
        assert context.tokens is not None
        return context.tokens

    def _before(self, context: Context) -> Float[Tensor, "b n w"] | None:
        """The tokens that stand before the actions'."""
        if self.state_encoder is None:
            return None
        assert context.state is not None
        state = self.state_encoder(context.state[:, None], self.robot)
        if self.future_tokens is None:
            return state
        return torch.cat([state, self.future_tokens.weight.expand(len(state), -1, -1)], dim=1)

    def _begin_larger(self) -> None:
        for part in self.modules():
            if isinstance(part, CategoryLinear):
                nn.init.normal_(part.W, std=part.W.shape[1] ** -0.5)
        nn.init.normal_(self.position_embedding.weight)

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for weights that are not of this head."""
        if not self.config.pretrained:
            return
        folder = Path(self.config.pretrained)
        found = {n.removeprefix(PREFIX): t for n, t in read_weights(folder).items() if n.startswith(PREFIX)}
        refuse_unfit(folder, found, self.state_dict())
        self.load_state_dict(found)


def _table(rows: int, width: int) -> nn.Embedding:
    table = nn.Embedding(rows, width)
    nn.init.normal_(table.weight, std=0.02)
    return table
