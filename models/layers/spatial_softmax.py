"""Where each feature is in the picture: the expected coordinate under a softmax over pixels."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SpatialSoftmax(nn.Module):
    """K keypoints (x, y) in [-1, 1] from a feature map; (-1, -1) is the centre of the top left cell.

    Finn et al. 2016 (arXiv 1509.06113); each keypoint has its own learnt temperature through the 1x1 convolution.
    """

    def __init__(self, channels: int, keypoints: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, keypoints, kernel_size=1)

    def forward(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k 2"]:
        return expected_coordinates(self.maps(features))


def expected_coordinates(logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k 2"]:
    """Softmax over the pixels of each map, then the mean coordinate. A one-hot map gives that pixel's coordinate."""
    height, width = logits.shape[-2:]
    mass = logits.flatten(2).softmax(-1).unflatten(-1, (height, width))
    x = mass.sum(-2) @ torch.linspace(-1, 1, width, device=logits.device, dtype=logits.dtype)
    y = mass.sum(-1) @ torch.linspace(-1, 1, height, device=logits.device, dtype=logits.dtype)
    return torch.stack([x, y], dim=-1)
