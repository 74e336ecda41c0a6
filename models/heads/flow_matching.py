"""GR00T N1's action head: a DiT cross-attends to the backbone's tokens; drawing and table in `models.layers.flow_dit`.

Bjorck et al. 2025 (arXiv 2503.14734). At its published size, for robots of 64 state and 32 action components padded and
a context 1536 wide, as N1 has them, it holds 0.85 B parameters, 0.54 B of them in the DiT.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.flow import euler
from models.layers.flow_dit import FlowDit, FlowDitConfig
from models.types import Context, Sizes


@dataclass(frozen=True, kw_only=True)
class FlowMatchingConfig(FlowDitConfig):
    """Options of the `flow_matching` head."""

    draws: int = 0  # (noise, time) pairs per training sample, the backbone runs once for all; 0 = the preset's


class FlowMatchingHead(FlowDit):
    """Samples a chunk as a function of the context and the initial noise."""

    Config: ClassVar[type] = FlowMatchingConfig

    def __init__(self, config: FlowMatchingConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes, draws=config.draws)

    def sample(self, context: Context, noise: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        return euler(self.convention, self.field(context), noise, self.config.steps)
