"""The training set: which batches, which episodes of them are held out, the statistics of the rest."""

import json
from typing import TYPE_CHECKING

from data.refs import Ref
from data.store import Build
from tasks.recipe import Recipe, jsonable
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from data.training_set import TrainingSet

FILE = "dataset.json"


def aggregate_batches(recipe: Recipe, batches: list[Ref], *, failures: bool | None = None) -> Ref:
    """One list of all batches; nothing is copied. `failures` overrides the recipe's: a critic learns from them too."""
    params = jsonable(recipe.dataset) | ({} if failures is None else {"failures": failures})
    del params["sources"]  # they are among the batches
    return ensure("dataset", params, batches, label=f"{len(batches)} batches")


def aggregate_members(build: Build, work: Work) -> None:
    """The body of the `dataset` stage."""
    from data.training_set import aggregate

    whole = aggregate(work.inputs.parents, **work.params)
    (build.out / FILE).write_text(json.dumps(whole.to_json(), indent=1, sort_keys=True))


def read_set(ref: Ref) -> "TrainingSet":
    """What `aggregate_members` wrote."""
    from data.training_set import TrainingSet

    return TrainingSet.from_json(json.loads((ref.dir / FILE).read_text()))
