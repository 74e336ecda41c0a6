"""Run a flow from the command line: a server that is there, a line per stage, a summary at the end."""

import json
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import BadInput
from data.paths import root
from data.registry import did_you_mean
from data.sim.registry import SCENES
from flows.recipes import load
from models.registry import BACKBONES, modules
from tasks.actors import artefact_in, starting_point, who_acts
from tasks.adopt import refuse_malformed
from tasks.progress import console
from tasks.promote import commit
from tasks.recipe import jsonable
from tasks.stages import STAGES, Outcome, Session, session

if TYPE_CHECKING:
    from flows.cli import Arguments
    from tasks.recipe import Recipe

MODULES = {"nightly": "flows.nightly", "collect": "flows.collect", "dataset": "flows.dataset",
           "train": "flows.train", "evaluate": "flows.evaluation", "compare": "flows.compare"}  # fmt: skip


def run(flow: str, asked: "Arguments") -> dict[str, Any]:
    """Run `flow` in this process against the local Prefect server. Returns its summary."""
    started = time.monotonic()
    refuse_unknown(asked)
    console.print(f"flywheel {flow} {' '.join(asked.recipes or [asked.recipe])}", style="bold")
    import_module("flows.services").ensure_server()
    flow_function = getattr(import_module(MODULES[flow]), flow)
    reporter = _Reporter()
    current = Session(force=frozenset(asked.force), resume=asked.resume, on_outcome=reporter.outcome)
    with session(current):
        summary = flow_function(**_parameters(flow, asked))
    reporter.close()
    summary |= {"seconds": round(time.monotonic() - started, 1)}
    import_module("flows.report").show(summary)
    return summary


def record(summary: dict[str, Any], file: str) -> None:
    """Write `summary` and the commit it was made by to `file`."""
    path = Path(file)
    if not path.parent.is_dir():
        raise BadInput(f"--record {file}: {path.parent} is no folder; make it first")
    text = json.dumps({**summary, "commit": commit()}, indent=1, sort_keys=True)
    path.write_text(text.replace(f"{root()}/", "") + "\n")


def refuse_unknown(asked: "Arguments") -> None:
    """Refuse what is wrong with the request before anything is started."""
    if asked.several and len(asked.recipes) < 2:
        raise BadInput("compare needs two recipes or more, e.g. `flywheel compare act flow_dit`")
    for stage in asked.force:
        if stage not in STAGES:
            raise BadInput(f"--force {stage}: unknown stage{did_you_mean(stage, STAGES)}")
    for name in asked.recipes or [asked.recipe]:
        _refuse_unknown_parts(load(name, asked.overrides))


def _refuse_unknown_parts(recipe: "Recipe") -> None:
    for scene in recipe.scenes:
        SCENES.module(scene)
    modules(jsonable(recipe.policy))
    if recipe.improve:
        BACKBONES.module(recipe.improve.critic.backbone)
    if recipe.represent and recipe.represent.start:
        artefact_in(recipe.represent.start, "represent.start", made_by="jepa")
    who_acts(recipe, night=1)
    if recipe.improve and recipe.improve.start != "champion":
        starting_point(recipe)
    refuse_malformed(recipe)


def explain(flow: str, asked: "Arguments") -> None:
    """Say of every unit of work whether it is intact or why it is stale. Runs nothing."""
    refuse_unknown(asked)
    module = import_module(MODULES[flow])
    current = Session(force=frozenset(asked.force), dry=True)
    with session(current):
        getattr(module, flow).fn(**_parameters(flow, asked))
    for outcome in current.outcomes:
        mark = "intact" if outcome.cached else "stale "
        print(f"{mark}  {outcome.stage:<9} {outcome.label:<28} {'' if outcome.cached else outcome.why}".rstrip())
    stale = sum(not o.cached for o in current.outcomes)
    print(f"{stale} of {len(current.outcomes)} to do" if stale else "nothing to do")


def _parameters(flow: str, asked: "Arguments") -> dict[str, Any]:
    recipes = {"recipes": asked.recipes} if flow == "compare" else {"recipe": asked.recipe}
    parameters: dict[str, Any] = recipes | {"overrides": asked.overrides}
    if asked.another_night and flow != "nightly":
        raise BadInput(f"--another-night belongs to nightly; with {flow} write --collect.nights N")
    return parameters | ({"another_night": True} if asked.another_night else {})


class _Reporter:
    """A line per unit that ran, with the reason; units that were cached are counted, a line per stage."""

    def __init__(self) -> None:
        self.stage, self.cached = "", 0

    def outcome(self, outcome: Outcome) -> None:
        if outcome.stage != self.stage:
            self.close()
            self.stage = outcome.stage
        if outcome.cached:
            self.cached += 1
        else:
            text = f"{outcome.label:<28} {outcome.seconds:6.1f} s   {outcome.why}"
            console.print(f"  {outcome.stage:<9} {text}", markup=False, soft_wrap=True)

    def close(self) -> None:
        if self.cached:
            console.print(f"  {self.stage:<9} {self.cached} cached", markup=False)
        self.cached = 0
