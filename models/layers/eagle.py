"""NVIDIA's Eagle: SigLIP sees the pictures, a language model reads them as the first words of the instruction.

```
 camera 1 --SigLIP--> 16 x 16 patches --2 x 2 into one--> 64 --connector--> 64 tokens --+
 camera 2 --SigLIP--> ...                                                   64 tokens --+--> language model's first
 task, in words ------------------------------------------------------------ w tokens --+     `select_layer` layers
                                                                                                |  norm
            tokens [b n d], n = 64·cameras + w  <--------------------- project_to_dim ----------+
```
The language model is causal and padding stands on the right, so no token that counts ever sees a padded one: attention
needs no mask, and padded tokens are only marked. Pictures come first and do not see the words.

The towers are transformers' own (`SiglipVisionModel`, `LlamaModel`, `Qwen3Model`); Eagle is code that a published model
brings with it, which nobody should have to run, so the little between the towers is written here. Also different:
* Only the first `select_layer` layers are built. InternManip builds all and pops the rest in a loop that, with -1, pops
  every one. Their last layer's output goes through the final norm, as it does in a model whose layers were popped:
  it is not `hidden_states[select_layer]` of the whole model, which knows no norm in the middle.
* A part that is not tuned is frozen only on weights that are named: frozen random weights are of no use.
"""

import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from data.errors import BadInput
from models.layers.eagle_weights import fill_eagle
from models.layers.instructions import Instructions
from models.types import Context, Observation

SPECIAL = re.compile(r"<[^<> ]+>")  # a chat's tokens that no text holds


@dataclass(frozen=True, kw_only=True)
class VisionSize:
    """Of SigLIP."""

    picture: int  # pixels of a side; pictures of another size are scaled to it
    patch: int  # pixels of a side
    width: int
    layers: int
    heads: int
    feedforward: int


@dataclass(frozen=True, kw_only=True)
class LanguageSize:
    """Of a language model."""

    vocabulary: int  # rows of its embedding; 0 = what the tokenizer knows
    width: int
    layers: int
    heads: int
    groups: int  # of keys and values
    head: int  # width of a key
    feedforward: int


