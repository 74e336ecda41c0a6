"""Eagle's weights as they are published, alone or inside of a GR00T, under the names of `EagleVLM`.

```
 GR00T N1            GR00T N1.5                 Eagle alone
 backbone.model.     backbone.eagle_model.      (nothing)         vision_model.          -->  vision.
                                                                  mlp1.                  -->  connector.
                                                                  language_model.model.  -->  language.
 backbone.linear.    backbone.eagle_linear.     --                                       -->  project.
```
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from data.untrusted import fault
from models.layers.pretrained import read_weights

GROOT = re.compile(r"^backbone\.(eagle_model|model)\.")
PARTS = {"vision_model.": "vision.", "mlp1.": "connector.", "language_model.model.": "language."}
PROJECTIONS = ("backbone.linear.", "backbone.eagle_linear.")
# what no feature depends on: the heads of the towers, and numbers that are computed
UNREAD = re.compile(r"^(language_model\.lm_head\.|vision_model\.vision_model\.head\.)|position_ids$|inv_freq$")
LAYER = re.compile(r"^language\.layers\.(\d+)\.")


def our_names(published: Iterable[str], *, layers: int) -> dict[str, str]:
    """Published name -> `EagleVLM`'s, "" for what nothing here reads; names that are not Eagle's are left out.

    layers: of the language model that are built.
    """
    ours = {name: _our_name(name) for name in published}
    unread = {n for n, our in ours.items() if our and (layer := LAYER.match(our)) and int(layer[1]) >= layers}
    return {name: "" if name in unread else our for name, our in ours.items() if our is not None}


def _our_name(name: str) -> str | None:
    for prefix in PROJECTIONS:
        if name.startswith(prefix):
            return "project." + name.removeprefix(prefix)
    bare = GROOT.sub("", name)
    if UNREAD.search(bare):
        return ""
    for prefix, ours in PARTS.items():
        if bare.startswith(prefix):
            return ours + bare.removeprefix(prefix)
    return None


def fill_eagle(module: nn.Module, folder: Path, *, layers: int) -> None:
    """Copy the weights in `folder` into `module`, an `EagleVLM`. A projection, which Eagle alone lacks, may be missing.

    Raises `BadInput` with the keys that do not fit. A GR00T's head is not looked at.
    """
    found = read_weights(folder)
    names = our_names(found, layers=layers)
    wanted = module.state_dict()
    ours = {our: found[name] for name, our in names.items() if our}
    strangers = [name for name in found if name not in names and not name.startswith("action_head.")]
    projects = any(name.startswith("project.") for name in ours)
    needed = {name: t for name, t in wanted.items() if projects or not name.startswith("project.")}
    refuse_unfit(folder, ours, needed, strangers)
    with torch.no_grad():
        for name, tensor in ours.items():
            wanted[name].copy_(tensor)


def refuse_unfit(
    folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], strangers: Iterable[str] = ()
) -> None:
    """Raise `BadInput` that lists `strangers`, what is `found` or `wanted` but not both, and what differs in shape."""
    unfit = [f"{name} (unknown)" for name in strangers]
    unfit += [f"{name} ({'unknown' if name in found else 'missing'})" for name in sorted(found.keys() ^ wanted.keys())]
    for name in sorted(found.keys() & wanted.keys()):
        if found[name].shape != wanted[name].shape:
            unfit.append(f"{name} ({list(found[name].shape)}, not {list(wanted[name].shape)})")
    if unfit:
        raise fault(folder, "", f"{len(unfit)} keys do not fit: {', '.join(unfit)}", "name weights of this model")
