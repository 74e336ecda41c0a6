"""StateVLA: an encoder learns by foretelling its own next state, then a policy acts by what it says."""

from data.sim.config import SimConfig
from models.config import FitConfig, JepaConfig, PolicyConfig
from tasks.recipe import Collect, Dataset, Evaluate, Recipe, Represent


def statevla() -> Recipe:
    return Recipe(
        name="statevla",
        about="pick_cube by end-effector deltas: a Mamba encoder by temporal JEPA, a flow-matching policy on it",
        model="statevla-pick-cube",
        sim=SimConfig(scene="pick_cube", image_size=(64, 64), control_mode="delta_ee_pose"),
        collect=Collect(policy="oracle", noise=(0.1,), episodes=500, batch=20),
        dataset=Dataset(held_out=0.1),  # the encoder is chosen by them
        policy=PolicyConfig(
            backbone="statevla",
            backbone_options={"preset": "small"},
            head="statevla",
            head_options={"preset": "small", "gripper": -1, "draws": 1},
            normalization="mean_std_signs",
            shift=0,
        ),
        # the published weights (0.04, 0.996) are for a million steps: in a thousand, features that say the same are
        # told apart too slowly to make room for the cube, and a target that keeps so much of itself holds z back
        represent=Represent(
            loss=JepaConfig(covariance=1.0, momentum=0.5),
            fit=FitConfig(steps=1500, batch_size=128, lr=1e-3, save_every=250),
        ),
        fit=FitConfig(steps=3000, batch_size=128, lr=1e-3, save_every=500),
        evaluate=Evaluate(episodes=50, replan=5),
    )


def statevla_debug() -> Recipe:
    """Both phases at their smallest: every stage for real, nothing learnt."""
    small = FitConfig(steps=8, batch_size=4, save_every=2, warmup_steps=2, threads=1)
    return Recipe(
        name="statevla-debug",
        about="StateVLA's two phases at their smallest: 6 episodes, 8 steps each, 2 seeds; learns nothing",
        model="debug-statevla",
        workers=1,
        sim=SimConfig(scene="pick_cube", image_size=(32, 32), max_steps=30, control_mode="delta_ee_pose"),
        collect=Collect(policy="oracle", noise=(0.1,), episodes=6, batch=3),
        dataset=Dataset(held_out=0.5, failures=True),
        policy=PolicyConfig(
            backbone="statevla",
            backbone_options={"preset": "tiny"},
            head="statevla",
            head_options={"preset": "tiny", "gripper": -1},
            normalization="mean_std_signs",
            shift=1,
        ),
        represent=Represent(loss=JepaConfig(hidden=16), fit=small),
        fit=small,
        evaluate=Evaluate(episodes=2, replan=5, self_test=1, expert_rate=0.5),
    )
