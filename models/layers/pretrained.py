"""Published weights from a folder: one safetensors file, or several with an index, filled in name by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.untrusted import fault, load_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, under the names they were written with.

    Raises `BadInput` for a file that is missing or no safetensors file.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            said = f"cannot be read as safetensors ({type(error).__name__})"
            raise fault(folder, file, said, "name a folder with safetensors, or fetch it again") from None
    return tensors


def fill(module: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy `tensors` into `module`, whose names they have.

    Raises `BadInput` for one that is missing or of another shape; those that the module does not have are left out.
    """
    wanted = module.state_dict()
    with torch.no_grad():
        for name, place in wanted.items():
            if name not in tensors:
                raise fault(folder, WHOLE, f"{name} is missing", "name the weights of this model")
            if tensors[name].shape != place.shape:
                shapes = f"{list(tensors[name].shape)}, not {list(place.shape)}"
                raise fault(folder, WHOLE, f"{name} is {shapes}", "name the weights of this model")
            place.copy_(tensors[name])


def _files(folder: Path) -> Iterable[str]:
    """Of the weights. A shard's name is the index's, so it is taken as a name in this folder and nothing else."""
    if not (folder / INDEX).is_file():
        return [WHOLE]
    shards = load_json(folder, INDEX).get("weight_map", {}).values()
    return sorted({Path(str(shard)).name for shard in shards})
