"""The night through its real fronts: the command line with a Prefect server, and DVC, over one store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CHECKOUT, new_root

from flows.dvc_front import dvc_yaml
from tasks.versioning import dvc_digest

pytestmark = pytest.mark.timeout(900)
UNITS = 9  # of the debug recipe: 2 batches x (collect, frames, chunks), dataset, train, evaluate


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, empty_mlflow) -> Path:
    """A copy of this checkout's files, as a git repository of its own."""
    copy = tmp_path_factory.mktemp("copy") / "checkout"
    named = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in named.stdout.splitlines():
        if (CHECKOUT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(CHECKOUT / name, copy / name)
    new_root(copy)
    shutil.copytree(empty_mlflow, copy / ".flywheel" / "mlflow")
    (copy / "params.yaml").write_text("recipe: debug\noverrides: {}\n")
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    yield copy
    flywheel(copy, "down")


def run(checkout: Path, *command: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DVC_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = kept | {"FLYWHEEL_ROOT": str(checkout), "PYTHONPATH": str(checkout), "PATH": path}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def flywheel(checkout: Path, *words: str) -> str:
    return run(checkout, sys.executable, "-m", "flows.cli", *words)


@pytest.fixture(scope="module")
def first(checkout) -> dict:
    return json.loads(flywheel(checkout, "nightly", "debug", "--json").splitlines()[-1])


def test_a_night_registers_a_scored_champion(first, checkout):
    assert (first["tasks_run"], first["tasks_cached"]) == (UNITS, 0)
    assert first["episodes"] == 2 and len(first["seeds"]) == 2 and min(first["seeds"]) >= 1_000_000
    low, high = first["interval"]
    assert 0 <= low <= first["success"] <= high <= 1
    assert first["model_version"] == 1 and set(first["aliases"]) == {"challenger", "champion"}
    for what in ("video", "plot", "checkpoint", "dataset"):
        assert Path(first[what]).exists()
    assert first["seconds"] > 0


def test_a_second_night_of_the_same_does_nothing_and_registers_nothing(first, checkout):
    again = json.loads(flywheel(checkout, "nightly", "debug", "--json").splitlines()[-1])
    assert (again["tasks_run"], again["tasks_cached"]) == (0, UNITS)
    same = ("dataset_digest", "checkpoint_digest", "score_digest", "model_version", "aliases", "success")
    assert {k: again[k] for k in same} == {k: first[k] for k in same}
    assert flywheel(checkout, "nightly", "debug", "--explain").splitlines()[-1] == "nothing to do"


def test_explain_names_the_parameter(first, checkout):
    told = flywheel(checkout, "nightly", "debug", "--explain", "--fit.lr", "0.5").splitlines()
    stale = [line for line in told if line.startswith("stale")]
    assert [line.split()[1] for line in stale] == ["train", "evaluate"]
    assert "fit.lr 0.0003 -> 0.5" in stale[0]


def test_dvc_repro_makes_the_same_artefacts_and_no_new_ones(first, checkout):
    before = sorted(p.parent.name for p in (checkout / "store/objects").glob("*/*/manifest.json"))
    run(checkout, sys.executable, "-m", "dvc", "repro", "-q")
    assert sorted(p.parent.name for p in (checkout / "store/objects").glob("*/*/manifest.json")) == before
    made = checkout / "store/dvc/train" / Path(first["checkpoint"]).name
    assert (made / "ema.safetensors").read_bytes() == (Path(first["checkpoint"]) / "ema.safetensors").read_bytes()
    locked = yaml.safe_load((checkout / "dvc.lock").read_text())["stages"]["evaluate"]["outs"][0]
    assert locked["md5"] == dvc_digest(checkout / "store/dvc/evaluate")
    assert "up to date" in run(checkout, sys.executable, "-m", "dvc", "status")


def test_dvc_yaml_is_what_the_stage_table_says():
    assert (CHECKOUT / "dvc.yaml").read_text() == dvc_yaml()
