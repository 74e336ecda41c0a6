"""PaliGemma: SigLIP's view of each picture, projected into Gemma, which reads pictures and words together.

```
 picture -> resize, bars, [-1, 1] -> SigLIP -> projector --+
 picture ...                                               +-> Gemma, all tokens see each other -> keys and values of
 "pick up the cube\\n" -> ids -> embedding · √width ------+     every layer (`layers`), last states (`tokens`)
```
Beyer et al. 2024 (arXiv 2407.07726), as the prefix of pi0 (2410.24164) and pi0.5 (2504.16054): the action expert is a
head, `pi0_flow`. State and actions are not seen from here, so this is computed once per observation.

|           | SigLIP                                         | Gemma                                               |
| preset    | picture | patch | width | layers, heads | mlp  | width | layers, heads | of width | mlp   | vocabulary |
|-----------|---------|-------|-------|---------------|------|-------|---------------|----------|-------|------------|
| tiny      | 16      | 8     | 32    | 1, 2          | 64   | 32    | 2, 2          | 16       | 64    | bytes      |
| small     | 64      | 16    | 128   | 3, 4          | 256  | 128   | 4, 4          | 32       | 256   | bytes      |
| published | 224     | 14    | 1152  | 27, 16        | 4304 | 2048  | 18, 8         | 256      | 16384 | 257152     |

All layers are transformers', under its names, so that published weights fit. What differs from LeRobot's PaliGemma:
* What gives no key or value is not built unless "tokens" or "pooled" is read: the last layer's queries, output and MLP,
  the last norm, the words' way out. They get no gradient from an action expert, yet AdamW would decay them.
* A camera that is not there is left out, not shown black and masked: equal keys and values, less work.
* Frozen means frozen weights that were learnt: freezing without `pretrained` is refused.

A head that reads `tokens` or `pooled` alone does not see the state, unless `state_in_prompt` writes it into the words.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from data.errors import BadInput
from models.layers.gemma import Attention, Kept, additive, gemma_config, refuse_unless_runs
from models.layers.instructions import BYTE_VOCABULARY, Instructions
from models.layers.pretrained import fill, read_weights
from models.types import Context, LayerShape, Observation

BINS = 256  # that a component of the state in [-1, 1] is rounded to, in the prompt
PARTS = ("vision_tower", "multi_modal_projector", "language_model")  # transformers' names


@dataclass(frozen=True, kw_only=True)
class _Size:
    image: int
    patch: int
    vision: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    width: int
    mlp: int
    layers: LayerShape
    vocabulary: int = 0  # 0 = what the tokenizer knows


PRESETS = {
    "tiny": _Size(
        image=16, patch=8, vision=32, vision_layers=1, vision_heads=2, vision_mlp=64,
        width=32, mlp=64, layers=LayerShape(layers=2, groups=1, queries=2, width=16),
    ),
    "small": _Size(
        image=64, patch=16, vision=128, vision_layers=3, vision_heads=4, vision_mlp=256,
        width=128, mlp=256, layers=LayerShape(layers=4, groups=1, queries=4, width=32),
    ),
    "published": _Size(  # SigLIP So400m/14, Gemma 2B
        image=224, patch=14, vision=1152, vision_layers=27, vision_heads=16, vision_mlp=4304,
        width=2048, mlp=16_384, layers=LayerShape(layers=18, groups=1, queries=8, width=256), vocabulary=257_152,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PaligemmaExpertConfig:
    """Options of the `paligemma_expert` backbone."""

    preset: Literal["tiny", "small", "published"] = "small"  # see the table above
    image_size: int = 0  # pixels per side that the vision tower sees; 0 = the preset's
    tokenizer: str = ""  # folder of a PaliGemma tokenizer or of a checkpoint that has it; empty = bytes
    longest: int = 48  # token ids that are read of a prompt (pi05: 200)
    state_in_prompt: bool = False  # write the state into the words (pi05); scale it to [-1, 1]: normalization min_max
    attention: Attention = "sdpa"  # how Gemma's attention is computed
    pretrained: str = ""  # folder with safetensors of a PaliGemma, or of a pi0 that has one; empty = from scratch
    freeze_vision_encoder: bool = False  # keep the pretrained SigLIP as it is
    train_expert_only: bool = False  # keep all of the pretrained PaliGemma as it is; the head learns alone

    def __post_init__(self) -> None:
        size = PRESETS[self.preset]
        if self.image_size % size.patch or self.image_size < 0:
            raise BadInput(
                f"backbone paligemma_expert: image_size {self.image_size} must be a multiple of the patch, {size.patch}"
            )
        if self.pretrained and not self.tokenizer:
            raise BadInput("backbone paligemma_expert: pretrained reads words, not bytes; name its tokenizer's folder")
        if (self.freeze_vision_encoder or self.train_expert_only) and not self.pretrained:
            raise BadInput("backbone paligemma_expert: freezing without pretrained would keep random weights; name it")


class PaligemmaExpert(nn.Module):
    """Pictures and words, and the state if it is in them."""

    Config: ClassVar[type] = PaligemmaExpertConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens", "layers"})

    def __init__(
        self,
        config: PaligemmaExpertConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        """Raises `BadInput` for a tokenizer that cannot be read."""
        super().__init__()
        from transformers.models.gemma.modeling_gemma import GemmaModel
        from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector
        from transformers.models.siglip import SiglipVisionModel

        size = PRESETS[config.preset]
        self.config, self.cameras, self.give = config, cameras, give
        self.width, self.layer_shape = size.width, size.layers
        self.image_size = config.image_size or size.image
        self.instructions = _instructions(config)
        paligemma = _paligemma(config, size, self.instructions, self.image_size)
        self.vision_tower: Any = SiglipVisionModel(paligemma.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(paligemma)
        self.language_model: Any = GemmaModel(paligemma.text_config)
        self.to_the_end = bool(give & {"tokens", "pooled"})
        if not self.to_the_end:
            _keep_keys_and_values(self.language_model)
        self.vision_tower.requires_grad_(not config.freeze_vision_encoder)
        if config.train_expert_only:
            self.requires_grad_(False)

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        ids, ids_are_pad = self.instructions(self._prompts(observation))
        pictures = self.embed_pictures([observation.images[name] for name in self.cameras])
        words = self.language_model.embed_tokens(ids.to(pictures.device))
        is_pad = torch.nn.functional.pad(ids_are_pad, (pictures.shape[1], 0)).to(pictures.device)
        is_pad = is_pad if bool(ids_are_pad.any()) else None  # asked on the CPU, where the words come from
        x, kept = self.read(torch.cat([pictures, words.to(pictures.dtype)], dim=1), is_pad)
        return Context(
            pooled=_mean(x, is_pad) if "pooled" in self.give else None,
            tokens=x if "tokens" in self.give else None,
            token_is_pad=is_pad,
            layers=tuple(kept) if "layers" in self.give else None,
        )

    def embed_pictures(self, pictures: list[Float[Tensor, "b 3 _ _"]]) -> Float[Tensor, "b n d"]:
        """Every camera's tokens, one camera after the other."""
        seen = self.vision_tower(torch.cat([self._scaled(p) for p in pictures])).last_hidden_state
        return self.multi_modal_projector(seen).unflatten(0, (len(pictures), -1)).transpose(0, 1).flatten(1, 2)

    def read(
        self, x: Float[Tensor, "b n d"], is_pad: Bool[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b n d"], list[tuple[Tensor, Tensor]]]:
        """Last states of the tokens, if they are built, and each layer's keys and values."""
        refuse_unless_runs(self.config.attention, x.device)
        seen = None if is_pad is None else additive(~is_pad[:, None], x)
        places = torch.arange(x.shape[1], device=x.device)[None]  # padding is behind all that counts
        kept, rotation = Kept(), self.language_model.rotary_emb(x, places)
        *layers, last = self.language_model.layers
        for layer in [*layers, last] if self.to_the_end else layers:
            x = layer(x, attention_mask=seen, position_embeddings=rotation, past_key_values=kept)
        if self.to_the_end:
            return self.language_model.norm(x), kept.layers
        return x, [*kept.layers, _keys_and_values(last, x, rotation)]

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for a folder that has no such weights."""
        if not self.config.pretrained:
            return
        folder = Path(self.config.pretrained)
        fill(self, {part_name(name): tensor for name, tensor in read_weights(folder).items()}, folder)

    def _scaled(self, picture: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, "b 3 s s"]:
        """[0, 1] to SigLIP's [-1, 1]; black bars keep the shape."""
        from lerobot.policies.common.vla_utils import resize_with_pad_torch

        size = (self.image_size, self.image_size)
        return (picture if picture.shape[-2:] == size else resize_with_pad_torch(picture, *size)) * 2 - 1

    def _prompts(self, observation: Observation) -> tuple[str, ...]:
        """In the words that pi0 and pi0.5 were trained with."""
        if not self.config.state_in_prompt:
            return tuple(task if task.endswith("\n") else f"{task}\n" for task in observation.tasks)
        self.instructions.known.clear()  # no two states are the same
        bins = state_bins(observation.state).tolist()
        return tuple(
            f"Task: {task.strip().replace('_', ' ').replace('\n', ' ')}, State: {' '.join(map(str, row))};\nAction: "
            for task, row in zip(observation.tasks, bins, strict=True)
        )


def state_bins(state: Float[Tensor, "b s"]) -> Int64[Tensor, "b s"]:
    """The bin of [-1, 1] that each component is in, 0 to 255; -1 below, as pi0.5 was trained."""
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)[:-1]
    return torch.bucketize(state.detach().cpu().double(), edges, right=True) - 1


def part_name(name: str) -> str:
    """What `name` of a PaliGemma's weights is called here, however its file wraps the parts."""
    for part in PARTS:
        _, found, rest = name.partition(f"{part}.")
        if found:
            return f"{part}.{rest.removeprefix('model.')}" if part == "language_model" else f"{part}.{rest}"
    return name


def _instructions(config: PaligemmaExpertConfig) -> Instructions:
    instructions = Instructions(longest=config.longest)
    if config.tokenizer:
        from models.tokenizers import find_tokenizer

        instructions.tokenizer = find_tokenizer(config.tokenizer).backend_tokenizer  # prompts begin with <bos>
    return instructions


def _paligemma(config: PaligemmaExpertConfig, size: _Size, instructions: Instructions, image: int) -> Any:
    """transformers' configuration."""
    from transformers.models.paligemma import PaliGemmaConfig
    from transformers.models.siglip import SiglipVisionConfig

    known = instructions.tokenizer.get_vocab_size() if config.tokenizer else BYTE_VOCABULARY
    make_vision: Any = SiglipVisionConfig  # a decorator hides its fields from type checkers
    make: Any = PaliGemmaConfig
    vision = make_vision(
        hidden_size=size.vision,
        intermediate_size=size.vision_mlp,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=image,
        patch_size=size.patch,
        vision_use_head=False,
    )
    vision._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
    text = gemma_config(
        size.layers, width=size.width, mlp=size.mlp, attention=config.attention, vocab_size=size.vocabulary or known
    )
    return make(vision_config=vision, text_config=text, projection_dim=size.width)


def _keep_keys_and_values(language_model: Any) -> None:
    """Of the last layer. What else it has, and what comes after it, is read by nobody."""
    last = language_model.layers[-1]
    for module, name in (
        (last.self_attn, "q_proj"),
        (last.self_attn, "o_proj"),
        (last, "post_attention_layernorm"),
        (last, "mlp"),
        (language_model, "norm"),
    ):
        delattr(module, name)


def _keys_and_values(layer: Any, x: Float[Tensor, "b n d"], rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What the layer would leave in transformers' cache."""
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    x, attention = layer.input_layernorm(x), layer.self_attn
    keys, values = (
        projected(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projected in (attention.k_proj, attention.v_proj)
    )
    return apply_rotary_pos_emb(keys, keys, *rotation)[1], values


def _mean(x: Float[Tensor, "b n d"], is_pad: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b d"]:
    """Over the tokens that count."""
    if is_pad is None:
        return x.mean(dim=1)
    counts = (~is_pad).to(x.dtype)[..., None]
    return (x * counts).sum(dim=1) / counts.sum(dim=1)
