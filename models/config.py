"""What a recipe says about a policy and its training. Imports no torch, so that `--help` is quick."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.errors import BadInput

Precision = Literal["auto", "bf16", "fp32"]  # auto = bf16 where the device computes in it, fp32 elsewhere


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How observations and actions enter a network."""

    backbone: str = "resnet"  # registered backbone
    backbone_options: dict[str, Any] = field(default_factory=dict)  # fields of the backbone's Config, e.g. preset
    normalization: str = "mean_std"  # how state and action are scaled; a mode of data.normalize
    shift: int = 4  # random shift of training pictures, pixels each way (DrQ); 0 = none
    jitter: float = 0.0  # random brightness and contrast of training pictures, as a share; 0 = none
    pad_state: int = 0  # state width inside the network (32 for pi0 weights); 0 = the schema's own
    pad_action: int = 0  # action width inside the network; 0 = the schema's own


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(ReaderConfig):
    """A pair of names and their options. With a dataset's schema and a horizon it is a `PolicySpec`."""

    head: str = "act"  # registered head
    head_options: dict[str, Any] = field(default_factory=dict)  # fields of the head's Config, e.g. dim
    precision: Precision = "auto"  # arithmetic of acting


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ReaderConfig):
    """Twin Q(x, A) and V(x) over chunks."""

    width: int = 256  # of each encoder's answer (512 in the seed design, whose pictures are 256 x 256)
    layers: int = 2  # hidden layers of the chunk encoder and of each value head
    joint: bool = False  # Q and V read through one encoder, so that their losses meet in it


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """One training phase."""

    steps: int = 10_000  # optimizer steps
    batch_size: int = 64  # samples per step, over all processes together
    lr: float = 3e-4  # peak learning rate
    min_lr_ratio: float = 0.05  # learning rate after the last step, as a share of the peak
    warmup_steps: int = 200  # linear from 0 to the peak; a cosine follows
    weight_decay: float = 1e-4  # AdamW; matrices only, not biases or norms
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's decay of the two moments
    grad_clip: float = 1.0  # largest gradient norm
    ema_decay: float = 0.995  # of the averaged weights that act; 0 = the last weights
    seed: int = 0  # order, noise, dropout and augmentation derive from (seed, step)
    precision: Precision = "auto"  # arithmetic of the forward pass
    save_every: int = 500  # steps between checkpoints; what a kill can cost at most
    threads: int = 0  # CPU threads; 0 = as many as this process may use

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"fit.{name} is {getattr(self, name)}; it must be at least 1")
        for name, value in (("ema_decay", self.ema_decay), ("betas", min(self.betas)), ("betas", max(self.betas))):
            if not 0 <= value < 1:
                raise BadInput(f"fit.{name} is {value}; it must be in [0, 1)")
        if self.lr <= 0 or self.grad_clip <= 0:
            raise BadInput(f"fit.lr and fit.grad_clip must be positive, not {self.lr} and {self.grad_clip}")
