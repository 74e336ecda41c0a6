"""The layout as contracts."""

import subprocess
import sys
from pathlib import Path

from conftest import CHECKOUT


def test_imports_point_one_way_and_the_library_knows_no_orchestrator():
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_only_their_owners_import_mlflow_and_dvc():
    users = {"mlflow": set(), "dvc": set()}
    for path in [p for package in ("data", "models", "tasks", "flows") for p in (CHECKOUT / package).rglob("*.py")]:
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("import", "from"):
                top = words[1].split(".")[0].split("_")[0]
                if top in users:
                    users[top].add(path.name)
    assert all(name.startswith("tracking") for name in users["mlflow"]), users["mlflow"]
    assert users["dvc"] == {"versioning.py"}


def test_the_lock_is_hashed_and_names_no_index():
    lines = (CHECKOUT / "requirements.lock").read_text().splitlines()
    assert not [line for line in lines if line.lstrip().startswith(("--index", "--extra-index", "--find-links"))]
    assert not [line for line in lines if "://" in line]
    pinned = [line for line in lines if "==" in line and not line.startswith((" ", "#"))]
    assert len(pinned) > 200 and all(line.endswith("\\") for line in pinned)
