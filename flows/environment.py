"""The environment every process of the flywheel runs in: quiet, private, and inside the project.

`prepare()` must run before prefect, mlflow, dvc or huggingface_hub is imported, because they read their settings at
import. It only fills in what the user has not set, and children inherit it.
"""

import os

from data.paths import root, state_dir


def defaults() -> dict[str, str]:
    """Every setting with the value it gets when the user has not chosen one."""
    return {
        "FLYWHEEL_ROOT": str(root()),  # children (worker, flow runs, DVC stages) work where their parent does
        # No tool phones home. Prefect's server does not ask DO_NOT_TRACK, and MLflow does not take 1 for true.
        "DO_NOT_TRACK": "true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",  # a missing local file is an error here, never a download
        # State stays in the project.
        "PREFECT_HOME": str(state_dir() / "prefect"),
        "DVC_SITE_CACHE_DIR": str(state_dir() / "dvc"),  # the default, /var/tmp/dvc, is shared by all of a machine
        # Threads that wait for each other by spinning make training six times slower as soon as anything else runs.
        "GOMP_SPINCOUNT": "1000",
        # Prefect: seconds for a server to start on a busy machine; between heartbeats of a flow run (its own default is
        # 180, which the 90 s limit of `flows.services` would take for death).
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # its page keeps everything; faults are told once, by us
        # MLflow: its defaults block a caller for 247 s when the server is gone.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout belongs to our summary
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }


def prepare() -> None:
    """Fill in the environment; what the user has set stays."""
    for name, value in defaults().items():
        os.environ.setdefault(name, value)
