"""Runs, outages and the registry, on a real SQLite store and a real MLflow server that is killed and comes back."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.errors import BadInput
from flows.environment import prepare
from tasks import spool, tracking
from tasks.spool import Journal, Rejected, Shipper, Unreachable

prepare()

DIGEST = "d41d8cd98f00b204e9800998ecf8427e.dir"


class Stop(BaseException):
    """Nothing may catch it: the nearest thing to a kill inside one process."""


# --- the spool alone, with a receiver we can break -------------------------------------------------------------------


class Receiver:
    """Recognises what it has seen, as MLflow does; fails on demand, before or after it has taken the events."""

    def __init__(self):
        self.got: dict[tuple[int, str], float] = {}
        self.statuses: list[str] = []
        self.calls = 0
        self.fail = lambda call: ""

    def __call__(self, state, events):
        self.calls += 1
        how = self.fail(self.calls)
        if how == "before":
            raise Unreachable("away")
        for event in events:
            if event["kind"] == "finish":
                self.statuses.append(event["status"])
            for key, value in event.get("values", {}).items():
                if key == "bad":
                    raise Rejected("bad")
                self.got[event["step"], key] = value
        if how == "after":
            raise Unreachable("the answer was lost")
        return state


def event(kind, **fields):
    return {"kind": kind, "time": 1, **fields}


def start():
    return event("start", id=os.urandom(4).hex())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(spool, "INTERVAL", 0.01)
    monkeypatch.setattr(spool, "LONGEST_PAUSE", 0.02)


def test_everything_arrives_once_through_a_flapping_receiver(tmp_path, quick):
    receiver = Receiver()
    receiver.fail = lambda call: ("before", "", "after")[call % 3]
    shipper = Shipper(tmp_path, receiver)
    journal = Journal(tmp_path, start())
    shipper.add(journal)
    shipper.start()
    for step in range(5000):
        journal.append(event("metrics", step=step, values={"loss": step / 2}))
    journal.append(event("finish", status="FINISHED"))
    deadline = time.monotonic() + 20
    while list(tmp_path.glob("*.jsonl")) and time.monotonic() < deadline:
        shipper.flush(0.1)
    assert receiver.got == {(step, "loss"): step / 2 for step in range(5000)}
    assert set(receiver.statuses) == {"FINISHED"}
    assert not list(tmp_path.iterdir())
    assert receiver.calls > 6  # the faults fired


def test_one_refused_value_takes_no_neighbour_with_it(tmp_path, quick, caplog):
    receiver = Receiver()
    shipper = Shipper(tmp_path, receiver)
    journal = Journal(tmp_path, start())
    shipper.add(journal)
    for step in range(10):
        journal.append(event("metrics", step=step, values={"bad" if step == 5 else "loss": 1.0}))
    shipper.start()
    assert shipper.flush(10)
    assert sorted(step for step, _ in receiver.got) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert "not recorded" in caplog.text


def test_a_dead_writers_journal_is_closed_as_killed_and_a_living_ones_is_left_alone(tmp_path, quick):
    living = Journal(tmp_path, start())
    dead = Journal(tmp_path, start())
    dead.append(event("metrics", step=1, values={"loss": 0.5}))
    os.write(dead._fd, b'{"kind": "metrics", "step": 2, "va')  # torn by the kill
    dead.close()  # the kernel drops the lock, as it does for a killed process
    receiver = Receiver()
    shipper = Shipper(tmp_path, receiver)
    shipper.start()
    assert shipper.whole_pass(10)
    assert receiver.statuses == ["KILLED"]
    assert receiver.got == {(1, "loss"): 0.5}
    assert [path for path in tmp_path.glob("*.jsonl")] == [living.path]
    living.close()


def test_a_full_disk_costs_metrics_but_not_the_run(tmp_path, monkeypatch, caplog):
    journal = Journal(tmp_path, start())
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))  # what a full disk leaves of a line
    journal.append(event("metrics", step=1, values={"loss": 1.0}))

    def full(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    journal.append(event("metrics", step=2, values={"loss": 2.0}))
    monkeypatch.setattr(os, "write", write)
    journal.append(event("metrics", step=3, values={"loss": 3.0}))
    kept = [found["step"] for found, _ in spool.read(journal.path, 0) if found and found["kind"] == "metrics"]
    assert kept == [3]
    assert caplog.text.count("No space left") == 1
    journal.close()


# --- runs on the default SQLite store --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    """MLflow's tables take seconds to create: once for all tests, after a first attempt that was killed."""
    root = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWHEEL_ROOT", str(root))
        from tasks import tracking_client

        def stopped_in_the_middle(tracking_uri, registry_uri):
            Path(tracking_uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
            raise Stop

        with pytest.MonkeyPatch.context() as kill, pytest.raises(Stop):
            kill.setattr(tracking_client, "MlflowClient", stopped_in_the_middle)
            tracking_client.client()
        assert not (tracking_client.home() / "mlflow.db").exists()
        tracking_client.client()
        assert not list(tracking_client.home().glob("*.making-*"))
        return tracking_client.home() / "mlflow.db"


@pytest.fixture
def store(tmp_path, monkeypatch, empty_database):
    """A project root of its own, with MLflow's tables ready."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".flywheel" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_database, tmp_path / ".flywheel" / "mlflow" / "mlflow.db")
    return tmp_path


def read_run(run_id):
    from tasks.tracking_client import client

    return client().get_run(run_id)


def history(run_id, metric):
    from tasks.tracking_client import client

    return [(point.step, point.value) for point in client().get_metric_history(run_id, metric)]


def test_a_night_with_a_phase(store):
    night = tracking.start_night("demo", {"train": {"lr": 1e-3, "widths": [1, 2]}}, {"commit": "abc"})
    plot = store / "plot.png"
    plot.write_bytes(b"png")
    with tracking.start_phase(night, "train", key="k1", params={"lr": 1e-3}, system_metrics=True) as run:
        run.log(0, {"loss": 2.0})
        run.log(1, {"loss": float("nan")})
        run.artifact(plot, "plots")
        run.input_dataset("pick_cube", DIGEST, store)
    assert night.finish()

    parent, child = read_run(night.run_id), read_run(run.run_id)
    assert parent.info.status == child.info.status == "FINISHED"
    assert parent.data.params == {"train.lr": "0.001", "train.widths": "[1, 2]"}
    assert parent.data.tags["flywheel.recipe"] == "demo"
    assert child.data.tags["mlflow.parentRunId"] == night.run_id
    assert [step for step, _ in history(run.run_id, "loss")] == [0, 1]
    assert child.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert (store / ".flywheel/mlflow/artifacts" / run.run_id / "artifacts/plots/plot.png").read_bytes() == b"png"
    assert not list((store / ".flywheel/mlflow/spool").iterdir())


def test_a_dataset_finds_its_runs_and_a_run_its_dataset(store):
    import mlflow

    from tasks.tracking_client import client, experiment_id

    with tracking.start_phase(None, "train", key="k1", params={}) as run:
        run.input_dataset("pick_cube", DIGEST, store)
    found = client().search_runs([experiment_id()], f"dataset.digest = '{DIGEST}'")
    assert [each.info.run_id for each in found] == [run.run_id]
    assert mlflow.data.get_source(found[0].inputs.dataset_inputs[0]).load() == store
    with pytest.raises(BadInput, match="36"):
        run.input_dataset("pick_cube", "0" * 64, store)


def test_a_finished_phase_is_found_and_not_logged_twice(store):
    with tracking.start_phase(None, "train", key="k1", params={"lr": 1}) as first:
        first.log(0, {"loss": 1.0})
    with tracking.start_phase(None, "train", key="k1", params={"lr": 1}) as again:
        again.log(0, {"loss": 1.0})
        again.log(1, {"loss": 0.5})
    assert again.run_id == first.run_id == tracking.find_run("k1")
    assert history(first.run_id, "loss") == [(0, 1.0)]
    assert tracking.find_run("k2") is None


KILLED_IN_TRAINING = """
import os, signal
from flows.environment import prepare
prepare()
from tasks import tracking
run = tracking.start_phase(None, "train", key="k1", params={"lr": 1})
for step in range(50):
    run.log(step, {"loss": float(step)})
run.wait()
run.log(50, {"loss": 50.0})
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_marked_and_its_resumption_goes_on_in_it(store):
    done = subprocess.run([sys.executable, "-c", KILLED_IN_TRAINING], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run_id = done.stdout.strip()
    assert read_run(run_id).info.status == "RUNNING"
    assert tracking.replay_spools() is None
    assert read_run(run_id).info.status == "KILLED"
    assert len(history(run_id, "loss")) == 51  # the last one was written down but not sent before the kill

    with tracking.start_phase(None, "train", key="k1", params={"lr": 1}) as resumed:
        for step in range(40, 60):  # from the checkpoint at 40
            resumed.log(step, {"loss": float(step)})
    assert resumed.run_id == run_id
    assert read_run(run_id).info.status == "FINISHED"
    assert history(run_id, "loss") == [(step, float(step)) for step in range(60)]


def test_an_exception_fails_the_run_and_an_interrupt_kills_it(store):
    with pytest.raises(ZeroDivisionError), tracking.start_phase(None, "a", key="k1", params={}) as failed:
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), tracking.start_phase(None, "b", key="k2", params={}) as killed:
        raise KeyboardInterrupt
    assert read_run(failed.run_id).info.status == "FAILED"
    assert read_run(killed.run_id).info.status == "KILLED"


def test_a_delivery_whose_acknowledgement_was_lost_changes_nothing(store):
    from tasks.tracking_delivery import deliver

    start = {
        "kind": "start",
        "time": 5,
        "id": "j1",
        "name": "train",
        "key": "k1",
        "parent": None,
        "params": {"a": "1"},
        "tags": {},
    }
    metrics = [
        {"kind": "metrics", "time": 6, "step": step, "values": {"loss": 1.0, "nan": float("nan")}}
        for step in range(700)
    ]
    once = deliver({}, [start])
    twice = deliver({}, [start])
    assert once == twice
    for _ in range(2):
        deliver(once, metrics)
        deliver(once, [{"kind": "input", "name": "d", "digest": DIGEST, "path": "/", "context": "training"}])
    run = read_run(once["run_id"])
    assert len(history(once["run_id"], "loss")) == len(history(once["run_id"], "nan")) == 700
    assert len(run.inputs.dataset_inputs) == 1


# --- a server that goes away -----------------------------------------------------------------------------------------

SERVER = """
import os, signal, sys
import mlflow.server as server
os.environ |= {server.BACKEND_STORE_URI_ENV_VAR: sys.argv[1], server.ARTIFACTS_DESTINATION_ENV_VAR: sys.argv[2],
               server.SERVE_ARTIFACTS_ENV_VAR: "true", server.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/"}
import uvicorn
from mlflow.server.fastapi_app import app
print("ready", flush=True)
for line in sys.stdin:                       # each line starts one server; it is killed from outside
    child = os.fork()
    if child == 0:
        uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="error")
    print(child, flush=True)
    os.waitpid(child, 0)
"""


class Server:
    """MLflow's server, imported once (13 s), then forked for each start, so that a restart takes a moment."""

    def __init__(self, root):
        self.root = root
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", SERVER, f"sqlite:///{root}/server.db", str(root / "artifacts"), str(self.port)]
        self.log = (root / "server.log").open("w")
        self.zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def start(self):
        self.zygote.stdin.write("\n")
        self.zygote.stdin.flush()
        self.pid = int(self.zygote.stdout.readline())
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                time.sleep(0.05)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def close(self):
        self.zygote.kill()
        self.zygote.wait()
        self.zygote.stdin.close()
        self.zygote.stdout.close()
        self.log.close()


@pytest.fixture(scope="module", autouse=True)
def importing_server(tmp_path_factory):
    """Begins to import beside the first tests."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture
def server(importing_server, tmp_path, monkeypatch, empty_database):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", importing_server.url)
    shutil.copy(empty_database, importing_server.root / "server.db")
    assert importing_server.zygote.stdout.readline() == "ready\n"
    yield importing_server
    importing_server.kill()


def test_an_outage_neither_slows_a_run_nor_thins_its_metrics(server, tmp_path, caplog):
    """Up, killed in mid-training, finished while down, the next run begun while down, back: all points, once."""
    server.start()
    video = tmp_path / "video.mp4"
    video.write_bytes(b"mp4")
    run = tracking.start_phase(None, "train", key="k1", params={"lr": 1})
    assert run.wait()
    waits = []
    for step in range(1500):
        if step == 500:
            server.kill()
        before = time.perf_counter()
        run.log(step, {"loss": 1 / (step + 1), "lr": 0.1})
        waits.append(time.perf_counter() - before)
        time.sleep(0.002)
    run.artifact(video)
    before = time.perf_counter()
    assert not run.finish()
    assert time.perf_counter() - before < 15
    assert sorted(waits)[int(0.99 * len(waits))] < 0.01
    assert caplog.text.count("metrics wait in") == 1
    night = tracking.start_night("demo", {})
    child = tracking.start_phase(night, "evaluate", key="k2", params={})
    child.log(0, {"success": 0.5})
    child.finish(timeout=0.1)
    night.finish(timeout=0.1)
    assert night.run_id is None and child.page is None

    server.start()
    assert tracking.replay_spools(60) is None
    assert [step for step, _ in history(run.run_id, "loss")] == list(range(1500))
    assert len(history(run.run_id, "lr")) == 1500
    assert read_run(run.run_id).info.status == "FINISHED"
    assert history(child.run_id, "success") == [(0, 0.5)]
    assert read_run(child.run_id).data.tags["mlflow.parentRunId"] == night.run_id
    assert (server.root / "artifacts" / "1" / run.run_id / "artifacts" / "video.mp4").exists()


def test_a_server_that_is_away_is_one_line_for_who_must_wait_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(BadInput) as error:
        tracking.find_run("k1")
    assert "http://127.0.0.1:9: no answer" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 200


# --- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    (folder / "spec.json").write_text(json.dumps({"backbone": "resnet"}))
    return folder


def register(checkpoint, key, score, protocol="p1", run_id=None):
    from tasks import tracking_registry

    tags = {"protocol": protocol, "score": score, "dataset": DIGEST, "code": "c", "parent": ""}
    better = lambda champion: score > float(champion.tags["score"])  # noqa: E731
    return tracking_registry.register(checkpoint, name="pick", key=key, tags=tags, is_better=better, run_id=run_id)


def aliases():
    from tasks import tracking_registry

    return {alias: version.version for version in tracking_registry.versions("pick") for alias in version.aliases}


def test_the_champion_is_the_first_or_better_under_the_same_protocol(store, checkpoint):
    assert register(checkpoint, "k1", 0.6).decision == "champion: the first"
    assert aliases() == {"challenger": 1, "champion": 1}
    assert register(checkpoint, "k2", 0.6).decision == "challenger: not better than version 1"
    assert aliases() == {"challenger": 2, "champion": 1}
    assert (
        register(checkpoint, "k3", 0.9, protocol="p2").decision
        == "challenger: version 1 was scored under another protocol"
    )
    assert register(checkpoint, "k4", 0.7).decision == "champion: better than version 1"
    assert aliases() == {"challenger": 4, "champion": 4, "previous": 1}
    assert register(checkpoint, "k2", 0.6).version == 2  # again: nothing moves
    assert aliases() == {"challenger": 4, "champion": 4, "previous": 1}


def test_a_version_is_loaded_and_walked_in_both_directions(store, checkpoint):
    import mlflow

    from tasks import tracking_client
    from tasks import tracking_registry as registry

    assert registry.champion("pick") is None
    with tracking.start_phase(None, "train", key="k1", params={}) as run:
        run.input_dataset("pick_cube", DIGEST, store)
    registered = register(checkpoint, "k1", 0.6, run_id=run.run_id)
    shutil.rmtree(checkpoint)  # the registry has a copy
    champion = registry.champion("pick")
    assert champion == registered
    folder = registry.checkpoint_dir(champion)
    assert (folder / "weights.safetensors").read_bytes() == b"weights"
    assert [each["digest"] for each in registry.datasets_of(champion)] == [DIGEST]
    assert registry.versions_of("pick", DIGEST) == [champion]
    assert registry.versions_of("pick", "0" * 32 + ".dir") == []
    with tracking_client.as_global():
        copied = mlflow.artifacts.download_artifacts("models:/pick@champion")
    assert sorted(os.listdir(copied)) == ["spec.json", "weights.safetensors"]
    with pytest.raises(BadInput, match="no version 9"):
        registry.get("pick", 9)


def test_two_at_once_make_one_version(store, checkpoint):
    threads = [threading.Thread(target=register, args=(checkpoint, "k1", 0.6)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert aliases() == {"challenger": 1, "champion": 1}
    from tasks import tracking_registry

    assert len(tracking_registry.versions("pick")) == 1


STEPS = (
    "create_logged_model",
    "log_model_artifacts",
    "finalize_logged_model",
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "set_model_version_tag",
)


def stop_at(patch, n, after):
    """Make the n-th call that changes MLflow stop the caller, before or after it has worked. Returns the calls."""
    from mlflow import MlflowClient

    called = []

    def stopping(step, real):
        def call(self, *args, **kwargs):
            called.append(step)
            if len(called) != n + 1:
                return real(self, *args, **kwargs)
            if after:
                real(self, *args, **kwargs)
            raise Stop

        return call

    for step in STEPS:
        patch.setattr(MlflowClient, step, stopping(step, getattr(MlflowClient, step)))
    return called


@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_any_step_registration_goes_on_where_it_was(store, checkpoint, monkeypatch, after):
    """A registration that unseats a champion, stopped at each call that changes MLflow, then run again."""
    register(checkpoint, "k0", 0.1)
    for n in range(20):
        before, score = aliases(), 0.2 + n / 100
        with monkeypatch.context() as patch:
            called = stop_at(patch, n, after)
            try:
                register(checkpoint, f"k{n}+", score)
                break  # it had fewer than n steps
            except Stop:
                pass
        assert aliases()["champion"] in (before["champion"], before["challenger"] + 1)
        done = register(checkpoint, f"k{n}+", score)
        assert done.version == before["challenger"] + 1
        assert aliases() == {"challenger": done.version, "champion": done.version, "previous": before["champion"]}
    assert len(called) == n == 8  # upload in 3, version, 3 aliases, decision
