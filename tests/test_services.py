"""One real Prefect server and worker in a root of their own: found again, scheduled, ended without a trace."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from data.errors import BadInput
from flows import processes, services
from flows.environment import prepare

prepare()

DEPLOYMENTS = """
name: test
pull:
  - prefect.deployments.steps.set_working_directory: {directory: "{{ $FLYWHEEL_ROOT }}"}
deployments:
  - name: nightly
    entrypoint: tiny_flow_for_services:tiny
    parameters: {recipe: demo}
    work_pool: {name: flywheel, job_variables: {stream_output: false}}
    concurrency_limit: {limit: 1, collision_strategy: ENQUEUE}
    schedules: [{cron: "0 2 * * *", timezone: UTC}]
"""
FLOW = """
from pathlib import Path
from prefect import flow

@flow(name="tiny")
def tiny(recipe: str = "none"):
    Path("ran").write_text(f"{recipe} in {Path.cwd()}")
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A root with a server that two callers have asked for at once; what they were told, and what `up` said."""
    root = tmp_path_factory.mktemp("machine")
    (root / "prefect.yaml").write_text(DEPLOYMENTS)
    (root / "tiny_flow_for_services.py").write_text(FLOW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(root))
        patch.setenv("PREFECT_HOME", str(root / ".flywheel" / "prefect"))
        patch.setenv("PREFECT_SERVER_API_PORT", str(processes.free_port(4300)))
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        patch.setenv("PYTHONPATH", str(root))
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # has its own pages: none are started
        for name in ("PREFECT_API_URL", "FLYWHEEL_API_URL"):
            patch.setenv(name, "")
        with ThreadPoolExecutor(2) as pool:
            urls = list(pool.map(lambda _: services.ensure_server(), range(2)))
        try:
            yield root, urls, services.up(root / "prefect.yaml")
        finally:
            services.down()
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()


@pytest.fixture
def api(machine):
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


def post(client, path):
    return client.request("POST", path, json={}).json()


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def test_two_starters_make_one_server(machine):
    root, urls, _ = machine
    assert urls[0] == urls[1] == os.environ["PREFECT_API_URL"]
    mine = [p for p in psutil.Process().children(recursive=True) if "server" in p.cmdline() and "start" in p.cmdline()]
    assert len(mine) == 1
    assert (root / ".flywheel" / "prefect" / "prefect.db").exists()


def test_a_cron_schedule_really_schedules_a_run(api):
    """Nothing else catches an SQLAlchemy on which Prefect deploys happily and never schedules."""
    scheduled = until(lambda: [r for r in post(api, "/flow_runs/filter") if r["state_name"] == "Scheduled"], 60)
    assert scheduled
    assert scheduled[0]["expected_start_time"][11:19] == "02:00:00"


def test_the_nightly_waits_for_the_one_before(api):
    (deployment,) = post(api, "/deployments/filter")
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment["job_variables"] == {"stream_output": False}


def test_a_deployed_run_is_taken_by_the_worker_and_works_in_the_root(machine, api):
    root, _, _ = machine
    (deployment,) = post(api, "/deployments/filter")
    run = api.create_flow_run_from_deployment(deployment["id"])
    assert until(lambda: api.read_flow_run(run.id).state.is_final(), 120)
    assert api.read_flow_run(run.id).state_name == "Completed"
    assert (root / "ran").read_text() == f"demo in {root}"


def test_up_again_changes_nothing(machine, api):
    root, _, first = machine
    paths = ("/deployments/filter", "/work_pools/filter", "/automations/filter")
    before = [[found["id"] for found in post(api, path)] for path in paths]
    assert services.up(root / "prefect.yaml") == first  # the same processes
    assert [[found["id"] for found in post(api, path)] for path in paths] == before
    assert [len(ids) for ids in before] == [1, 1, 1]
    running = {name: text != "not running" for name, text in services.status().items()}
    assert running == {"server": True, "worker": True, "mlflow": False}


def test_down_ends_what_up_started_and_what_that_left_behind(machine, monkeypatch):
    server, worker = processes.recorded("server"), processes.recorded("worker")
    orphan = subprocess.Popen(  # a flow run whose worker was killed: no parent of ours, but our token
        [sys.executable, "-c", "import time; time.sleep(600)"],
        start_new_session=True,
        env={**os.environ, processes.TOKEN: worker.token},
    )
    os.kill(server.pid, signal.SIGKILL)
    assert until(lambda: not server.alive, 10)
    assert services._running_server() is None  # a dead one is never taken for a server
    services.down()
    assert set(services.status().values()) == {"not running"}
    assert orphan.poll() is not None
    tokens = {server.token, worker.token}
    left = [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(processes.TOKEN) in tokens]
    assert left == []
    assert "PREFECT_API_URL" not in os.environ or os.environ["PREFECT_API_URL"] != server.url


# -- without a server --------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_root(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    return tmp_path


def test_a_recycled_process_id_is_left_alone(empty_root):
    service = processes.start("sleeper", ["sleep", "600"], environment={})
    time.sleep(0.05)  # start times are counted in hundredths of a second
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        stale = processes.Service(**{**vars(service), "pid": innocent.pid, "token": "of another time"})
        assert not stale.alive
        processes.stop(stale, patience=1)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        processes.stop(service, patience=5)
    assert not service.alive
    assert processes.recorded("sleeper") is None


def test_one_that_does_not_listen_to_reason_is_killed(empty_root):
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    service = processes.start("deaf", [sys.executable, "-c", deaf], environment={})
    assert until(lambda: processes.last_words(service) == "deaf", 20)
    processes.stop(service, patience=0.5)
    assert not service.alive


def test_a_taken_port_is_passed_over():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert processes.free_port(taken) > taken


def test_a_users_server_that_does_not_answer_is_one_line(empty_root, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:9/api does not answer") as error:
        services.ensure_server()
    assert len(str(error.value)) < 200


def test_a_server_that_cannot_start_names_its_log(empty_root, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(services, "_python", lambda module: [sys.executable, "-c", "raise SystemExit('no room')"])
    with pytest.raises(BadInput, match="no room") as error:
        services.ensure_server()
    assert str(Path(".flywheel/logs/server.log")) in str(error.value)
    assert processes.recorded("server") is None


def test_deployments_that_are_refused_are_one_line(empty_root, monkeypatch):
    monkeypatch.setattr(services, "_python", lambda module: [sys.executable, "-c", "raise SystemExit('unknown flow')"])
    with pytest.raises(BadInput, match="does not take these deployments") as error:
        services._deploy(services.PREFECT_YAML)
    assert "unknown flow" in (empty_root / ".flywheel" / "logs" / "deploy.log").read_text()
    assert "\n" not in str(error.value)


def test_what_prefect_yaml_says_fits_the_flows():
    """Every entrypoint exists and takes the parameters it is deployed with."""
    from importlib import import_module

    import yaml

    text = services.PREFECT_YAML.read_text()
    assert str(services.PREFECT_YAML.parent) not in text
    names = set()
    for deployment in yaml.safe_load(text)["deployments"]:
        module, function = deployment["entrypoint"].split(":")
        flow = getattr(import_module(module), function)
        assert set(deployment["parameters"]) <= set(flow.parameters.properties)
        assert {"recipe", "overrides"} <= set(flow.parameters.properties)
        assert deployment["work_pool"]["job_variables"]["stream_output"] is False
        names.add(deployment["name"])
    assert names == {"nightly", "collect", "dataset", "train", "evaluation"}
