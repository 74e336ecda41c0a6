"""Each finding is made to go wrong once, and says what mends it."""

import json
import socket

import pytest

from data.sim.driver import RenderDevice
from flows import doctor
from flows.environment import prepare

prepare()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A root of its own on a machine that can render."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    device = RenderDevice(ok=True, name="llvmpipe", detail="somewhere")
    monkeypatch.setattr("data.sim.driver.device_summary", lambda: device)
    return tmp_path


def examine(capsys, **options):
    code = doctor.run(as_json=True, **options)
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in report["findings"]}


def test_a_good_machine_passes_and_a_missing_gpu_does_not_matter(machine, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, findings = examine(capsys)
    assert code == 0
    for name in ("GPU", "C"):
        assert not findings[name]["ok"] and not findings[name]["required"]
    assert findings["Vulkan"]["found"] == "llvmpipe [somewhere]"
    assert all(finding["mend"] for finding in findings.values() if not finding["ok"])


def test_lines_for_people_show_the_remedy_under_what_is_missing(machine, capsys, monkeypatch):
    monkeypatch.setattr("data.sim.driver.device_summary", lambda: RenderDevice(ok=False, name="", detail="no driver"))
    assert doctor.run() == 1
    lines = capsys.readouterr().out.splitlines()
    here = next(i for i, line in enumerate(lines) if "Vulkan" in line)
    assert lines[here].startswith("MISSING") and "no driver" in lines[here]
    assert lines[here + 1].strip().startswith("-> ") and "data.sim.driver" in lines[here + 1]


def test_versions_that_break_prefect_silently_are_found(machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "2.1.0")
    code, findings = examine(capsys)
    assert code == 1
    assert "sqlalchemy 2.1.0" in findings["packages"]["found"]


def test_a_store_that_cannot_be_written(machine, capsys):
    (machine / "store").write_text("a file where the folder should be")
    code, findings = examine(capsys)
    assert code == 1
    assert "cannot be written" in findings["store"]["found"]


def test_a_full_disk(machine, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_DISK_GB", 1e9)
    code, findings = examine(capsys)
    assert code == 1
    assert not findings["disk"]["ok"]


def test_servers_the_user_has_named_must_answer(machine, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, findings = examine(capsys)
    assert code == 1
    assert findings["MLflow"]["found"] == "http://127.0.0.1:9 does not answer (MLFLOW_TRACKING_URI)"
    assert findings["Prefect"]["required"]


def test_a_port_that_is_taken_is_told_and_is_no_fault(machine):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finding = doctor._server("Prefect", "server", other.getsockname()[1], "PREFECT_API_URL", "/health")
    assert not finding.ok and not finding.required
    assert "taken by another program" in finding.found


def test_a_damaged_database(machine, capsys):
    database = machine / ".flywheel" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"SQLite format 3\0" + b"rubbish" * 1000)
    code, findings = examine(capsys)
    assert code == 1
    assert str(database) in findings["MLflow"]["mend"]


def test_deep_reads_every_artefact(machine, capsys):
    from data.store import Inputs, Store

    store = Store()
    refs = []
    for n in range(2):
        inputs = Inputs(stage="train", params={"n": n})
        refs.append(store.ensure(inputs, lambda build: (build.out / "weights").write_bytes(b"0" * 1000) and None)[0])
    code, findings = examine(capsys, deep=True)
    assert code == 0 and findings["artefacts"]["found"] == "2 read in full and intact"
    damaged = refs[0].dir / "weights"
    damaged.chmod(0o644)
    damaged.write_bytes(b"0" * 999 + b"1")
    code, findings = examine(capsys, deep=True)
    assert code == 1
    assert str(refs[0].dir) in findings["artefact"]["found"]
