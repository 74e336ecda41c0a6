"""Fetching through the real clients: whole and checked or not there, on from where a kill came, one at a time."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from published import COMMIT, publish
from test_openpi import HEADS, LIBERO, SIZE, made, write_params
from tiny_pi0 import tiny

from data import download
from data.download import FETCHED, fetch, read_fetched
from data.errors import BadInput
from data.remotes import Bucket, Hub
from flows.cli import main
from models.openpi import to_openpi
from tasks import weights

BLOCK = 10_000
WEIGHTS = np.random.default_rng(0).bytes(25 * BLOCK + 7)
REPOSITORY = {
    "config.json": b'{"type": "pi0"}', "model.safetensors": WEIGHTS, "README.md": b"# pi0", "training.bin": b"pickle",
    "docs/picture.png": b"png",
}  # fmt: skip
WANTED = {"config.json", "model.safetensors", "README.md"}


@pytest.fixture
def own_root(tmp_path, monkeypatch):
    """A root of its own, small blocks, no pauses, a network."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.setattr(download, "BLOCK", BLOCK)
    monkeypatch.setattr(download, "PAUSE_S", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    impatient = SimpleNamespace(sleep=lambda seconds: None, time=time.time)  # of the hub's client, between its tries
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    return tmp_path


@pytest.fixture
def hub(own_root, monkeypatch):
    with publish(files=dict(REPOSITORY)) as publisher:
        monkeypatch.setenv("HF_ENDPOINT", publisher.address)
        yield publisher


@pytest.fixture
def bucket(own_root, monkeypatch):
    pytest.importorskip("gcsfs")
    with publish(files={}) as publisher:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", publisher.address)
        monkeypatch.setattr("gcsfs.core.GCSFileSystem.on_google", False, raising=False)
        monkeypatch.setattr("data.remotes.PUBLIC_BUCKETS", {"shelf"})
        yield publisher


@pytest.fixture
def folder(own_root):
    return own_root / "store" / "checkpoints" / "pi0" / "acme--pi0"


def said(raised):
    line = str(raised.value)
    assert "\n" not in line and len(line) < 200
    return line


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_repository_arrives_whole_with_a_manifest_and_only_what_acting_needs(hub, folder):
    assert weights.get("acme/pi0") == folder
    assert {p.name for p in folder.iterdir()} == WANTED | {FETCHED}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    manifest = json.loads((folder / FETCHED).read_text())
    assert manifest["source"] == "hub acme/pi0" and manifest["revision"] == COMMIT
    assert manifest["files"]["model.safetensors"] == {
        "size": len(WEIGHTS), "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
    }  # fmt: skip
    assert not list(folder.parent.glob("*.partial"))


def test_a_second_time_nothing_is_asked_for(hub, folder):
    weights.get("acme/pi0")
    asked = len(hub.ranges)
    hub.address, hub.files = "", {}
    assert weights.get("acme/pi0") == folder and len(hub.ranges) == asked


def test_broken_connections_cost_only_the_bytes_that_were_on_their_way(hub, folder):
    hub.cut = [0, 5_000, 1, 9_999]
    weights.get("acme/pi0")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.cut == [] and hub.sent < len(WEIGHTS) + 5 * BLOCK


def test_a_connection_that_stays_broken_is_one_line_and_what_arrived_is_kept(hub, folder):
    hub.files = {"model.safetensors": WEIGHTS}
    hub.cut = [BLOCK] * 3 + [0] * 200
    with pytest.raises(BadInput, match="no connection to 127") as raised:
        weights.get("acme/pi0")
    assert "hf download acme/pi0" in said(raised) and "store/checkpoints/pi0/acme--pi0" in said(raised)
    assert not folder.exists()
    assert (folder.with_name("acme--pi0.partial") / "model.safetensors").stat().st_size == 3 * BLOCK
    hub.cut, hub.ranges = [], []
    weights.get("acme/pi0")
    assert min(start for _, start, _ in hub.ranges) == 3 * BLOCK
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_what_changed_meanwhile_is_fetched_anew_and_what_is_finished_is_not(hub, folder):
    hub.cut = [BLOCK] * 8 + [0] * 200
    with pytest.raises(BadInput, match="no connection"):
        weights.get("acme/pi0")
    partial = folder.with_name("acme--pi0.partial")
    assert (partial / "README.md").exists() and (partial / "model.safetensors").stat().st_size > BLOCK
    (partial / "stranger.json").write_text("{}")
    hub.cut, hub.ranges = [], []
    hub.files["model.safetensors"] = WEIGHTS[::-1]
    weights.get("acme/pi0")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS[::-1]
    assert {name for name, _, _ in hub.ranges} == {"model.safetensors"}
    assert {p.name for p in folder.iterdir()} == WANTED | {FETCHED}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_named_and_not_kept(name, hub, folder):
    hub.damage = name  # one is known by its sha256, the other by git's hash
    with pytest.raises(BadInput, match=f"{name} arrived damaged") as raised:
        weights.get("acme/pi0")
    assert "run it again" in said(raised) and not folder.exists()
    assert not (folder.with_name("acme--pi0.partial") / name).exists()
    hub.damage = ""
    assert weights.get("acme/pi0") == folder


def test_a_server_that_does_not_know_ranges_is_not_believed(hub, folder):
    hub.whole = True
    with pytest.raises(BadInput, match="no connection"):
        weights.get("acme/pi0")
    assert not folder.exists()


def test_a_full_disk_is_refused_before_the_first_byte(hub, folder, monkeypatch):
    usage = type("Usage", (), {"free": download.MIN_FREE_BYTES + len(WEIGHTS) // 2})
    monkeypatch.setattr("data.download.shutil.disk_usage", lambda path: usage)
    with pytest.raises(BadInput, match=r"0\.3 GB needed, 0\.3 GB free") as raised:
        weights.get("acme/pi0")
    assert "FLYWHEEL_ROOT" in said(raised) and hub.ranges == []


def test_pickles_alone_and_folders_of_something_else_are_refused(hub):
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(BadInput, match=r"pytorch_model.bin is a pickle") as raised:
        weights.get("acme/pi0")
    assert said(raised) and hub.ranges == []
    hub.files = {"README.md": b"# nothing"}
    with pytest.raises(BadInput, match="no weights"):
        weights.get("acme/pi0")


def test_a_name_that_leads_outside_is_refused(hub, folder):
    for name in ("../../evil.json", "/etc/evil.json"):
        hub.files = {"model.safetensors": WEIGHTS, name: b"{}"}
        with pytest.raises(BadInput, match="no name for a file"):
            weights.get("acme/pi0")
    assert hub.ranges == [] and not folder.exists()


def test_gated_private_and_misspelt_repositories_are_told_apart(hub):
    with pytest.raises(BadInput, match="no such repository") as raised:
        weights.get("acme/other")
    assert "hf auth login" in said(raised)
    hub.gated = True
    with pytest.raises(BadInput, match="gated: accept its licence") as raised:
        weights.get("acme/pi0")
    assert said(raised)


def test_the_tokenizer_comes_alone(hub, own_root, monkeypatch):
    hub.files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "model-00001.safetensors": WEIGHTS}
    monkeypatch.setitem(weights.KNOWN, "paligemma", weights.Known(remote=Hub("acme/pi0"), about=""))
    there = weights.get("paligemma")
    assert there == own_root / "store" / "checkpoints" / "paligemma"
    assert {p.name for p in there.iterdir()} == {"tokenizer.json", "tokenizer_config.json", FETCHED}


def test_clip_comes_from_a_proposal_and_without_what_nobody_reads(hub, own_root, monkeypatch):
    hub.files = dict.fromkeys(("model.safetensors", "config.json", "tokenizer.json", "vocab.json", "x.bin"), WEIGHTS)
    remote = Hub("acme/pi0", "proposal")
    monkeypatch.setitem(weights.KNOWN, "clip", weights.Known(remote=remote, about=""))
    there = weights.get("clip")
    assert there == own_root / "store" / "checkpoints" / "clip"
    assert {p.name for p in there.iterdir()} == {*weights.CLIP, FETCHED}
    assert remote.by_hand == "hf download acme/pi0 --revision proposal --local-dir pi0"


def test_what_lies_there_already_is_respected(hub, folder):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"brought by hand")
    assert weights.get("acme/pi0") == folder and hub.ranges == []
    assert read_fetched(folder).revision == "by hand"
    with pytest.raises(BadInput, match="holds hub acme/pi0, not hub acme/other"):
        read_fetched(folder, source="hub acme/other")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BadInput, match="missing or cut off"):
        weights.get("acme/pi0")
    (folder / FETCHED).write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        weights.get("acme/pi0")


