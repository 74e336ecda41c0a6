"""The demo at its smallest: every stage for real, nothing learnt. For tests, and for a first look at a new machine."""

from dataclasses import replace

from data.sim.config import SimConfig
from flows.recipes.demo import demo
from models.config import FitConfig
from tasks.recipe import Collect, Evaluate, Recipe


def debug() -> Recipe:
    return replace(
        demo(),
        name="debug",
        about="every stage for real at its smallest: 6 episodes, 8 steps, 2 seeds; learns nothing",
        model="debug-pick-cube",
        workers=1,
        sim=SimConfig(scene="pick_cube", image_size=(32, 32), max_steps=30),
        collect=Collect(policy="oracle", noise=(0.1,), episodes=6, batch=3),
        fit=FitConfig(steps=8, batch_size=4, save_every=2, warmup_steps=2, threads=1),
        evaluate=Evaluate(episodes=2, replan=5, self_test=1, expert_rate=0.5),
    )
