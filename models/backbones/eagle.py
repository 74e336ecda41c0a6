"""Eagle 2 with SmolLM2, the eyes and words of GR00T N1; see `models.layers.eagle` for the drawing.

| preset    | picture | SigLIP                     | tokens | SmolLM2: layers built, width | out  | parameters | for   |
|-----------|---------|----------------------------|--------|------------------------------|------|------------|-------|
| tiny      | 16 px   | 1 layer of 16, patch 4     | 4      | 1 of 2, 32                   | 24   | 26 k       | tests |
| small     | 64 px   | 2 layers of 64, patch 8    | 16     | 2 of 4, 128                  | 128  | 0.51 M     | CPU   |
| published | 224 px  | 27 layers of 1152, patch 14| 64     | 12 of 24, 2048               | 1536 | 1.34 B     | GPU   |

Tokens are per camera. Bjorck et al. 2025 (arXiv 2503.14734), which counts 1.34 B in the published one too.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from models.layers.eagle import Chat, EagleSize, EagleVLM, LanguageSize, VisionSize, language_options

ROPE, EPSILON = 130_000.0, 1e-5  # SmolLM2's


class Eagle(EagleVLM):
    """Pictures and words to tokens."""

    presets: ClassVar[Mapping[str, EagleSize]] = {
        "tiny": EagleSize(
            vision=VisionSize(picture=16, patch=4, width=16, layers=1, heads=2, feedforward=32),
            language=LanguageSize(vocabulary=0, width=32, layers=2, heads=2, groups=2, head=16, feedforward=64),
            select=1,
            shuffle=2,
            connector=2,
            project=24,
        ),
        "small": EagleSize(
            vision=VisionSize(picture=64, patch=8, width=64, layers=2, heads=4, feedforward=128),
            language=LanguageSize(vocabulary=0, width=128, layers=4, heads=4, groups=4, head=32, feedforward=256),
            select=2,
            shuffle=2,
            connector=2,
            project=128,
        ),
        "published": EagleSize(
            vision=VisionSize(picture=224, patch=14, width=1152, layers=27, heads=16, feedforward=4304),
            language=LanguageSize(
                vocabulary=49_152, width=2048, layers=24, heads=32, groups=32, head=64, feedforward=8192
            ),
            select=12,
            shuffle=2,
            connector=2,
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
        from transformers import LlamaConfig, LlamaModel

        return LlamaModel(LlamaConfig(**language_options(size, layers, rope=ROPE, epsilon=EPSILON)))
