"""The demo: pick a cube up, from pixels and proprioception, learnt on a laptop in minutes."""

from data.sim.config import SimConfig
from models.config import FitConfig, PolicyConfig
from tasks.recipe import Collect, Evaluate, Recipe


def demo() -> Recipe:
    return Recipe(
        name="demo",
        about="pick_cube from two 64-pixel cameras, cloned from 200 demonstrations; about 8 minutes on two cores",
        model="demo-pick-cube",
        sim=SimConfig(scene="pick_cube", image_size=(64, 64)),
        collect=Collect(policy="oracle", noise=(0.1,), episodes=200, batch=20),
        policy=PolicyConfig(backbone="resnet", head="act", backbone_options={"grid": 0}, shift=2),
        fit=FitConfig(steps=1500, batch_size=64, lr=1e-3, save_every=250),
        evaluate=Evaluate(episodes=50, replan=5),
    )
