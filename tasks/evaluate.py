"""Evaluation: success on unseen seeds under a protocol whose hash stands on the score."""

import json
from dataclasses import replace
from typing import Any

from data.refs import Ref
from data.sim.registry import SCENES
from data.store import Build
from tasks.actors import acting_code
from tasks.critic import CRITIC
from tasks.dataset import read_set
from tasks.nights import phase_run
from tasks.progress import progress
from tasks.recipe import Recipe, jsonable, rebuild
from tasks.stages import Work, ensure

SCORE, VIDEO, PLOT = "score.json", "episodes.mp4", "score.png"


def evaluate_checkpoint(recipe: Recipe, checkpoint: Ref, dataset: Ref, critic: Ref | None = None) -> Ref:
    """The checkpoint's score on the recipe's unseen seeds; with a critic, `evaluate.best_of` proposals ranked by it."""
    asked = jsonable(recipe.evaluate if critic else replace(recipe.evaluate, best_of=1))
    ranked = [critic] if critic and recipe.evaluate.best_of > 1 else []
    return ensure(
        "evaluate",
        {"sim": jsonable(recipe.sim), "evaluate": asked},
        [checkpoint, dataset, *ranked],
        label=f"{recipe.sim.scene} {recipe.evaluate.episodes} unseen seeds",
        parts=(SCENES.module(recipe.sim.scene), *acting_code(jsonable(recipe.policy))),
        execution={"workers": recipe.workers},
    )


def read_score(ref: Ref) -> dict[str, Any]:
    """What `score_policy` wrote: the score, the held-out action error, the self-test, the protocol."""
    return json.loads((ref.dir / SCORE).read_text())


def score_policy(build: Build, work: Work) -> None:
    """The body of the `evaluate` stage."""
    from data.protocol import EvalProtocol
    from data.sim.config import SimConfig
    from models.acting import acting_policy
    from models.evaluation import evaluate, self_test
    from models.pictures import plot

    config, asked = rebuild(SimConfig, work.params["sim"]), work.params["evaluate"]
    seeds = range(asked["first_seed"], asked["first_seed"] + asked["episodes"])
    protocol = EvalProtocol.of(config, seeds, replan=asked["replan"], temporal_ensemble=asked["ensemble"])
    checkpoint, whole = work.upstream("train")[0], read_set(work.upstream("dataset")[0])
    protocol.refuse_collected(whole.collected)
    critic = next((ref.dir / CRITIC for ref in work.upstream("critic")), None)
    policy = acting_policy(checkpoint.dir, checkpoint.digest, config.schema(), critic=critic, best_of=asked["best_of"])
    workers = work.execution["workers"]
    with phase_run(work) as run:
        tested = self_test(
            config, protocol, seeds[: asked["self_test"]], expert_rate=asked["expert_rate"], num_envs=workers
        )
        with progress(work.label, len(seeds) * protocol.max_steps, "steps at most") as advance:
            score = evaluate(config, policy, protocol, num_envs=workers, video=build.out / VIDEO, on_step=advance)
        errors = _held_out_error(policy, whole, protocol, asked["samples"])
        plot(score, build.out / PLOT, action_error=errors.get("absolute"))
        result = {
            "score": score.to_json(),
            "action_error": errors,
            "self_test": tested.to_json(),
            "protocol": protocol.to_json(),
        }
        (build.out / SCORE).write_text(json.dumps(result, indent=1, sort_keys=True))
        low, high = score.interval
        run.log(0, {"success_rate": score.success_rate, "success_low": low, "success_high": high})
        run.log(0, {f"subgoal.{name}": rate for name, rate in score.subgoals.items()})


def _held_out_error(policy: Any, whole: Any, protocol: Any, samples: int) -> dict[str, dict[str, float]]:
    """Mean absolute and squared error per action component on the held-out episodes; empty when none is held out."""
    from models.evaluation import action_error

    episodes = [dataset.read_episode(i) for dataset, i in whole.held_out()]
    if not episodes:
        return {}
    error = action_error(
        policy, episodes, replan=protocol.replan, temporal_ensemble=protocol.temporal_ensemble, samples=samples
    )
    return {
        kind: {c.name: round(float(e), 6) for c, e in zip(whole.schema.action, values, strict=True)}
        for kind, values in (("absolute", error.absolute), ("squared", error.squared))
    }
