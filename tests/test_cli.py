"""The command line: bad input is one line and exit code 2, help is quick, every recipe field can be overridden."""

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest

from data.errors import BadInput
from flows.cli import main, parse
from flows.help import comments
from flows.recipes import RECIPES, load
from tasks.recipe import options, rebuild


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nightli"], "did you mean 'nightly'"),
        (["nightly", "dmeo"], "did you mean 'demo'"),
        (["nightly", "demo", "--fit.stepz", "3"], "did you mean 'fit.steps'"),
        (["nightly", "demo", "--fit.steps", "many"], "fit.steps"),
        (["nightly", "demo", "--fit.steps"], "needs a value"),
        (["nightly", "demo", "--fit.steps", "0"], "at least 1"),
        (["nightly", "demo", "--sim.scene", "pick_cub"], "did you mean 'pick_cube'"),
        (["nightly", "demo", "--policy.head", "flaw"], "did you mean 'flow'"),
        (["nightly", "demo", "--policy.backbone", "resent"], "did you mean 'resnet'"),
        (["nightly", "demo", "--chunks.reward_mode", "counts"], "did you mean 'count'"),
        (["nightly", "demo", "--evaluate.first_seed", "100"], "collected"),
        (["nightly", "demo", "--collect.policy", "oracel"], "did you mean 'oracle'"),
        (["nightly", "demo", "--evaluate.best_of", "4"], "which only `improve` makes"),
        (["nightly", "improve", "--improve.critic.backbone", "resent"], "did you mean 'resnet'"),
        (["nightly", "improve", "--improve.critic_loss.expectile", "1.5"], "between 0 and 1"),
        (["nightly", "improve", "--improve.start", "nowhere"], "no checkpoint artefact"),
        (["nightly", "demo", "--force", "trian"], "did you mean 'train'"),
        (["stage", "trian", "demo"], "did you mean 'train'"),
        (["down", "--jsn"], "unknown option"),
    ],
)
def test_bad_input_is_one_line_with_a_remedy_and_exit_code_2(words, said, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("flywheel:")]
    assert out == "" and len(lines) == 1 and err.splitlines()[-1] == lines[0]
    assert said in lines[0] and len(lines[0]) < 250


def test_every_field_of_every_recipe_can_be_overridden_by_its_own_value():
    for name in RECIPES:
        recipe = load(name)
        for option, value in options(recipe).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert options(load(name, [f"{option}={value}"]))[option] == value
        assert rebuild(type(recipe), recipe.to_json()) == recipe


def test_overrides_are_typed():
    recipe = load(
        "demo", ["fit.lr=1e-4", "collect.scenes=reach,push_cube", "dataset.failures=true", "policy.head=flow"]
    )
    assert recipe.fit.lr == 1e-4 and recipe.scenes == ("reach", "push_cube")
    assert recipe.dataset.failures is True and recipe.policy.head == "flow"
    assert load("demo", ["policy.head_options.dim=64"]).policy.head_options["dim"] == 64


def test_parse_reads_flags_and_values_in_any_order():
    asked = parse(["debug", "--json", "--fit.lr=1", "--force", "train", "--no-resume", "--fit.steps", "3"])
    assert (asked.recipe, asked.json, asked.resume, asked.force) == ("debug", True, False, ["train"])
    assert asked.overrides == ["fit.lr=1", "fit.steps=3"]
    with pytest.raises(BadInput, match="unexpected argument"):
        parse(["debug", "demo"])


def test_help_shows_every_option_with_default_and_meaning_and_imports_nothing_heavy():
    code = (
        "import sys; from flows.cli import main; main(['nightly', 'demo', '--help']);"
        "print(sorted({'torch', 'prefect', 'mlflow', 'sapien', 'polars', 'lerobot', 'gymnasium'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"}
    )
    *shown, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    for option, value in options(load("demo")).items():
        part = option.partition(".")[2]
        if part:
            line = next((line for line in shown if line.strip().startswith(f"--{option} ")), "")
            assert line, f"{option} is not shown"
            if isinstance(value, str | float):
                assert str(value) in line
    assert any("collect.noise" in line and "action units" in line for line in shown)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_option_says_what_it_is(name):
    def undescribed(part) -> list[str]:
        said = comments(type(part))
        nested = [getattr(part, f.name) for f in fields(part) if is_dataclass(getattr(part, f.name))]
        leaves = [f.name for f in fields(part) if not is_dataclass(getattr(part, f.name))]
        return [leaf for leaf in leaves if not said.get(leaf)] + [leaf for n in nested for leaf in undescribed(n)]

    assert undescribed(load(name)) == []
