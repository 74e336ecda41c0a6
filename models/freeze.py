"""Frozen means frozen: no gradient, eval mode, the same bytes before and after."""

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def train_mode(module: nn.Module) -> None:
    """Training mode, except for parts whose parameters are all frozen: their dropout and statistics stand still too."""
    module.train()
    for part in frozen_parts(module):
        part.eval()


def frozen_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules that have parameters and train none of them."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        yield module
        return
    for child in module.children():
        yield from frozen_parts(child)


def frozen_digest(module: nn.Module, *, without: Sequence[nn.Module] = ()) -> str:
    """sha256 over the frozen parameters, and the buffers of frozen parts, except those of the modules `without`."""
    frozen = {id(t) for part in frozen_parts(module) for t in part.state_dict(keep_vars=True).values()}
    frozen |= {id(p) for p in module.parameters() if not p.requires_grad}
    frozen -= {id(t) for part in without for t in part.state_dict(keep_vars=True).values()}
    digest = hashlib.sha256()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in frozen:
            digest.update(name.encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
