"""The whole line at its smallest, for real: killed, resumed, damaged, changed."""

import shutil
from pathlib import Path

import pytest
from conftest import new_root
from line import delays, digests, in_child

KILLS = 12


@pytest.fixture(scope="module")
def new(empty_mlflow, tmp_path_factory):
    """Makes roots: nothing in the store, MLflow's tables ready."""

    def make(name: str) -> Path:
        root = new_root(tmp_path_factory.mktemp(name))
        shutil.copytree(empty_mlflow, root / ".flywheel" / "mlflow")
        return root

    return make


@pytest.fixture(scope="module")
def reference(new) -> tuple[Path, list]:
    root = new("reference")
    outcomes = in_child(root)
    assert outcomes and not any(o.cached for o in outcomes)
    return root, outcomes


@pytest.fixture
def copy(reference, tmp_path) -> Path:
    shutil.copytree(reference[0], tmp_path / "root", symlinks=True)
    return tmp_path / "root"


def ran(outcomes: list) -> list[str]:
    return [o.stage for o in outcomes if not o.cached]


@pytest.mark.parametrize("recipe", ["debug", "statevla-debug"])
def test_killed_anywhere_it_goes_on_to_the_same_digests(recipe, reference, new):
    root = new("killed")
    undisturbed = reference[1] if recipe == "debug" else in_child(new("undisturbed"), recipe=recipe)
    longest = max(o.seconds for o in undisturbed)
    killed = 0
    for delay in delays(60, longest, seed=0):
        killed += in_child(root, recipe=recipe, kill_after=delay) is None
        if killed == KILLS:
            break
    assert killed >= 10, f"only {killed} kills came before the line was through"
    final = in_child(root, recipe=recipe)
    assert final and digests(final) == digests(undisturbed)
    assert not list((root / "store").rglob(".staging-*")), "half-made artefacts are left"


def test_a_second_run_does_nothing(copy):
    assert ran(in_child(copy)) == []


def test_another_learning_rate_trains_and_evaluates_anew_and_nothing_before(copy):
    assert ran(in_child(copy, overrides=["fit.lr=5e-4"])) == ["train", "evaluate"]


def test_another_night_adds_batches_and_redoes_none(copy):
    assert ran(in_child(copy, overrides=["collect.nights=2"])) == [
        *["collect"] * 2, *["frames"] * 2, *["chunks"] * 2, "dataset", "train", "evaluate",
    ]  # fmt: skip


@pytest.mark.parametrize("stage", ["collect", "frames", "chunks", "train", "evaluate"])
def test_a_damaged_file_is_noticed_and_only_its_artefact_made_again(copy, reference, stage):
    victim = next(o.ref for o in reference[1] if o.stage == stage)
    entry = copy / "store" / "objects" / stage / victim.key[:16]
    files = [p for p in entry.rglob("*") if p.is_file() and p.name != "manifest.json"]
    file = max(files, key=lambda p: p.stat().st_size)
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    outcomes = in_child(copy)
    assert ran(outcomes) == [stage]
    assert digests(outcomes) == digests(reference[1])
