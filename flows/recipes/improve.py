"""A night that improves: clone demonstrations of unequal skill, roll out, learn what was worth doing, do more of it."""

from data.sim.config import SimConfig
from models.config import ChunkPolicyConfig, CriticConfig, FitConfig, PolicyConfig
from tasks.recipe import Collect, Dataset, Evaluate, Improve, Recipe


def improve() -> Recipe:
    return Recipe(
        name="improve",
        about="place_in_bin cloned from good and bad demonstrations, then offline RL on rollouts of its own",
        model="improve-place-in-bin",
        sim=SimConfig(scene="place_in_bin", image_size=(64, 64)),
        # every sixth batch is of a demonstrator who mostly fails, and nobody says which
        collect=Collect(policy="oracle", noise=(0.1, 0.1, 0.1, 0.1, 0.1, 0.8), episodes=120, batch=20),
        dataset=Dataset(failures=True),
        policy=PolicyConfig(backbone="resnet", head="flow", backbone_options={"grid": 0}, shift=2),
        fit=FitConfig(steps=1000, batch_size=64, lr=1e-3, save_every=250),
        evaluate=Evaluate(episodes=200, replan=5),
        improve=Improve(
            episodes=300,
            critic=CriticConfig(backbone_options={"grid": 0}, shift=2),
            critic_fit=FitConfig(steps=1500, batch_size=64, lr=1e-3, save_every=250),
            policy_loss=ChunkPolicyConfig(beta=10.0, max_weight=20.0),
            fit=FitConfig(steps=1500, batch_size=64, lr=5e-4, save_every=250),
        ),
    )


def improve_debug() -> Recipe:
    """The cycle at its smallest: every stage for real, nothing learnt."""
    small = FitConfig(steps=8, batch_size=4, save_every=2, warmup_steps=2, threads=1)
    tiny = {"width": 16, "keypoints": 4, "grid": 0}
    return Recipe(
        name="improve-debug",
        about="the cycle of improvement at its smallest: 4 + 4 episodes, 8 steps, 3 seeds; learns nothing",
        model="debug-improve",
        workers=1,
        sim=SimConfig(scene="pick_cube", image_size=(32, 32), max_steps=30),
        collect=Collect(policy="oracle", noise=(0.1,), episodes=4, batch=4),
        policy=PolicyConfig(
            backbone="resnet", head="flow", backbone_options=tiny, head_options={"dim": 16, "steps": 2}
        ),
        fit=small,
        evaluate=Evaluate(episodes=3, replan=5, self_test=1, expert_rate=0.5, best_of=2),
        improve=Improve(
            episodes=4,
            batch=2,
            critic=CriticConfig(backbone_options=tiny, width=16, layers=1),
            critic_fit=small,
            policy_loss=ChunkPolicyConfig(beta=10.0),
            fit=small,
        ),
    )
