"""Random shifts and colours of training pictures, drawn from the step's generator."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def random_shift(images: UInt8[Tensor, "b h w c"], pixels: int, generator: torch.Generator) -> UInt8[Tensor, "b h w c"]:
    """Move each picture by its own whole number of pixels, up to `pixels` each way; the border is repeated.

    Pad-and-crop of DrQ (Kostrikov et al. 2020, arXiv 2004.13649). On bytes, and by whole rows of a window: a gather of
    single pixels takes four times as long.
    """
    b, height, width, channels = images.shape
    offset = torch.randint(0, 2 * pixels + 1, (2, b, 1), generator=generator, device=images.device)
    left, right = (edge.expand(-1, -1, pixels, -1) for edge in (images[:, :, :1], images[:, :, -1:]))
    padded = torch.cat([left, images, right], dim=2).flatten(2)
    windows = padded.unfold(2, width * channels, channels)  # b, row, shift, the window's bytes
    rows = (torch.arange(height, device=images.device) + offset[0] - pixels).clamp(0, height - 1)
    sample = torch.arange(b, device=images.device)[:, None]
    return windows[sample, rows, offset[1]].unflatten(-1, (width, channels))


def colour_jitter(
    images: Float[Tensor, "b c h w"], share: float, generator: torch.Generator
) -> Float[Tensor, "b c h w"]:
    """Brightness and contrast of each picture times its own factors in [1 - share, 1 + share]; stays in [0, 1]."""
    factor = torch.rand((2, len(images), 1, 1, 1), generator=generator, device=images.device) * 2 - 1
    brightness, contrast = 1 + share * factor
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (((images - mean) * contrast + mean) * brightness).clamp(0, 1)
