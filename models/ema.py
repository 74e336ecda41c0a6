"""Averaged weights: what acts."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """Exponential moving average of the trained parameters of `module`; buffers and frozen parameters are as they are.

    The decay is min(decay, (1 + step) / (10 + step)), so that the first steps are soon forgotten. It derives from the
    step: the average has no state but its weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.trained.items()}

    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(self.trained.values()), None)

    def state_dict(self) -> dict[str, Tensor]:
        """As the module's own, the trained parameters averaged."""
        return {**self.module.state_dict(), **self.average}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(tensors[name])
