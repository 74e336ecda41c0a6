"""Recipes side by side, at their smallest: one data set, one protocol, one row each."""

import shutil
from dataclasses import replace

import pytest
from conftest import new_root

from data.errors import BadInput
from data.store import Store
from flows import compare as comparing
from flows.recipes import RECIPES
from flows.recipes.debug import debug
from flows.report import show
from tasks import tracking_client
from tasks.recipe import Recipe
from tasks.stages import Session, session


def flowing() -> Recipe:
    recipe = debug()
    policy = replace(recipe.policy, head="flow", head_options={"dim": 16, "steps": 2})
    return replace(recipe, name="flowing", policy=policy)


def hurried() -> Recipe:
    return replace(flowing(), name="hurried", fit=replace(flowing().fit, steps=4))


@pytest.fixture(scope="module")
def world(tmp_path_factory, empty_mlflow):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(new_root(tmp_path_factory.mktemp("compared"))))
        for recipe in (flowing, hurried):
            patch.setitem(RECIPES.table, recipe.__name__, f"{__name__}:{recipe.__name__}")
        shutil.copytree(empty_mlflow, tracking_client.home(), dirs_exist_ok=True)
        yield


@pytest.fixture(scope="module")
def compared(world) -> tuple[Session, dict]:
    with session(Session()) as current:
        return current, comparing.compare.fn(["debug", "flowing"])


def test_each_recipe_has_a_row_and_the_best_is_first(compared):
    _, summary = compared
    rows = summary["rows"]
    assert {row["recipe"]: row["policy"] for row in rows} == {"debug": "resnet + act", "flowing": "resnet + flow"}
    assert rows[0]["success"] >= rows[1]["success"] and "p_value" not in rows[0]
    assert 0 < rows[1]["p_value"] <= 1
    assert rows[0]["protocol"] == rows[1]["protocol"]
    assert all(row["interval"][0] <= row["success"] <= row["interval"][1] for row in rows)


def test_what_a_policy_costs_is_measured_here(compared):
    _, summary = compared
    for row in summary["rows"]:
        assert row["parameters"] == row["trained"] > 1000
        assert row["samples_per_s"] > 0 and row["chunk_ms"] > 0 and row["peak_mb"] >= 0


def test_all_learn_from_one_training_set(compared):
    current, summary = compared
    trained = {o.ref.key: o.ref for o in current.outcomes if o.stage == "train"}
    assert len(trained) == 2
    parents = [{p["digest"] for p in Store().manifest(ref)["parents"]} for ref in trained.values()]
    assert parents[0] == parents[1] and summary["dataset_digest"] in parents[0]


def test_the_table_says_it_all(compared, capsys):
    _, summary = compared
    show(summary | {"seconds": 1.0})
    said = capsys.readouterr()
    assert all(word in said.out + said.err for word in ("debug", "flowing", "ms/chunk", "8 steps of 4"))


def test_recipes_that_differ_by_more_than_the_policy_are_refused(world):
    with pytest.raises(BadInput, match=r"debug and hurried differ in budget; override fit.steps and fit.batch_size"):
        comparing.compare.fn(["debug", "hurried"])
    with pytest.raises(BadInput, match="debug and demo differ in sim, not only in the policy"):
        comparing.compare.fn(["debug", "demo"])
