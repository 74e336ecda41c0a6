"""Who acts in a night's collection.

The champion of the moment is pinned to its night, so that asking for that night again makes nothing anew.
"""

import json
from pathlib import Path
from typing import Any

from data.errors import BadInput
from data.refs import Ref
from data.registry import did_you_mean
from data.store import Store
from models.registry import BACKBONES, HEADS
from tasks.recipe import Recipe


def who_acts(recipe: Recipe, night: int) -> tuple[list[Ref], dict[str, Any]]:
    """`(upstream, policy)`: the checkpoint that acts, if it is one, and the stage's parameters for it."""
    who = recipe.collect.policy
    if who == "oracle":
        return [], {"kind": "oracle", "noise": recipe.collect.noise}
    if who == "random":
        return [], {"kind": "random"}
    ref = _pinned_champion(recipe, night) if who == "champion" else _checkpoint(who)
    return [ref], {"kind": "checkpoint", "replan": recipe.evaluate.replan}


def code_of(checkpoints: list[Ref]) -> tuple[str, ...]:
    """The modules that a checkpoint's acting stands on."""
    parts: list[str] = []
    for ref in checkpoints:
        policy = Store().manifest(ref)["params"]["policy"]
        parts += ["models.acting", BACKBONES.module(policy["backbone"]), HEADS.module(policy["head"])]
    return tuple(parts)


def _checkpoint(folder: str) -> Ref:
    """The published checkpoint artefact in `folder`."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        stage, key = manifest["stage"], manifest["key"]
    except (OSError, ValueError, KeyError):
        hint = did_you_mean(folder, ["oracle", "random", "champion"])
        raise BadInput(f"collect.policy {folder!r} is no checkpoint artefact of this store{hint}") from None
    ref, why = Store().find(stage, key)
    if ref is None or stage != "train":
        raise BadInput(
            f"collect.policy {folder!r}: {why if ref is None else 'made by stage ' + stage}; name a train artefact"
        )
    return ref


def _pinned_champion(recipe: Recipe, night: int) -> Ref:
    pin = Store().root / "nights" / recipe.name / f"{night:04d}.json"
    if not pin.exists():
        from tasks.tracking_registry import champion

        version = champion(recipe.model)
        if version is None:
            raise BadInput(f"model {recipe.model!r} has no champion yet; collect night 1 with --collect.policy oracle")
        pin.parent.mkdir(parents=True, exist_ok=True)
        part = pin.with_suffix(".part")
        part.write_text(json.dumps({"key": version.tags["checkpoint"]}))
        part.rename(pin)
    key = json.loads(pin.read_text())["key"]
    ref, why = Store().find("train", key)
    if ref is None:
        raise BadInput(
            f"{pin}: the champion that night {night} was pinned to is gone ({why}); delete this file to pin anew"
        )
    return ref
