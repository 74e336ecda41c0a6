"""Our pi0 in the sizes of `tiny_pi0`, whose weights therefore fit: the published preset made small."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from tiny_pi0 import SMALLEST, VOCABULARY, Size

from models.backbones import paligemma_expert
from models.heads import pi0_flow
from models.types import LayerShape


@contextmanager
def published_sizes(size: Size = SMALLEST) -> Iterator[None]:
    """Inside, the presets `published` have the widths of `size`."""
    backbone = paligemma_expert._Size(
        image=size.image,
        patch=14,
        vision=size.vision,
        vision_layers=size.vision_depth,
        vision_heads=2,
        vision_mlp=size.vision_mlp,
        width=size.width,
        mlp=size.mlp * size.width,
        layers=LayerShape(layers=size.depth, groups=1, queries=8, width=size.head),
        vocabulary=VOCABULARY,
    )
    head = pi0_flow._Size(width=size.expert, mlp=size.mlp * size.expert, draws=1)
    with (
        patch.dict(paligemma_expert.PRESETS, published=backbone),
        patch.dict(pi0_flow.PRESETS, published=head),
    ):
        yield
