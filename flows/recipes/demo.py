"""The demo: pick a cube up, from pixels and proprioception, learnt on a laptop in minutes."""

from data.sim.env import SimConfig
from models.config import FitConfig, PolicyConfig
from tasks.recipe import Collect, Evaluate, Recipe


def demo() -> Recipe:
    return Recipe(
        name="demo",
        about="pick_cube from two 64-pixel cameras: an expert's demonstrations, a small policy, about 15 minutes on a CPU",
        model="demo-pick-cube",
        sim=SimConfig(scene="pick_cube", image_size=(64, 64)),
        collect=Collect(policy="oracle", noise=0.1, episodes=200, batch=20),
        policy=PolicyConfig(backbone="resnet", head="act", backbone_options={"grid": 0}),
        fit=FitConfig(steps=2000, batch_size=64, lr=1e-3, save_every=250),
        evaluate=Evaluate(episodes=50, replan=5),
    )
