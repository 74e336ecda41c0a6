"""What crosses the borders between data, backbones, heads and phases, with named axes.

```
 Observation --backbone--> Context --head--> action chunk            b samples, n tokens, d features,
   images, state, tasks      pooled [b d]      [b h a]               h steps of a chunk, a action components
                             tokens [b n d]
```
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from data.schema import ACTION, IMAGE, STATE

ACTION_IS_PAD = "action_is_pad"
TASK = "task"
INDEX = "index"  # which chunk of the training set a row is
NEXT = "next."  # + column: the same at the observation to bootstrap from
PROPOSALS = "proposals"

Info = dict[str, Tensor]  # name -> detached scalar, for people


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What is seen before an action. As recorded: pictures uint8, HWC or CHW, state in the schema's units.

    As a backbone gets it (`Policy.prepare`): pictures float in [0, 1] and CHW, state normalised and padded.
    """

    images: dict[str, Shaped[Tensor, "b _ _ _"]]  # camera name -> pictures
    state: Float[Tensor, "b s"]
    tasks: tuple[str, ...]  # b instructions, in words

    def __len__(self) -> int:
        return len(self.state)

    @classmethod
    def of(cls, columns: Mapping[str, Any], tasks: Sequence[str]) -> "Observation":
        """From arrays or tensors under dataset column names."""
        images = {name.removeprefix(IMAGE): torch.as_tensor(v) for name, v in columns.items() if name.startswith(IMAGE)}
        return cls(images=images, state=torch.as_tensor(columns[STATE]), tasks=tuple(tasks))

    def to(self, device: torch.device) -> "Observation":
        images = {name: pictures.to(device, non_blocking=True) for name, pictures in self.images.items()}
        return replace(self, images=images, state=self.state.to(device, non_blocking=True))

    def rows(self, rows: slice) -> "Observation":
        images = {name: pictures[rows] for name, pictures in self.images.items()}
        return replace(self, images=images, state=self.state[rows], tasks=self.tasks[rows])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Chunks to learn from. Actions are as executed, in the schema's units."""

    observation: Observation
    action: Float[Tensor, "b h a"]
    action_is_pad: Bool[Tensor, "b h"]  # the episode was over: whatever the row holds, nothing is learnt from it
    index: tuple[int, ...] = ()  # which chunk each row is, for messages

    def __len__(self) -> int:
        return len(self.action)

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> Self:
        """From a loader's arrays or tensors under dataset column names."""
        return cls(**cls._fields_of(columns))

    @classmethod
    def _fields_of(cls, columns: Mapping[str, Any]) -> dict[str, Any]:
        action = torch.as_tensor(columns[ACTION])
        tasks = columns.get(TASK, [""] * len(action))
        return {
            "observation": Observation.of(columns, tasks),
            "action": action,
            "action_is_pad": torch.as_tensor(columns[ACTION_IS_PAD]),
            "index": tuple(int(i) for i in columns.get(INDEX, ())),
        }

    def to(self, device: torch.device) -> Self:
        return self._each(lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v.to(device))

    def rows(self, rows: slice) -> Self:
        taken = self._each(lambda v: v[rows] if isinstance(v, Tensor) else v.rows(rows))
        return replace(taken, index=self.index[rows])

    def _each(self, change: Callable[[Any], Any]) -> Self:
        """With `change` applied to every tensor and observation there is."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor | Observation)})


@dataclass(frozen=True, kw_only=True)
class Transition(Batch):
    """Chunks with what executing them earned and where it led. Rewards are of `action`, and of no other chunk.

    Proposals carry no reward: they may be ranked, averaged over and imitated, a Q-function never learns from them.
    """

    next: Observation  # to bootstrap from
    reward: Float[Tensor, " b"]
    discount: Float[Tensor, " b"]  # γ^h, or 0 where the task ended inside
    proposals: Float[Tensor, "b k h a"] | None = None  # what a policy would have done instead

    @classmethod
    def _fields_of(cls, columns: Mapping[str, Any]) -> dict[str, Any]:
        values = super()._fields_of(columns)
        later = {name.removeprefix(NEXT): v for name, v in columns.items() if name.startswith(NEXT)}
        proposals = columns.get(PROPOSALS)
        return values | {
            "next": Observation.of(later, values["observation"].tasks),
            "reward": torch.as_tensor(columns["reward"]),
            "discount": torch.as_tensor(columns["discount"]),
            "proposals": None if proposals is None else torch.as_tensor(proposals),
        }


@dataclass(frozen=True, kw_only=True)
class Judged(Batch):
    """Chunks with a critic's judgement of them (`data.values`)."""

    advantage: Float[Tensor, " b"]  # of the executed chunk: min Q - V
    best: Float[Tensor, "b h a"] | None = None  # the proposal that both Qs rank first
    agreed: Bool[Tensor, " b"] | None = None  # whether both Qs do, and put it above V

    @classmethod
    def _fields_of(cls, columns: Mapping[str, Any]) -> dict[str, Any]:
        judged = {name: torch.as_tensor(columns[name]) for name in ("advantage", "best", "agreed") if name in columns}
        return super()._fields_of(columns) | judged