def test_two_at_once_fetch_once(hub, folder):
    hub.seconds_per_request = 0.01
    waited, results = [], []

    def one():
        results.append(
            fetch(Hub("acme/pi0"), folder, choose=weights._weights, progress=weights.partial(weights._megabytes, "x"),
                  waiting=lambda: waited.append(1))
        )  # fmt: skip

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and waited == [1]
    assert hub.sent == sum(len(REPOSITORY[name]) for name in WANTED)


# -- the command -----------------------------------------------------------------------------------------------------


def command(publisher, root, *arguments):
    """`flywheel fetch` as a process with blocks of its own size, so that a kill comes between two of them."""
    code = (
        f"import sys; from data import download; download.BLOCK = {BLOCK}; from flows.cli import main; sys.exit(main())"
    )
    environment = os.environ | {"HF_ENDPOINT": publisher.address, "FLYWHEEL_ROOT": str(root), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, "fetch", *arguments], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_killed_fetch_goes_on_where_it_was(hub, own_root, folder):
    hub.seconds_per_request = 0.05
    killed = command(hub, own_root, "acme/pi0")
    while len(hub.ranges) < 8:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not folder.exists() and (before := hub.sent) < len(WEIGHTS)
    hub.seconds_per_request, hub.ranges = 0.0, []
    again = command(hub, own_root, "acme/pi0")
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert out.strip() == str(folder) and (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert min(start for name, start, _ in hub.ranges if name == "model.safetensors") >= before // BLOCK * BLOCK - BLOCK
    assert hub.sent <= len(WEIGHTS) - before + 2 * BLOCK


def test_without_a_network_one_line_says_what_to_bring_and_where(own_root, monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["fetch", "pi0_base"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and len(err) < 200
    assert "hf download lerobot/pi0_base" in err and "store/checkpoints/pi0/pi0_base" in err


@pytest.mark.parametrize(
    ("what", "line"),
    [("pi0_bsae", "did you mean 'pi0_base'"), ("gs://only-a-bucket", "gs://bucket/folder"),
     ("gs://shelf/../pi0", "gs://bucket/folder"), ("../x/y", "no known name"), ("--jsn", "usage:")],
)  # fmt: skip
def test_a_request_that_names_nothing_is_one_line(what, line, capsys):
    assert main(["fetch", what]) == 2
    err = capsys.readouterr().err
    assert line in err and len(err.splitlines()) == 1


def test_the_list_names_every_source_and_imports_nothing_heavy():
    code = (
        "import sys; from flows.cli import main; main(['fetch', '--list']);"
        "print(sorted({'torch', 'lerobot', 'huggingface_hub', 'fsspec', 'gcsfs', 'prefect'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"
    for name, known in weights.KNOWN.items():
        assert name in shown and known.remote.name in shown and known.original in shown


# -- the bucket ------------------------------------------------------------------------------------------------------


def openpi_checkpoint(folder):
    """A tiny pi0.5 as openpi publishes it: file -> content. Use inside `tiny(SIZE)`."""
    write_params(folder, to_openpi(made("pi05")[1], **HEADS))
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stats = json.dumps({"norm_stats": LIBERO}).encode()
    return files | {"assets/libero/norm_stats.json": stats, "train_state/d/optimizer": b"not needed"}


@pytest.mark.parametrize("composite", [False, True])
def test_openpi_s_folder_arrives_checked_and_is_converted(composite, bucket, own_root, tmp_path):
    with tiny(SIZE):
        bucket.files, bucket.composite = openpi_checkpoint(tmp_path / "published"), composite
        bucket.cut = [100] if composite else []
        there = weights.get("gs://shelf/pi0/")
    raw = there.with_name("gs--pi0")
    assert there.name == "gs--pi0-lerobot" and not (raw / "train_state").exists()
    assert all((raw / name).read_bytes() == content for name, content in bucket.files.items() if name[0] in "pa")
    assert {"model.safetensors", "config.json", "norm/libero.json"} <= set(read_fetched(there).files)
    asked = len(bucket.ranges)
    assert weights.get("gs://shelf/pi0") == there and len(bucket.ranges) == asked


@pytest.mark.parametrize("composite", [False, True])
def test_a_damaged_object_is_named(composite, bucket):
    bucket.files = {"params/manifest.ocdbt": b"manifest", "params/d/1": WEIGHTS}
    bucket.composite, bucket.damage = composite, "params/d/1"
    with pytest.raises(BadInput, match=f"params/d/1 arrived damaged .{'crc32c' if composite else ''}"):
        weights.get("gs://shelf/pi0")


def test_an_empty_address_and_a_missing_network_are_told(bucket, monkeypatch):
    with pytest.raises(BadInput, match="no weights") as raised:
        weights.get("gs://shelf/pi0")
    assert said(raised)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="elsewhere run `gcloud storage cp") as raised:
        weights.get("gs://shelf/pi0")
    assert said(raised)


def test_without_tensorstore_what_was_fetched_stays(bucket, own_root, monkeypatch):
    bucket.files = {"params/manifest.ocdbt": b"manifest"}
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorstore" else real(name))
    with pytest.raises(BadInput, match="tensorstore"):
        weights.get("gs://shelf/pi0")
    places = sorted(p.name for p in (own_root / "store" / "checkpoints" / "pi0").iterdir() if p.is_dir())
    assert places == ["gs--pi0"]


def test_a_bucket_s_own_name_is_what_a_manifest_says():
    assert Bucket("gs://a/b").name == "gs://a/b" and Hub("a/b").name == "hub a/b"
