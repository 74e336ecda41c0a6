"""Eagle 2.5 with Qwen3, the eyes and words of GR00T N1.5; see `models.layers.eagle` for the drawing.

| preset    | picture | SigLIP                     | tokens | Qwen3: layers built, width | out  | parameters | for   |
|-----------|---------|----------------------------|--------|----------------------------|------|------------|-------|
| tiny      | 16 px   | 1 layer of 16, patch 4     | 16     | 1 of 2, 32                 | 24   | 22 k       | tests |
| small     | 64 px   | 3 layers of 64, patch 16   | 16     | 2 of 4, 128                | 128  | 0.50 M     | CPU   |
| published | 224 px  | 27 layers of 1152, patch 14| 256    | 12 of 28, 2048             | 1536 | 1.33 B     | GPU   |

Tokens are per camera; here no patches are joined, and the connector is one linear map. Qwen3's queries share keys two
by two, and queries and keys are normed. The published N1.5 sets project_to_dim to None: its tokens are 2048 wide.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from data.errors import BadInput
from models.layers.eagle import Chat, EagleSize, EagleVLM, LanguageSize, VisionSize, language_options
from models.types import Context

ROPE, EPSILON = 1_000_000.0, 1e-6  # Qwen3's
IMAGE_TOKEN = 151_669  # <IMG_CONTEXT>, the id that stands for a picture's token in prepared inputs
PREFIX = "eagle_"


class Eagle15(EagleVLM):
    """Pictures and words to tokens."""

    presets: ClassVar[Mapping[str, EagleSize]] = {
        "tiny": EagleSize(
            vision=VisionSize(picture=16, patch=4, width=16, layers=1, heads=2, feedforward=32),
            language=LanguageSize(vocabulary=0, width=32, layers=2, heads=2, groups=1, head=16, feedforward=64),
            select=1,
            shuffle=1,
            connector=1,
            project=24,
        ),
        "small": EagleSize(
            vision=VisionSize(picture=64, patch=16, width=64, layers=3, heads=4, feedforward=128),
            language=LanguageSize(vocabulary=0, width=128, layers=4, heads=4, groups=2, head=32, feedforward=256),
            select=2,
            shuffle=1,
            connector=1,
            project=128,
        ),
        "published": EagleSize(
            vision=VisionSize(picture=224, patch=14, width=1152, layers=27, heads=16, feedforward=4304),
            language=LanguageSize(
                vocabulary=151_680, width=2048, layers=28, heads=16, groups=8, head=128, feedforward=6144
            ),
            select=12,
            shuffle=1,
            connector=1,
            project=1536,
        ),
    }
    chat: ClassVar[Chat] = Chat(
        before="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        opens="<image {}><img>",
        closes="</img>",
        after="<|im_end|>\n<|im_start|>assistant\n",
    )

    @staticmethod
    def make_language(size: LanguageSize, layers: int) -> nn.Module:
        from transformers import Qwen3Config, Qwen3Model

        return Qwen3Model(Qwen3Config(**language_options(size, layers, rope=ROPE, epsilon=EPSILON)))

    def forward_prepared(self, inputs: Mapping[str, Tensor], *, image_token: int = IMAGE_TOKEN) -> Context:
        """What `forward` gives, for inputs as InternManip's processor prepares them, with `eagle_` before their names.

        input_ids [b n] with `image_token` wherever a token of a picture belongs, attention_mask [b n], pixel_values
        [pictures 3 s s] on SigLIP's scale, in the order of the prompts. Anything else, such as image_sizes, is not
        read and may be missing. Raises `BadInput` for other names and for a prompt that has not room for its pictures.
        """
        named = {name.removeprefix(PREFIX): value for name, value in inputs.items()}
        for name in ("input_ids", "attention_mask", "pixel_values"):
            if name not in named:
                raise BadInput(f"backbone eagle_1_5: {PREFIX}{name} is missing; there are {', '.join(sorted(inputs))}")
        ids, attends = named["input_ids"], named["attention_mask"].bool()
        seen = self.see(named["pixel_values"]).flatten(0, 1)
        places = ids == image_token
        if (room := int(places.sum())) != len(seen):
            raise BadInput(f"backbone eagle_1_5: the prompts have room for {room} tokens of pictures, not {len(seen)}")
        tokens = self.language.embed_tokens(ids.where(~places, 0))
        tokens = tokens.masked_scatter(places[..., None], seen.to(tokens.dtype))
        return self.context(self.read(tokens, attends), ~attends)