Layer = tuple[Float[Tensor, "b g n f"], Float[Tensor, "b g n f"]]  # keys and values of a prefix's tokens, g groups


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a backbone makes of an observation: one vector, tokens, what each layer kept of its tokens, or several.

    Tokens carry their positions already, unless `places` has them.
    """

    pooled: Float[Tensor, "b d"] | None = None
    tokens: Float[Tensor, "b n d"] | None = None
    token_is_pad: Bool[Tensor, "b n"] | None = None  # None = every token counts; of `tokens` and of `layers`
    places: Float[Tensor, "n d"] | None = None  # for attention to add to its queries and keys, layer by layer (DETR)
    layers: tuple[Layer, ...] | None = None  # for a head that attends to the prefix in every layer of its own (pi0)
    state: Float[Tensor, "b s"] | None = None  # normalised and padded; the policy fills it in for every head

    def repeat(self, k: int) -> "Context":
        """Each sample k times in a row."""

        def repeated(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(repeated(v) for v in value)
            return None if value is None else value.repeat_interleave(k, dim=0)

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Context(**{name: v if name == "places" else repeated(v) for name, v in values.items()})


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Of `Context.layers`."""

    layers: int
    groups: int  # of keys and values (grouped-query attention)
    queries: int  # attention heads
    width: int  # of a key


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a head is built for."""

    context: int  # d of the Context
    state: int  # components of the state inside the network
    horizon: int  # actions per chunk
    action: int  # components of an action inside the network
    layers: LayerShape | None = None  # of the Context, where the backbone gives layers


@runtime_checkable
class Pretrained(Protocol):
    """A part that can begin from published weights; every backbone, and heads of which some are published."""

    def load_pretrained(self) -> None:
        """Fill them in, if its options name some. Called once, on a new policy."""
        ...


@runtime_checkable
class Backbone(Pretrained, Protocol):
    """An `nn.Module` that reads observations.

    Built as `Class(Config(...), cameras=, image_size=, state_width=, give=)`, where `give` is the part of `gives` that
    the head reads: what nobody reads is not built, so that no parameter goes without a gradient. One that gives
    "layers" has their `layer_shape`.
    """

    Config: ClassVar[type]  # frozen dataclass of its options
    gives: ClassVar[frozenset[str]]  # of "pooled", "tokens", "places", "layers": the fields of Context it can fill
    width: int  # d of its Context

    def __call__(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        ...


@runtime_checkable
class Head(Protocol):
    """An `nn.Module` that turns a Context into chunks of normalised actions.

    Built as `Class(Config(...), sizes)`, with the `Sizes` it is for.
    """

    Config: ClassVar[type]  # frozen dataclass of its options
    needs: ClassVar[frozenset[str]]  # the fields of Context it reads
    likes: ClassVar[frozenset[str]]  # those it reads too where the backbone gives them; most heads: none
    noise_shape: tuple[int, ...]  # of what `sample` starts from, per sample; (0,) for a deterministic head

    def loss(
        self, context: Context, action: Float[Tensor, "b h a"], mask: Bool[Tensor, "b h a"], generator: torch.Generator
    ) -> tuple[Float[Tensor, " b"], Info]:
        """Loss per sample, a mean over the entries where `mask` is true; the others are zero and count nowhere."""
        ...

    def sample(self, context: Context, noise: Float[Tensor, "b ..."]) -> Float[Tensor, "b h a"]:
        """Action chunks, a function of the context and the noise alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that train alike."""

    parameters: dict[str, nn.Parameter]  # name -> parameter, names as in the phase's own `named_parameters`
    decay: bool  # whether weight decay applies
    lr_scale: float = 1.0  # of the schedule's learning rate
    objective: str = ""  # gradients are clipped per objective: one loss's size does not slow another's parameters


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of a phase that has none."""


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels, but not a state-space model's rates, which decay would slow down (as mamba-ssm has it)."""
    return parameter.ndim >= 2 and not name.endswith("A_log")


class Phase(nn.Module):
    """What `fit` trains. Calling it gives a batch's loss per sample, and numbers for people.

    Everything it carries from step to step is in `policy` and `parts()`, and nowhere else: what is not named is not
    saved, so `fit` refuses a phase that holds parameters or buffers outside of them. Built as `Class(policy,
    Config(...))`.
    """

    Config: ClassVar[type] = NoOptions  # frozen dataclass of its options
    reads: ClassVar[type[Batch]] = Batch  # what a loader's columns become
    policy: Any  # an nn.Module, registered in POLICIES: what is published when the phase ends

    def forward(self, batch: Batch, generator: torch.Generator) -> tuple[Float[Tensor, " b"], Info]:
        raise NotImplementedError

    def parts(self) -> dict[str, nn.Module]:
        """The other modules it carries, by name: critics, target networks, running statistics as buffers."""
        return {}

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the optimizer trains: all that is not frozen, with weight decay on matrices and kernels only."""
        return self.groups_under("")

    def groups_under(self, *prefixes: str, objective: str = "") -> list[ParameterGroup]:
        """The trained parameters whose names begin with one of `prefixes`."""
        trained = {n: p for n, p in self.named_parameters() if p.requires_grad and n.startswith(prefixes)}
        return [
            ParameterGroup(
                parameters={n: p for n, p in trained.items() if _decays(n, p) is decay},
                decay=decay,
                objective=objective,
            )
            for decay in (True, False)
        ]

    def followers(self) -> list[nn.Module]:
        """Frozen modules that `after_step` moves: target networks. Any other frozen part must not change."""
        return []

    def after_step(self, step: int) -> None:
        """What follows optimizer step `step`, counted from 0, such as moving target networks. By default, nothing."""
