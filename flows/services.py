"""Prefect's server and worker and MLflow's pages on this machine: started on first use, kept, ended by one command.

ensure_server()   every flow calls it; one server per checkout, found again by the next command
up()              server, work pool, deployments of prefect.yaml, worker, heartbeat automation, MLflow's pages
down()            ends what these started, and nothing else
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from data.errors import BadInput
from data.paths import state_dir
from flows import environment, processes
from flows.processes import Service
from tasks.progress import console

SERVICES = {"server": "Prefect's pages", "mlflow": "MLflow's pages", "worker": "Prefect's worker"}  # in order of start
POOL = "flywheel"
AUTOMATION = "flywheel: a run without heartbeat has crashed"
HEARTBEAT_LIMIT_S = 90  # three heartbeats
START_LIMIT_S = 180.0  # a busy machine needs a minute for what an idle one does in fifteen seconds
PREFECT_YAML = Path(__file__).resolve().parents[1] / "prefect.yaml"


def ensure_server() -> str:
    """The address of a Prefect API that answers, also left in PREFECT_API_URL. Starts a server if none of ours runs.

    A PREFECT_API_URL the user has set is used as it is. BadInput if a server does not answer.
    """
    environment.prepare()
    if url := _users_server():
        if not processes.answers(f"{url}/health"):
            raise BadInput(f"PREFECT_API_URL={url} does not answer; start that server, or unset it to get a local one")
        return url
    with _one_at_a_time("server"):
        server = _running_server()
        _use((server or _start_server()).url)
        if server is None:
            _ensure_automation()
    return os.environ["PREFECT_API_URL"]


def up(prefect_yaml: Path = PREFECT_YAML) -> list[str]:
    """Everything that works at night while nobody is there; lines that say what runs. Repeating it is harmless."""
    api = ensure_server()
    with _one_at_a_time("up"):
        _ensure_mlflow_pages()
        with _prefect_errors_told(api):
            _ensure_pool()
            _ensure_automation()
            _deploy(prefect_yaml)
            _ensure_worker(api)
    return _lines()


def down() -> list[str]:
    """End what was started: the worker with the runs it has begun, then the servers. Lines that say what was ended."""
    ended = []
    for name in reversed(SERVICES):
        if service := processes.recorded(name):
            ended += [f"{SERVICES[name]:<16} ended"] if service.alive else []
            with console.status(f"ending {name}"):
                processes.stop(service)
            if os.environ.get("PREFECT_API_URL") == service.url:
                del os.environ["PREFECT_API_URL"]
    return ended or ["nothing was running"]


def status() -> dict[str, str]:
    """Of each service of ours, where its page is and who it is, or "not running"."""
    return {name: _describe(processes.recorded(name)) for name in SERVICES}


def _lines() -> list[str]:
    return [f"{SERVICES[name]:<16} {text}" for name, text in status().items()]


def _describe(service: Service | None) -> str:
    if service is None or not service.alive:
        return "not running"
    page = "takes runs" if service.name == "worker" else service.url.removesuffix("/api")
    return f"{page} (pid {service.pid}, log {service.log})"


# -- Prefect's server --------------------------------------------------------------------------------------------------


def _users_server() -> str | None:
    """PREFECT_API_URL, unless it was us who set it."""
    url = os.environ.get("PREFECT_API_URL")
    return url if url and url != os.environ.get("FLYWHEEL_API_URL") else None


def _use(url: str) -> None:
    os.environ["PREFECT_API_URL"] = os.environ["FLYWHEEL_API_URL"] = url
    if "prefect" in sys.modules:  # it has read its settings already
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _running_server() -> Service | None:
    """The server that was started before, if it lives and answers. One that lives and does not is ended."""
    server = processes.recorded("server")
    if server is None or not server.alive:
        return None
    if not processes.wait_until_it_answers(server, "/health", 60):
        processes.stop(server)
        return None
    return server


def _start_server() -> Service:
    last = processes.recorded("server")
    port = processes.free_port(last.port if last else int(os.environ.get("PREFECT_SERVER_API_PORT", "4200")))
    api = f"http://127.0.0.1:{port}/api"
    settings = {"PREFECT_UI_API_URL": api, "PREFECT_SERVER_API_PORT": str(port), **_LOGGED}
    command = [*_python("prefect"), "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    console.print("starting the Prefect server, which stays (`flywheel down` ends it)")
    with console.status("about 15 s"):
        server = processes.start("server", command, environment=settings, url=api)
        ready = processes.wait_until_it_answers(server, "/health", START_LIMIT_S)
    if not ready:
        processes.stop(server)
        raise BadInput(f"the Prefect server does not start: {processes.last_words(server)!r}; see {server.log}")
    return server


_LOGGED = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"}  # their console is a file


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


@contextmanager
def _one_at_a_time(what: str) -> Iterator[None]:
    """Two commands that need a service at the same moment start one."""
    (state_dir() / "services").mkdir(parents=True, exist_ok=True)
    with (state_dir() / "services" / f"{what}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- what `up` adds ----------------------------------------------------------------------------------------------------


def _ensure_pool() -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))


def _ensure_automation() -> None:
    """A run whose process was killed sends no more heartbeats; without this it would be RUNNING for ever."""
    from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.objects import StateType

    with get_client(sync_client=True) as client:
        known = client.request("POST", "/automations/filter", json={"limit": 200}).json()
    if any(automation["name"] == AUTOMATION for automation in known):
        return
    quiet = ("Completed", "Failed", "Cancelled", "Crashed", "Paused", "Suspended")  # no heartbeats are due
    trigger = EventTrigger(
        after={"prefect.flow-run.heartbeat"},
        expect={f"prefect.flow-run.{event}" for event in ("heartbeat", *quiet)},
        match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=HEARTBEAT_LIMIT_S),
    )
    message = f"no heartbeat for {HEARTBEAT_LIMIT_S} s: its process is gone"
    crash = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)
    Automation(name=AUTOMATION, trigger=trigger, actions=[crash]).create()


def _deploy(prefect_yaml: Path) -> None:
    command = [*_python("prefect"), "--no-prompt", "deploy", "--all", "--prefect-file", str(prefect_yaml)]
    with console.status("deploying the flows"):
        done = subprocess.run(command, cwd=prefect_yaml.parent, capture_output=True, text=True)
    if done.returncode:
        log = state_dir() / "logs" / "deploy.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stdout + done.stderr)
        raise BadInput(f"{prefect_yaml}: Prefect does not take these deployments; it says why in {log}")


def _ensure_worker(api: str) -> None:
    worker = processes.recorded("worker")
    if worker and worker.alive and worker.url == api:
        return
    if worker:
        processes.stop(worker)
    begun = datetime.now(UTC)
    command = [*_python("prefect"), "worker", "start", "--pool", POOL, "--type", "process", "--name", "local"]
    worker = processes.start("worker", [*command, "--install-policy", "never"], environment=_LOGGED, url=api)
    deadline = time.monotonic() + START_LIMIT_S
    with console.status("starting the worker"):
        while not _worker_reports_since(begun):
            if not worker.alive or time.monotonic() > deadline:
                raise BadInput(f"the worker does not start: {processes.last_words(worker)!r}; see {worker.log}")
            time.sleep(0.5)


def _worker_reports_since(begun: datetime) -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return any(
            worker.last_heartbeat_time and worker.last_heartbeat_time >= begun
            for worker in client.read_workers_for_work_pool(POOL)
        )


def _ensure_mlflow_pages() -> None:
    """Pages over the SQLite file; a server named by MLFLOW_TRACKING_URI has its own. Not waited for: 30 s."""
    from tasks.tracking_client import home, make_schema, uri

    pages = processes.recorded("mlflow")
    if not uri().startswith("sqlite") or (pages and pages.alive):
        return
    with console.status("preparing MLflow's database"):
        make_schema()
    port = processes.free_port(pages.port if pages else 5000)
    command = [*_python("mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", uri(), "--artifacts-destination", str(home() / "artifacts")]
    no_jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # they serve its language-model features
    processes.start("mlflow", [*command, *store], environment=no_jobs, url=f"http://127.0.0.1:{port}")


@contextmanager
def _prefect_errors_told(api: str) -> Iterator[None]:
    """What Prefect's client raises, as one line."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        raise BadInput(f"Prefect at {api} refuses {error.request.url.path}: {error.response.text[:80]!r}") from error
    except httpx.HTTPError as error:
        raise BadInput(
            f"Prefect at {api}: {type(error).__name__}; look at `flywheel status`, then `flywheel up`"
        ) from error
