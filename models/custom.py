"""A policy of a user's own that is no pair: it learns and answers in normalised numbers, everything else is ours.

```
 observation --prepare--+--> CustomBatch --forward(train=True)---> "loss"          [] or [b]
 action --normalise, mask+              --forward(train=False)--> "action_pred"   [b h w] --invert, clip--> units
```
`CONTRIBUTING.md` shows a whole one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from data.errors import BadInput
from data.normalize import Normalizer
from models.policy import Policy, PolicySpec
from models.registry import configure
from models.types import Batch, Info, Judged, NoOptions, Observation, Transition


@dataclass(frozen=True, kw_only=True)
class CustomBatch:
    """What a policy of a user's own reads."""

    observation: Observation  # pictures float in [0, 1] and CHW, state normalised and padded, tasks in words
    action: Float[Tensor, "b h w"] | None = None  # normalised, padded, zero where nothing counts; None when acting
    mask: Bool[Tensor, "b h w"] | None = None  # the entries of `action` that count
    generator: torch.Generator | None = None  # of whatever is random in training
    noise: Float[Tensor, "b ..."] | None = None  # [b, *noise_shape], all that is random in acting

    def __len__(self) -> int:
        return len(self.observation)


class BasePolicy(nn.Module):
    """To be derived from and registered: `@register("my_policy")`. Built as `Class(Config(...), spec)`.

    A `PolicySpec` says what it is for: `schema` (cameras, image_size), `state_width`, `action_width`, `horizon`.
    """

    Config: ClassVar[type] = NoOptions  # frozen dataclass or pydantic model of its options
    Spec = PolicySpec
    noise_shape: tuple[int, ...] = (0,)  # per sample, of the noise that an answer starts from; (0,) = deterministic

    def forward(self, batch: CustomBatch, train: bool = True, **kwargs: Any) -> dict[str, Tensor]:
        """`train`: at least "loss", per sample [b], or one for all. Else: "action_pred" [b h w], normalised."""
        raise NotImplementedError

    def inference(self, batch: CustomBatch, **kwargs: Any) -> dict[str, Tensor]:
        """What acting asks."""
        return self.forward(batch, train=False, **kwargs)

    def calc_loss(self, batch: CustomBatch, **kwargs: Any) -> Tensor:
        """What training asks."""
        return self.forward(batch, train=True, **kwargs)["loss"]

    def load_pretrained(self) -> None:
        """Fill in published weights, if its options name some. Called once, on a new policy."""

    @classmethod
    def assemble(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer], *, seed: int, new: bool) -> Policy:
        """One of this class, as the policy that the rest of the program knows."""
        options = configure(cls, spec.config.options, whose=f"policy {spec.kind}")
        build: Any = cls
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(options, spec)
            if new:
                model.load_pretrained()
        return Custom(spec, model, state=normalizers["state"], action=normalizers["action"])


class Custom(Policy):
    """A `BasePolicy` behind normalisation."""

    model: BasePolicy

    def __init__(self, spec: PolicySpec, model: BasePolicy, *, state: Normalizer, action: Normalizer) -> None:
        super().__init__(spec, state=state, action=action)
        self.model = model

    @classmethod
    def assemble(cls, spec: PolicySpec, normalizers: Mapping[str, Normalizer], *, seed: int, new: bool) -> Self:
        raise TypeError("built by the class that is registered")

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.model.noise_shape)

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        """The model's. One loss for the whole batch counts for each of its samples, which has the same gradient.

        Raises `BadInput` where samples are weighed one by one, as in offline RL, and there is one loss for all.
        """
        mask = self.mask(batch.action_is_pad)
        asked = CustomBatch(
            observation=self.prepare(batch.observation, generator if self.training else None),
            action=self.normalised(batch.action, mask),
            mask=mask,
            generator=generator,
        )
        loss = self.model.calc_loss(asked)
        if loss.ndim == 0 and not isinstance(batch, Judged | Transition):
            loss = loss.expand(len(batch))
        self._refuse_shape("loss", loss, (len(batch),))
        return loss, {}

    def answer(self, observation: Observation, noise: Float[Tensor, "b k ..."]) -> Float[Tensor, "b k h w"]:
        prepared = self.prepare(observation)
        chunks = [self._chunk(CustomBatch(observation=prepared, noise=one)) for one in noise.unbind(dim=1)]
        return torch.stack(chunks, dim=1)

    def _chunk(self, asked: CustomBatch) -> Float[Tensor, "b h w"]:
        found = self.model.inference(asked)
        if "action_pred" not in found:
            raise BadInput(f"policy {self.spec.kind!r}: inference gives {', '.join(found)}, and no action_pred")
        self._refuse_shape("action_pred", found["action_pred"], (len(asked), self.spec.horizon, self.spec.action_width))
        return found["action_pred"]

    def _refuse_shape(self, what: str, found: Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(found.shape) != wanted:
            raise BadInput(
                f"policy {self.spec.kind!r}: {what} is {list(found.shape)}, but {list(wanted)} was asked for"
            )
