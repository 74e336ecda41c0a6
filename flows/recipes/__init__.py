"""Whole nights by name. Add one: a file here with a function that returns a `Recipe`, and its line below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data.registry import Registry

if TYPE_CHECKING:
    from tasks.recipe import Recipe

RECIPES = Registry(
    "recipe",
    {
        "demo": "flows.recipes.demo:demo",
        "improve": "flows.recipes.improve:improve",
        "act": "flows.recipes.zoo:act",
        "diffusion_policy": "flows.recipes.zoo:diffusion_policy",
        "flow_dit": "flows.recipes.zoo:flow_dit",
        "pi0": "flows.recipes.zoo:pi0",
        "statevla": "flows.recipes.statevla:statevla",
        "debug": "flows.recipes.debug:debug",
        "improve-debug": "flows.recipes.improve:improve_debug",
        "statevla-debug": "flows.recipes.statevla:statevla_debug",
    },
)


def load(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe called `name`, with `["fit.lr=1e-4", ...]` applied. Raises `BadInput` with a did-you-mean."""
    from data.errors import BadInput
    from tasks.recipe import override

    pairs = {}
    for item in overrides or []:
        option, sign, value = item.partition("=")
        if not sign:
            raise BadInput(f"override {item!r} is not option=value; write e.g. fit.lr=1e-4")
        pairs[option] = value
    return override(RECIPES.resolve(name)(), pairs)
