"""What a recipe says about a policy and its training. Imports no torch, so that `--help` is quick."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data.errors import BadInput

Algorithm = Literal["iql", "sarsa_entropy"]
Imitate = Literal["executed", "best_of_k"]
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
class LoraOptions:
    """Low-rank adapters beside weights that stand still (`models.lora`)."""

    rank: int = 0  # of the adapters; 0 = none, and all that is not frozen trains
    alpha: float = 16.0  # what an adapter answers counts alpha / rank
    dropout: float = 0.0  # share of what an adapter reads
    targets: str = ""  # regular expression for the end of the layers' names; empty = as the parts say

    def __post_init__(self) -> None:
        if self.rank < 0 or not 0 <= self.dropout < 1:
            raise BadInput(f"lora.rank {self.rank} must be at least 0 and lora.dropout {self.dropout} in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(ReaderConfig):
    """A pair of names and their options. With a dataset's schema and a horizon it is a `PolicySpec`."""

    head: str = "act"  # registered head
    head_options: dict[str, Any] = field(default_factory=dict)  # fields of the head's Config, e.g. dim
    precision: Precision = "auto"  # arithmetic of acting
    compile: bool = False  # by torch.compile, when it is first used; takes minutes, then saves time on a GPU
    lora: LoraOptions = field(default_factory=LoraOptions)
    kind: str = "pair"  # registered policy; of any but pair, `options` say all, and backbone and head are not read
    options: dict[str, Any] = field(default_factory=dict)  # fields of the Config of a policy that is no pair

    @property
    def parts(self) -> str:
        """What it is made of, for people."""
        return f"{self.backbone} + {self.head}" if self.kind == "pair" else self.kind

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "PolicyConfig":
        """From `dataclasses.asdict`."""
        return cls(**{**value, "lora": LoraOptions(**value.get("lora", {}))})


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ReaderConfig):
    """Twin Q(x, A) and V(x) over chunks."""

    width: int = 256  # of each encoder's answer (512 in the seed design, whose pictures are 256 x 256)
    layers: int = 2  # hidden layers of the chunk encoder and of each value head
    joint: bool = False  # Q and V read through one encoder, so that their losses meet in it


@dataclass(frozen=True, kw_only=True)
class ChunkCriticConfig:
    """How Q and V are learnt from executed chunks (`models.phases.chunk_critic`, `chunk_value`)."""

    algorithm: Algorithm = "iql"  # how V is learnt: expectile of executed chunks, or mean over the policy's
    expectile: float = 0.7  # iql: 0.5 = the mean of what was done, towards 1 = the best of what was done
    alpha: float = 0.0  # sarsa_entropy: nats of entropy per dimension in units of reward; above 1e-3 it drowns Q
    tau: float = 0.005  # share of Q that its target takes over per step (Polyak)
    lambda_v: float = 1.0  # weight of V's loss beside Q's; acts where the two share an encoder (critic.joint)

    def __post_init__(self) -> None:
        if not 0 < self.expectile < 1:
            raise BadInput(f"expectile is {self.expectile}; it must be between 0 and 1")
        if not 0 < self.tau <= 1:
            raise BadInput(f"tau is {self.tau}; the target takes over a share in (0, 1]")
        if self.alpha and self.algorithm != "sarsa_entropy":
            raise BadInput(
                f"alpha {self.alpha} has no effect in {self.algorithm}; use algorithm sarsa_entropy or alpha 0"
            )


@dataclass(frozen=True, kw_only=True)
class ChunkPolicyConfig:
    """How a policy learns from chunks that a critic has judged (`models.phases.chunk_policy`)."""

    beta: float = 1.0  # weight of a chunk = exp(beta * advantage), so 1/beta is a temperature; 0 = cloning
    max_weight: float = 100.0  # largest weight
    imitate: Imitate = "executed"  # executed chunks by weight, or the best of the proposals where both Qs agree

    def __post_init__(self) -> None:
        if self.beta < 0 or self.max_weight < 1:
            raise BadInput(f"beta {self.beta} must be at least 0 and max_weight {self.max_weight} at least 1")


@dataclass(frozen=True, kw_only=True)
class ChunkRLConfig(ChunkCriticConfig, ChunkPolicyConfig):
    """Q, V and policy at once (`models.phases.chunk_rl`)."""

    critic: CriticConfig = field(default_factory=CriticConfig)
    lambda_pi: float = 1.0  # weight of the policy's loss; acts with joint
    joint: bool = False  # one objective through the policy's backbone, instead of three networks that share nothing
    samples: int = 4  # sarsa_entropy: chunks drawn from the policy per observation, unless proposals are given


@dataclass(frozen=True, kw_only=True)
class JepaConfig:
    """How an encoder learns to foretell its own next state (`models.phases.jepa`)."""

    hidden: int = 512  # width of the predictor
    variance: float = 1.0  # weight of the features' missing variance
    covariance: float = 0.04  # weight of their covariances
    momentum: float = 0.996  # of the target at the first step; 1 at the last, along a cosine
    total_steps: int = 0  # of the training, which the cosine spans; those of its fit

    def __post_init__(self) -> None:
        if self.hidden < 1 or min(self.variance, self.covariance, self.total_steps) < 0:
            raise BadInput("jepa: hidden must be at least 1; variance, covariance and total_steps at least 0")
        if not 0 <= self.momentum <= 1:
            raise BadInput(f"jepa: momentum is {self.momentum}; it must be in [0, 1]")


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
    processes: int = 1  # ranks on this machine (DDP), one per GPU; a batch is shared out among them

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "processes"):
            if getattr(self, name) < 1:
                raise BadInput(f"fit.{name} is {getattr(self, name)}; it must be at least 1")
        for name, value in (("ema_decay", self.ema_decay), ("betas", min(self.betas)), ("betas", max(self.betas))):
            if not 0 <= value < 1:
                raise BadInput(f"fit.{name} is {value}; it must be in [0, 1)")
        if self.batch_size % self.processes:
            raise BadInput(f"fit.batch_size {self.batch_size} does not divide among {self.processes} processes")
        if self.lr <= 0 or self.grad_clip <= 0:
            raise BadInput(f"fit.lr and fit.grad_clip must be positive, not {self.lr} and {self.grad_clip}")
