"""Convolutional trunks: a picture to a map of features, narrow ones for a CPU and torchvision's residual networks.

| trunk                  | layers                                         | map of a 96 px picture | for   |
|------------------------|------------------------------------------------|------------------------|-------|
| tiny                   | 4x4 stride 2, 3x3 stride 2                     | 16 x 24 x 24           | tests |
| small                  | 8x8 stride 4, 3x3 stride 2, 3x3                | 64 x 12 x 12           | CPU   |
| resnet18, 34, 50, 101  | torchvision's without its pooling              | 512 or 2048 x 3 x 3    | GPU   |

All with GroupNorm, except on published weights, which know batch norm only: there its statistics stand still.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import BadInput

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Trunk = Literal["tiny", "small", "resnet18", "resnet34", "resnet50", "resnet101"]
# per narrow trunk: output channels, kernel, stride, padding of each convolution
PLAIN = {
    "tiny": ((16, 4, 2, 1), (16, 3, 2, 1)),
    "small": ((32, 8, 4, 2), (64, 3, 2, 1), (64, 3, 1, 1)),
}
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of a resnet, in order


def make_trunk(name: Trunk, *, frozen_norm: bool = False) -> nn.Sequential:
    """frozen_norm: a resnet's batch norm with statistics that stand still, for weights that have them."""
    if name in PLAIN:
        return nn.Sequential(*_plain(name))
    from torchvision.models import get_model
    from torchvision.ops import FrozenBatchNorm2d

    norm = FrozenBatchNorm2d if frozen_norm else lambda channels: nn.GroupNorm(channels // 16, channels)
    resnet = get_model(name, weights=None, norm_layer=norm)
    return nn.Sequential(*(resnet.get_submodule(stage) for stage in STAGES))


def map_shape(trunk: nn.Module, size: tuple[int, int]) -> tuple[int, int, int]:
    """Channels, rows and columns of what `trunk` makes of a picture of `size`."""
    with torch.no_grad():
        channels, rows, columns = trunk(torch.zeros(1, 3, *size)).shape[1:]
    return channels, rows, columns


def refuse_unfit_weights(backbone: str, trunk: str, pretrained: str, freeze: bool) -> None:
    """Raise `BadInput` for options that contradict each other."""
    if pretrained and trunk in PLAIN:
        raise BadInput(f"backbone {backbone}: no pretrained weights for preset {trunk}; use a resnet")
    if freeze and not pretrained:
        raise BadInput(f"backbone {backbone}: freeze without pretrained would keep random weights; name the weights")


def fill_trunks(trunks: Sequence[nn.Module], path: Path) -> None:
    """torchvision's weights in each of `trunks`, whose fifth part is `layer1`.

    Raises `BadInput` for a file that is not such weights.
    """
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as fault:
        raise BadInput(f"{path}: cannot be read as safetensors ({fault}); name torchvision's resnet") from None
    found = {}
    for name, tensor in trunks[0].state_dict().items():
        published = published_name(name)
        if published not in weights or weights[published].shape != tensor.shape:
            raise BadInput(f"{path}: {published} is missing or of another shape; name the weights of this resnet")
        found[name] = weights[published]
    for trunk in trunks:
        trunk.load_state_dict(found)


def published_name(name: str) -> str:
    """torchvision's for a weight of a resnet trunk: 4.0.conv1.weight is layer1.0.conv1.weight."""
    place, _, rest = name.partition(".")
    return f"{STAGES[int(place)]}.{rest}"


class PictureScale(nn.Module):
    """[0, 1] to the scale that a trunk's weights were trained on, camera by camera."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[Sequence[float]], std: Sequence[Sequence[float]], cameras: int) -> None:
        """mean, std: per colour, one triple for all cameras or one for each. Raises `BadInput` for another number."""
        super().__init__()
        if not {len(mean), len(std)} <= {1, cameras}:
            raise BadInput(f"picture_mean and picture_std: give 1 triple or one for each of {cameras} cameras")
        for name, triples in (("mean", mean), ("std", std)):
            whole = torch.tensor(triples)[:, :, None, None].expand(cameras, -1, -1, -1)
            self.register_buffer(name, whole, persistent=False)

    def forward(self, images: Float[Tensor, "b 3 h w"], camera: int) -> Float[Tensor, "b 3 h w"]:
        return (images - self.mean[camera]) / self.std[camera]


def _plain(name: str) -> list[nn.Module]:
    layers, channels = [], 3
    for out, kernel, stride, padding in PLAIN[name]:
        convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        layers += [convolution, nn.GroupNorm(out // 8, out), nn.ReLU(inplace=True)]
        channels = out
    return layers
