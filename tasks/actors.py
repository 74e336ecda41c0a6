"""Who acts in a night's collection.

The champion of the moment is pinned to its night, so that asking for that night again makes nothing anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import BadInput
from data.refs import Ref
from data.registry import did_you_mean
from data.store import Store
from models.registry import modules
from tasks.recipe import Recipe


def who_acts(recipe: Recipe, night: int, turn: int = 0) -> tuple[list[Ref], dict[str, Any]]:
    """`(upstream, policy)`: the checkpoint that acts, if it is one, and the stage's parameters for it.

    `champion` is the registry's champion; the oracle acts as long as there is none. `turn` is the batch's number within
    its night: demonstrators of unequal skill take turns.
    """
    who = recipe.collect.policy
    if who == "champion":
        key = _pinned_champion(recipe, night)
        if key is not None:
            return [_found(key, f"the champion of night {night}")], as_checkpoint(recipe)
        who = "oracle"
    if who == "oracle":
        return [], {"kind": "oracle", "noise": recipe.collect.noise[turn % len(recipe.collect.noise)]}
    if who == "random":
        return [], {"kind": "random"}
    return [checkpoint_in(who, "collect.policy")], as_checkpoint(recipe)


def starting_point(recipe: Recipe) -> Ref | None:
    """The checkpoint that `improve.start` names: a folder, or the registry's champion of that night.

    None when it names none, or when there is no champion yet: then the demonstrations are cloned.
    """
    assert recipe.improve is not None
    folder = recipe.improve.start
    if not folder:
        return None
    if folder != "champion":
        return checkpoint_in(folder, "improve.start")
    key = _pinned_champion(recipe, recipe.collect.nights)
    return None if key is None else _found(key, f"the champion of night {recipe.collect.nights}")


def as_checkpoint(recipe: Recipe) -> dict[str, Any]:
    return {"kind": "checkpoint", "replan": recipe.evaluate.replan}


def code_of(checkpoints: list[Ref]) -> tuple[str, ...]:
    """The modules that a checkpoint's acting stands on."""
    parts: list[str] = []
    for ref in checkpoints:
        if not ref.digest:  # foreseen only (--explain): it is about to be made, and so is what stands on it
            continue
        parts += acting_code(Store().manifest(ref)["params"]["policy"])
    return tuple(parts)


def acting_code(policy: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that the acting of a policy so configured stands on."""
    return "models.acting", *modules(policy)


def checkpoint_in(folder: str, option: str) -> Ref:
    """The published checkpoint artefact in `folder`, which `option` named."""
    return artefact_in(folder, option, made_by="train")


def artefact_in(folder: str, option: str, *, made_by: str) -> Ref:
    """The artefact of stage `made_by` in `folder`, which `option` named."""
    path = Path(folder)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        stage, key = manifest["stage"], manifest["key"]
    except (OSError, ValueError, KeyError):
        hint = did_you_mean(folder, ["oracle", "random", "champion"])
        raise BadInput(f"{option} {folder!r} is no checkpoint artefact of this store{hint}") from None
    if stage != made_by:
        raise BadInput(f"{option} {folder!r} was made by stage {stage}; name an artefact of {made_by}")
    return _found(key, f"{option} {folder!r}", stage)


def _pinned_champion(recipe: Recipe, night: int) -> str | None:
    """The key of the checkpoint that was champion when this night was first asked for; None if there was none."""
    pin = Store().root / "nights" / recipe.name / f"{night:04d}.json"
    if not pin.exists():
        from tasks.tracking_registry import champion

        version = champion(recipe.model)
        pin.parent.mkdir(parents=True, exist_ok=True)
        part = pin.with_suffix(".part")
        part.write_text(json.dumps({"champion": version.tags["checkpoint"] if version else None}))
        part.rename(pin)
    return json.loads(pin.read_text())["champion"]


def _found(key: str, whose: str, stage: str = "train") -> Ref:
    ref, why = Store().find(stage, key)
    if ref is None:
        raise BadInput(f"{whose} is gone from the store ({key[:16]}: {why}); name another")
    return ref
