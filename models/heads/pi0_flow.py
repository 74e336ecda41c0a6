"""pi0's and pi0.5's action expert: a Gemma beside the language model reads it layer by layer and denoises a chunk.

```
 Context.layers     keys, values      keys, values            of the prefix, computed once by the backbone
                        |                 |
 state, x_t, t --> [ layer 1 ] ------> [ layer 2 ] --> ... --> velocity     N Euler steps from t = 1, noise, to t = 0
```
Physical Intelligence 2024 (arXiv 2410.24164) and 2025 (2504.16054); t = 1 is noise here, the opposite of the paper.

|        | state                                    | time                                                           |
|--------|------------------------------------------|----------------------------------------------------------------|
| pi0    | one token, which does not see actions    | beside each action, through an MLP                             |
| pi05   | in the prompt, in words, if anywhere     | scale, shift and gate of every RMSNorm (adaRMS)                |

| preset    | width | mlp  | draws | for                                                                      |
|-----------|-------|------|-------|--------------------------------------------------------------------------|
| tiny      | 64    | 128  | 8     | tests                                                                    |
| small     | 128   | 256  | 4     | CPU                                                                      |
| published | 1024  | 4096 | 1     | GPU; another draw is a hundredth of the backbone's work                  |

Layers, attention heads and their width are the backbone's.

The layers are LeRobot's, under its names, so that published weights fit. What differs from its PI0 and PI05:
* The prefix is computed once when training too, however many `draws`; the gradient reaches it through keys and values.
* The loss is per sample and over executed steps only; theirs counts what stands after an episode's end.
* adaRMS begins as the identity (a gate of 0) as in openpi; LeRobot leaves its bias random.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu

from data.errors import BadInput
from models.flow import CONVENTIONS, euler
from models.layers.gemma import Attention, Prefix, additive, gemma_config, refuse_unless_runs, suffix_mask
from models.layers.masked import masked_mean
from models.types import Context, Info, Sizes

SHORTEST, LONGEST = 4e-3, 4.0  # periods of the time's sinusoids


@dataclass(frozen=True, kw_only=True)
class _Size:
    width: int
    mlp: int
    draws: int


PRESETS = {
    "tiny": _Size(width=64, mlp=128, draws=8),
    "small": _Size(width=128, mlp=256, draws=4),
    "published": _Size(width=1024, mlp=4096, draws=1),  # gemma_300m
}


@dataclass(frozen=True, kw_only=True)
class Pi0FlowConfig:
    """Options of the `pi0_flow` head."""

    preset: Literal["tiny", "small", "published"] = "small"  # size of the expert; see the table above
    pi05: bool = False  # time by adaRMS, no state token; the backbone's state_in_prompt shows the state instead
    time: Literal["beta", "uniform"] = "beta"  # distribution of training times
    steps: int = 10  # Euler steps when acting
    draws: int = 0  # (noise, time) pairs per training sample, the backbone runs once for all; 0 = the preset's
    attention: Attention = "sdpa"  # how attention is computed

    def __post_init__(self) -> None:
        if self.steps < 1 or self.draws < 0:
            raise BadInput(f"head pi0_flow: steps {self.steps} must be at least 1 and draws {self.draws} at least 0")


@dataclass(frozen=True, kw_only=True)
class _Surroundings:
    """Of the actions: the same at every step of the sampler."""

    prefix: Prefix
    seen: Float[Tensor, "b 1 s n"] | None  # None = everything
    rotation: tuple[Float[Tensor, "b s f"], Float[Tensor, "b s f"]]  # cos and sin of the suffix's places
    state: Float[Tensor, "b 1 d"] | None


class Pi0FlowHead(nn.Module):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = Pi0FlowConfig
    needs: ClassVar[frozenset[str]] = frozenset({"layers"})
    likes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Pi0FlowConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.convention = CONVENTIONS["noise_at_1"]
        self.noise_shape = (sizes.horizon, sizes.action)
        self.width = width = PRESETS[config.preset].width
        self.draws = config.draws or PRESETS[config.preset].draws
        self.expert = _expert(config, sizes)
        self.action_in_proj = nn.Linear(sizes.action, width)
        self.action_out_proj = nn.Linear(width, sizes.action)
        if config.pi05:
            self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(sizes.state, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error of the velocity, a mean over valid entries and draws."""
        draws = self.draws
        if draws > 1:
            context, action, mask = context.repeat(draws), *(v.repeat_interleave(draws, dim=0) for v in (action, mask))
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        t = self.convention.sample_time((len(action),), generator, self.config.time)
        loss = masked_mean(self.errors(context, action, noise, t), mask).unflatten(0, (-1, draws)).mean(dim=1)
        return loss, {"velocity_mse": loss.mean().detach()}

    def errors(
        self, context: Context, action: Float[Tensor, "b h a"], noise: Float[Tensor, "b h a"], t: Float[Tensor, " b"]
    ) -> Float[Tensor, "b h a"]:
        """Squared error of the velocity at each entry."""
        x_t = self.convention.interpolate(noise, action, t)
        predicted = self.velocity(x_t, t, self.surroundings(context))
        return (predicted - self.convention.velocity(noise, action)) ** 2

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        around = self.surroundings(context)
        return euler(self.convention, lambda x, t: self.velocity(x, t, around), noise.float(), self.config.steps)

    def surroundings(self, context: Context) -> _Surroundings:
        """What every velocity reads: the prefix, the state, and who sees whom from which place."""
        prefix = context.layers
        assert prefix is not None and context.state is not None
        keys = prefix[0][0]
        refuse_unless_runs(self.config.attention, keys.device)
        is_pad = keys.new_zeros(1, keys.shape[2], dtype=torch.bool)
        is_pad = is_pad if context.token_is_pad is None else context.token_is_pad
        of_actions = (True, *[False] * (self.noise_shape[0] - 1))
        begins = of_actions if self.config.pi05 else (True, *of_actions)
        everything = self.config.pi05 and context.token_is_pad is None
        places = (~is_pad).sum(dim=1, keepdim=True) + torch.arange(len(begins), device=keys.device)
        return _Surroundings(
            prefix=Prefix(prefix),
            seen=None if everything else additive(suffix_mask(is_pad, begins), keys),
            rotation=self.expert.rotary_emb(context.state, places),
            state=None if self.config.pi05 else self.state_proj(context.state)[:, None],
        )

    def velocity(
        self, x_t: Float[Tensor, "b h a"], t: Float[Tensor, " b"], around: _Surroundings
    ) -> Float[Tensor, "b h a"]:
        """dx/dt at x_t."""
        x, condition = self._embedded(x_t, self._time(t))
        if around.state is not None:
            x = torch.cat([around.state, x], dim=1)
        for layer in self.expert.layers:
            x = layer(
                x,
                attention_mask=around.seen,
                position_embeddings=around.rotation,
                past_key_values=around.prefix,
                adarms_cond=condition,
            )
        x, _ = self.expert.norm(x[:, -x_t.shape[1] :], condition)
        return self.action_out_proj(x)

    def _embedded(
        self, x_t: Float[Tensor, "b h a"], time: Float[Tensor, "b d"]
    ) -> tuple[Float[Tensor, "b h d"], Float[Tensor, "b d"] | None]:
        """A token per action, and what scales, shifts and gates them in every layer."""
        x = self.action_in_proj(x_t)
        if self.config.pi05:
            return x, silu(self.time_mlp_out(silu(self.time_mlp_in(time))))
        beside = torch.cat([x, time[:, None].expand_as(x)], dim=2)
        return self.action_time_mlp_out(silu(self.action_time_mlp_in(beside))), None

    def _time(self, t: Float[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """In float64, as the weights were trained: the shortest period is far below float32's error at 2π/period."""
        from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding

        device: Any = t.device  # which it wants, though it says str
        return create_sinusoidal_pos_embedding(t, self.width, SHORTEST, LONGEST, device=device).to(t.dtype)


def _expert(config: Pi0FlowConfig, sizes: Sizes) -> Any:
    """LeRobot's Gemma, with as many layers and heads as the backbone's, and no words."""
    from lerobot.policies.pi_gemma import PiGemmaModel

    shape, size = sizes.layers, PRESETS[config.preset]
    assert shape is not None
    expert: Any = PiGemmaModel(
        gemma_config(
            shape,
            width=size.width,
            mlp=size.mlp,
            attention=config.attention,
            vocab_size=1,
            use_adarms=config.pi05,
            adarms_cond_dim=size.width if config.pi05 else None,
        )
    )
    expert.embed_tokens = None
    for module in expert.modules():
        if getattr(module, "dense", None) is not None:
            nn.init.zeros_(module.dense.bias)
    return expert
