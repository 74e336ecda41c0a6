"""Where things lie: one root, one store of artefacts, one folder of machine state.

`FLYWHEEL_ROOT` moves all of it (tests do); by default it is the checkout that holds this file.
"""

import os
from pathlib import Path


def root() -> Path:
    """The project's root: `$FLYWHEEL_ROOT`, or the checkout this file lies in."""
    return Path(os.environ.get("FLYWHEEL_ROOT") or Path(__file__).resolve().parents[1])


def store_dir() -> Path:
    """Artefacts: content-keyed, immutable, rebuildable."""
    return root() / "store"


def state_dir() -> Path:
    """State of this machine: Prefect's and MLflow's databases, logs, the unpacked Vulkan driver."""
    return root() / ".flywheel"
