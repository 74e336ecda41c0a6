"""Every test works in a root of its own: no test touches the checkout's store, databases or servers."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from data.paths import root, state_dir

CHECKOUT = root()
DRIVER = state_dir() / "vulkan"


def new_root(folder: Path) -> Path:
    """Make `folder` a root, sharing the checkout's unpacked Vulkan driver."""
    (folder / ".flywheel").mkdir(parents=True, exist_ok=True)
    if DRIVER.exists():
        (folder / ".flywheel" / "vulkan").symlink_to(DRIVER)
    return folder


ROOT = new_root(Path(tempfile.mkdtemp(prefix="flywheel-tests-")))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)
os.environ["FLYWHEEL_ROOT"] = str(ROOT)

from flows.environment import prepare  # noqa: E402 (it reads the root set above)

prepare()


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory) -> Path:
    """A folder with MLflow's tables and nothing in them: making them takes seconds, copying them does not."""
    from tasks import tracking_client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(tmp_path_factory.mktemp("mlflow")))
        tracking_client.make_schema()
        return tracking_client.home()
