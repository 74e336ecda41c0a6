"""The demo's task learnt by other policies, from the same demonstrations, in as many steps: `flywheel compare` them."""

from dataclasses import replace

from flows.recipes.demo import demo
from models.config import FitConfig
from models.zoo import ZOO, named
from tasks.recipe import Recipe

BUDGET = FitConfig(steps=1000, batch_size=64, lr=1e-3, save_every=250)


def act() -> Recipe:
    return _recipe("act")


def diffusion_policy() -> Recipe:
    return _recipe("diffusion_policy")


def flow_dit() -> Recipe:
    return _recipe("flow_dit")


def pi0() -> Recipe:
    return _recipe("pi0")


def _recipe(name: str) -> Recipe:
    return replace(
        demo(),
        name=name,
        about=f"pick_cube as in the demo, by {ZOO[name].about}",
        model=f"{name.replace('_', '-')}-pick-cube",
        policy=named(name, "small"),
        fit=BUDGET,
    )
