"""Two policies on the same unseen seeds: who is better, and how sure that is."""

import json
from typing import Any

from data.refs import Ref
from data.store import Build
from tasks.evaluate import read_score
from tasks.nights import phase_run
from tasks.stages import Work, ensure

COMPARISON = "comparison.json"


def compare(before: Ref, after: Ref) -> Ref:
    """The scores of two `evaluate` artefacts, seed by seed."""
    return ensure("compare", {}, [before, after], label="paired seeds")


def read_comparison(ref: Ref) -> dict[str, Any]:
    """What `compare_scores` wrote."""
    return json.loads((ref.dir / COMPARISON).read_text())


def compare_scores(build: Build, work: Work) -> None:
    """The body of the `compare` stage."""
    from models.evaluation import Score, paired_comparison

    before, after = (Score.from_json(read_score(ref)["score"]) for ref in work.inputs.parents)
    found = paired_comparison(before, after)
    result = {"gain_points": 100 * found.difference, **found.to_json()}
    (build.out / COMPARISON).write_text(json.dumps(result, indent=1, sort_keys=True))
    with phase_run(work) as run:
        run.log(0, {"gain_points": result["gain_points"], "p_value": found.p_value})
