"""Diffusion policy: a UNet over the chunk's steps learns which noise was added, and takes it out again step by step.

```
 t      99 ---- 90 ---- 80 ---- ... ---- 10 ---- 0 ----> chunk        x_t = √ᾱ_t · a + √(1 - ᾱ_t) · ε
     noise   DDIM's 10 steps begin here, with no noise of their own; DDPM walks 99, 98, ... 0 and adds some at each
```
Chi et al. 2023 (arXiv 2303.04137); Ho et al. 2020 (2006.11239) for DDPM, Song et al. 2020 (2010.02502) for DDIM, Nichol
& Dhariwal 2021 (2102.09672) for the cosine schedule. The UNet with FiLM is LeRobot's, the schedulers are diffusers'.

| preset    | channels of the stages | kernel | width of t | for                                                       |
|-----------|------------------------|--------|------------|-----------------------------------------------------------|
| tiny      | 32, 64                 | 3      | 32         | tests                                                     |
| small     | 64, 128, 256           | 5      | 64         | CPU                                                       |
| published | 512, 1024, 2048        | 5      | 128        | GPU; there with sampler ddpm, steps 100, clip 1, min_max  |

What differs from LeRobot's own DiffusionModel:
* The loss is per sample and over executed steps only. Its masking is off by default, and a mean over the whole batch.
* Noise and times come from the step's generator, and DDPM's noise from the noise given: its own come from a global one.
* Any horizon fits. It asks for a multiple of 2^stages, although the UNet halves only stages - 1 times; here the chunk
  stands before as many zeros as are missing, when training and when acting alike.
* The whole chunk is returned. How much of it is executed is the rollout's `replan`, counted from its first action: with
  one observation the slice [n_obs - 1 : n_obs - 1 + n_action] begins at 0.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from data.errors import BadInput
from models.layers.masked import masked_mean
from models.seeds import derive
from models.types import Context, Info, Sizes

GROUPS = 8  # of the UNet's GroupNorm; LeRobot's last block knows no other number


@dataclass(frozen=True, kw_only=True)
class _Size:
    channels: tuple[int, ...]
    kernel: int
    time: int


PRESETS = {
    "tiny": _Size(channels=(32, 64), kernel=3, time=32),
    "small": _Size(channels=(64, 128, 256), kernel=5, time=64),
    "published": _Size(channels=(512, 1024, 2048), kernel=5, time=128),
}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Options of the `diffusion` head."""

    preset: Literal["tiny", "small", "published"] = "small"  # size of the UNet; see the table above
    down_dims: tuple[int, ...] = ()  # channels of the UNet's stages, if not the preset's
    kernel: int | None = None  # of the UNet's convolutions, steps; if not the preset's
    time: int | None = None  # width of t, if not the preset's
    film_scale: bool = True  # the context scales the UNet's channels; without, it only shifts them
    train_steps: int = 100  # noise levels
    prediction: Literal["epsilon", "sample"] = "epsilon"  # what the UNet answers: the noise, or the chunk
    sampler: Literal["ddim", "ddpm"] = "ddim"  # ddim: deterministic and good in few steps
    steps: int = 10  # of the sampler when acting
    clip: float = 5.0  # largest |normalised action| that a sampler's step believes in (min_max: 1); 0 = none
    draws: int = 1  # (noise, time) pairs per training sample; the backbone runs once for all

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= self.train_steps:
            raise BadInput(f"head diffusion: steps is {self.steps}; give 1 to train_steps, which is {self.train_steps}")
        if self.draws < 1 or self.clip < 0:
            raise BadInput(f"head diffusion: draws {self.draws} must be at least 1 and clip {self.clip} at least 0")
        if any(channels < 1 or channels % GROUPS for channels in self.down_dims):
            raise BadInput(f"head diffusion: down_dims {list(self.down_dims)} must be multiples of {GROUPS}")


class DiffusionHead(nn.Module):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = DiffusionConfig
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})
    likes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: DiffusionConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.noise_shape = (sizes.horizon, sizes.action)
        self.unet, halvings = _unet(config, sizes.context, sizes.action)
        self.missing = -sizes.horizon % 2**halvings  # steps to a length that can be halved so often
        self.scheduler = _scheduler(config)

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Squared error of the predicted noise (or chunk), a mean over valid entries and draws.

        A padded step is zero under its noise like any other, so its neighbours see nothing of what the dataset holds.
        """
        draws = self.config.draws
        context, action, mask = context.repeat(draws), *(v.repeat_interleave(draws, dim=0) for v in (action, mask))
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        t = torch.randint(self.config.train_steps, (len(action),), generator=generator, device=action.device)
        predicted = self.predict(self.scheduler.add_noise(action, noise, t), t, context)
        target = noise if self.config.prediction == "epsilon" else action
        loss = masked_mean((predicted - target) ** 2, mask).unflatten(0, (-1, draws)).mean(dim=1)
        return loss, {"denoising_mse": loss.mean().detach(), **self._clipped(action, mask)}

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        x = noise.float()
        added = [_generator(one) for one in noise.cpu()] if self.config.sampler == "ddpm" else None
        for t in self.scheduler.timesteps.tolist():
            predicted = self.predict(x, torch.full((len(x),), t, device=x.device), context)
            x = self.scheduler.step(predicted.float(), t, x, generator=added).prev_sample
        return x

    def predict(self, x_t: Float[Tensor, "b h a"], t: Int[Tensor, " b"], context: Context) -> Float[Tensor, "b h a"]:
        """The UNet's answer, noise or chunk."""
        return self.unet(pad(x_t, (0, 0, 0, self.missing)), t, global_cond=context.pooled)[:, : x_t.shape[1]]

    def _clipped(self, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"]) -> Info:
        """The share of executed entries that no sample can reach: above 0, raise `clip` or use min_max."""
        if not self.config.clip:
            return {}
        return {"beyond_clip": masked_mean((action.abs() > self.config.clip * 1.001).float(), mask).mean()}


def _unet(config: DiffusionConfig, context_width: int, action_width: int) -> tuple[nn.Module, int]:
    """LeRobot's, and how many times it halves the chunk."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as LeRobotConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d

    size = PRESETS[config.preset]
    channels = config.down_dims or size.channels
    options = LeRobotConfig(
        device="cpu",  # of the configuration, which else looks for one and warns; the module goes where it is sent
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(action_width,))},
        horizon=2 ** len(channels),  # not read by the UNet
        down_dims=channels,
        kernel_size=config.kernel or size.kernel,
        n_groups=GROUPS,
        diffusion_step_embed_dim=config.time or size.time,
        use_film_scale_modulation=config.film_scale,
    )
    return DiffusionConditionalUnet1d(options, global_cond_dim=context_width), len(channels) - 1


def _scheduler(config: DiffusionConfig) -> Any:
    """Diffusers', set to the sampler's steps. It has no weights, and neither training nor acting changes it."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    scheduler = (DDIMScheduler if config.sampler == "ddim" else DDPMScheduler)(
        num_train_timesteps=config.train_steps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=config.prediction,
        clip_sample=config.clip > 0,
        clip_sample_range=config.clip,
    )
    scheduler.set_timesteps(config.steps)
    return scheduler


def _generator(noise: Float[Tensor, "h a"]) -> torch.Generator:
    """What DDPM adds on the way from this noise: on the CPU, so that every device adds the same."""
    return torch.Generator().manual_seed(derive("ddpm", noise.float().cpu().numpy().tobytes().hex()))
