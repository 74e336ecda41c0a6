"""A policy that somebody published, as ours: every weight of theirs in its place, or a list of those without one.

```
 policy = load_published("lerobot/act_aloha_sim_transfer_cube_human")        # once `flywheel fetch` has brought it
 policy.predict_action(observation)
 publish(folder, lambda hidden: save_policy(policy, hidden), step=0)         # models.checkpoint: from now on ours
```
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import BadInput
from data.paths import store_dir
from data.registry import Registry
from data.untrusted import fault, load_json
from models.policy import Policy

CONFIG = "config.json"
# `type` or `model_type` in config.json -> read(folder): specification, normalisation, weights under our names
KINDS = Registry(
    "kind of published policy",
    {
        "act": "models.published.act:read",
        "diffusion": "models.published.diffusion:read",
        "gr00t_n1": "models.published.gr00t:read",
        "gr00t_n1_5": "models.published.gr00t:read",
        "pi0": "models.published.pi0:read",
        "pi05": "models.published.pi0:read",
    },
)


def load_published(source: str | Path, **options: Any) -> Policy:
    """The policy in a folder, or by the name that `flywheel fetch` knew it by: on the CPU, in eval mode.

    options: what its kind's `read` takes beside the folder, such as a GR00T's `robot`. Raises `BadInput` for a folder
    that is not there, holds another kind, is damaged, or has weights that do not fit, with the first of those.
    """
    folder = _folder(source)
    config = load_json(folder, CONFIG)
    kind = str(config.get("type") or config.get("model_type")) if isinstance(config, dict) else "?"
    if kind not in KINDS:
        raise fault(folder, CONFIG, f"is of a {kind[:30]!r}", f"known: {', '.join(KINDS)}")
    spec, normalizers, weights = KINDS.resolve(kind)(folder, **options)
    policy = Policy.restore(spec, normalizers)
    _refuse_unfit(folder, weights, policy.state_dict())
    policy.load_state_dict(weights)
    return policy.eval()


def _folder(source: str | Path) -> Path:
    """Where `source` lies: a folder, or one below the store's checkpoints with the name that fetching gave it."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    fetched = sorted((store_dir() / "checkpoints").glob(f"*/{str(source).replace('/', '--')}"))
    if len(fetched) != 1:
        raise BadInput(f"{source}: no such folder, and not fetched; `flywheel fetch {source}` gets it from the hub")
    return fetched[0]


def _refuse_unfit(folder: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise `BadInput` unless both have the same names and shapes: how many have not, and the first of those."""
    both = found.keys() & wanted.keys()
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(name for name in both if found[name].shape != wanted[name].shape),
    }
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} {what}" for what, names in faults.items() if names)
        first = ", ".join(names[0] for names in faults.values() if names)
        raise fault(folder.parent, folder.name, f"of {len(wanted)} weights {counts}: {first}", "no such model is known")