@dataclass(frozen=True, kw_only=True)
class EagleSize:
    """All numbers that decide the weights' shapes."""

    vision: VisionSize
    language: LanguageSize
    select: int  # layers of the language model that are built
    shuffle: int  # patches of a side that become one token
    connector: int  # linear maps between the towers
    project: int | None  # width of the tokens; None = the language model's


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What stands around pictures and instruction in the prompts a published model has learnt from."""

    before: str
    opens: str  # before each picture; {} is its number, from 1
    closes: str  # after each picture
    after: str


@dataclass(frozen=True, kw_only=True)
class EagleConfig:
    """Options of the `eagle` and `eagle_1_5` backbones."""

    preset: Literal["tiny", "small", "published"] = "small"  # sizes of the towers; see the backbone's table
    select_layer: int | None = 0  # layers of the language model that are built; None or -1 = all, 0 = the preset's
    project_to_dim: int | None = 0  # width of the tokens; None = the language model's, 0 = the preset's
    shuffle: int = 0  # patches of a side that become one token, 1 = none are joined; 0 = the preset's
    connector: Literal[0, 1, 2] = 0  # linear maps from a picture's tokens to the language model; 0 = the preset's
    vocabulary: int = 0  # rows of the embedding; 0 = the preset's
    crop: float = 1.0  # share of a picture's rows and columns that is kept, in the middle (GR00T: 0.95)
    tokenizer: str = ""  # folder with Eagle's tokenizer.json, which brings its chat with it; empty = bytes
    longest: int = 128  # ids that are read of an instruction
    tune_llm: bool = True  # train the language model; false needs pretrained
    tune_visual: bool = True  # train SigLIP and the connector; false needs pretrained
    pretrained: str = ""  # folder with safetensors of Eagle, or of a GR00T that holds it; empty = from scratch

    def __post_init__(self) -> None:
        if not (self.pretrained or (self.tune_llm and self.tune_visual)):
            name = "tune_visual" if self.tune_llm else "tune_llm"
            raise BadInput(f"backbone eagle: {name} false would keep random weights; name weights in pretrained")
        if not 0 < self.crop <= 1:
            raise BadInput(f"backbone eagle: crop is {self.crop}; give a share in (0, 1]")
        for name, least in (("longest", 1), ("vocabulary", 0), ("shuffle", 0), ("project_to_dim", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"backbone eagle: {name} is {value}; give at least {least}")


class EagleVLM(nn.Module):
    """Pictures and words to tokens. The state is not read: heads that want it have `Context.state`."""

    Config: ClassVar[type] = EagleConfig
    gives: ClassVar[frozenset[str]] = frozenset({"pooled", "tokens"})
    presets: ClassVar[Mapping[str, EagleSize]]
    chat: ClassVar[Chat]
    frames: Tensor
    language: Any  # transformers' LlamaModel or Qwen3Model

    def __init__(
        self,
        config: EagleConfig,
        *,
        cameras: tuple[str, ...],
        image_size: tuple[int, int],
        state_width: int,
        give: frozenset[str],
    ) -> None:
        """Raises `BadInput` for no cameras, a select_layer that is not there, a tokenizer that does not fit."""
        super().__init__()
        if not cameras:
            raise BadInput("backbone eagle: there is no camera to see with; record one, or name another backbone")
        self.config, self.cameras, self.give = config, cameras, give
        self.instructions = Instructions(config.tokenizer, longest=config.longest)
        self.size = size = _size(self.presets[config.preset], config, self.instructions)
        self.width = size.project or size.language.width
        self.vision = _siglip(size.vision)
        self.connector = _connector(size)
        self.language = self.make_language(size.language, size.select)
        self.project = _linear(size.language.width, self.width) if size.project else nn.Identity()
        for part, tuned in ((self.vision, config.tune_visual), (self.connector, config.tune_visual)):
            part.requires_grad_(tuned)
        self.language.requires_grad_(config.tune_llm)
        frames = _frames(self.chat, len(cameras), self.instructions) if config.tokenizer else [[]] * (len(cameras) + 1)
        self.frame_lengths = [len(frame) for frame in frames]
        self.register_buffer("frames", torch.tensor([*chain(*frames)], dtype=torch.long), persistent=False)
        self.after = self.chat.after if config.tokenizer else ""

    @staticmethod
    @abstractmethod
    def make_language(size: LanguageSize, layers: int) -> nn.Module:
        """transformers' model without a head, of `layers` layers."""

    def forward(self, observation: Observation) -> Context:
        """`observation` as `Policy.prepare` makes it."""
        pictures = torch.cat([self._scaled(observation.images[name]) for name in self.cameras])
        seen = self.see(pictures).chunk(len(self.cameras))
        ids, is_pad = self.instructions(tuple(task + self.after for task in observation.tasks), pictures.device)
        embed, parts = self.language.embed_tokens, []
        for frame, picture in zip_longest(self.frames.split(self.frame_lengths), seen):
            parts.append(embed(frame).expand(len(ids), -1, -1))
            parts.extend([] if picture is None else [picture])
        tokens = torch.cat([*parts, embed(ids)], dim=1)
        before = is_pad.new_zeros(len(ids), tokens.shape[1] - ids.shape[1])
        return self.context(self.read(tokens), torch.cat([before, is_pad], dim=1))

    def see(self, pictures: Float[Tensor, "p 3 s s"]) -> Float[Tensor, "p n d"]:
        """Pictures on SigLIP's scale, -1 to 1, as words of the language model."""
        patches = self.vision(pixel_values=pictures).last_hidden_state
        return self.connector(pixel_shuffle(patches, self.size.shuffle))

    def read(
        self, tokens: Float[Tensor, "b n d"], attends: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Embedded tokens through the language model. `attends` is needed where padding does not stand on the right."""
        mask = None if attends is None else attends.long()
        return self.language(inputs_embeds=tokens, attention_mask=mask, use_cache=False).last_hidden_state

    def context(self, hidden: Float[Tensor, "b n d"], is_pad: Bool[Tensor, "b n"]) -> Context:
        """What the head reads."""
        tokens = self.project(hidden)
        real = ~is_pad[..., None]
        pooled = tokens.where(real, 0.0).sum(dim=1) / real.sum(dim=1).clamp(min=1) if "pooled" in self.give else None
        kept = "tokens" in self.give
        return Context(pooled=pooled, tokens=tokens if kept else None, token_is_pad=is_pad if kept else None)

    def load_pretrained(self) -> None:
        """Fill in `config.pretrained`, if it is named. Raises `BadInput` for weights that are not of this model."""
        if self.config.pretrained:
            fill_eagle(self, Path(self.config.pretrained), layers=self.size.select)

    def _scaled(self, images: Float[Tensor, "b 3 _ _"]) -> Float[Tensor, "b 3 s s"]:
        side, (rows, columns) = self.size.vision.picture, images.shape[-2:]
        h, w = int(rows * self.config.crop), int(columns * self.config.crop)
        top, left = round((rows - h) / 2), round((columns - w) / 2)  # as torchvision's CenterCrop
        images = images[..., top : top + h, left : left + w]
        if images.shape[-2:] != (side, side):
            images = interpolate(images, (side, side), mode="bilinear", antialias=True)
        return images * 2 - 1


def pixel_shuffle(patches: Float[Tensor, "b n d"], factor: int) -> Float[Tensor, "b m e"]:
    """`factor` x `factor` neighbours of a square of patches as one token, row by row, and in it row by row.

    Eagle's `pixel_shuffle` with the scale 1 / factor (its version 2).
    """
    side = round(patches.shape[1] ** 0.5)
    blocks = patches.unflatten(1, (side // factor, factor, side // factor, factor))
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)


def _size(preset: EagleSize, config: EagleConfig, instructions: Instructions) -> EagleSize:
    """The preset with what the options change."""
    layers, known = preset.language.layers, instructions.tokenizer.get_vocab_size()
    select = preset.select if config.select_layer == 0 else config.select_layer
    select = layers if select in (None, -1) else select
    if not 1 <= select <= layers:
        raise BadInput(f"backbone eagle: select_layer is {select}; give 1 to {layers}, or -1 for all")
    rows = config.vocabulary or preset.language.vocabulary or known
    if known > rows:
        where = config.tokenizer or "bytes"
        raise BadInput(f"backbone eagle: tokenizer {where} knows {known} ids, the model {rows}; name the model's own")
    shuffle = config.shuffle or preset.shuffle
    if (side := preset.vision.picture // preset.vision.patch) % shuffle:
        raise BadInput(f"backbone eagle: shuffle is {shuffle}, which does not divide the {side} patches of a side")
    return replace(
        preset,
        language=replace(preset.language, vocabulary=rows),
        select=select,
        shuffle=shuffle,
        connector=config.connector or preset.connector,
        project=preset.project if config.project_to_dim == 0 else config.project_to_dim,
    )


def _siglip(size: VisionSize) -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    options: dict[str, Any] = {
        "image_size": size.picture,
        "patch_size": size.patch,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.feedforward,
        "vision_use_head": False,  # the pooling that no token goes through
    }
    return SiglipVisionModel(SiglipVisionConfig(**options))


def _connector(size: EagleSize) -> nn.Sequential:
    """Eagle's `mlp1`, under its own numbers."""
    seen, width = size.vision.width * size.shuffle**2, size.language.width
    if size.connector == 1:
        return nn.Sequential(_linear(seen, width))
    return nn.Sequential(nn.LayerNorm(seen), _linear(seen, width), nn.GELU(), _linear(width, width))


def _linear(width: int, out: int) -> nn.Linear:
    """Begins by keeping the size of what it reads, as the towers do; torch's own would shrink pictures beside words."""
    linear = nn.Linear(width, out)
    nn.init.normal_(linear.weight, std=width**-0.5)
    nn.init.zeros_(linear.bias)
    return linear


def language_options(size: LanguageSize, layers: int, *, rope: float, epsilon: float) -> dict[str, Any]:
    """For transformers' configurations. rope: longest period of the positions; epsilon: of the norms."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.groups,
        "head_dim": size.head,
        "intermediate_size": size.feedforward,
        "initializer_range": size.width**-0.5,  # .022 where they have .02, and right for a narrow one too
        "rope_parameters": {"rope_type": "default", "rope_theta": rope},
        "rms_norm_eps": epsilon,
        "use_cache": False,
    }


def _frames(chat: Chat, cameras: int, instructions: Instructions) -> list[list[int]]:
    """The ids before each picture, and those between the last one and the instruction."""
    known = instructions.tokenizer
    for tag in SPECIAL.findall(chat.before + chat.opens + chat.closes + chat.after):
        if known.token_to_id(tag) is None:  # it would be read as letters
            raise BadInput(f"backbone eagle: the tokenizer has no token {tag}; name the folder of Eagle's own")
    texts = [chat.before + chat.opens.format(1)]
    texts += [chat.closes + chat.opens.format(n) for n in range(2, cameras + 1)]
    return [known.encode(text, add_special_tokens=False).ids for text in [*texts, chat.closes]]
