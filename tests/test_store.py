"""The store: complete or invisible, made once, damage noticed."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from data.errors import BadInput
from data.refs import Ref
from data.store import MANIFEST, Build, Inputs, Store, refusing_storage_faults


def inputs(**params) -> Inputs:
    return Inputs(stage="toy", params=params, code={"m": "1"})


def write(text: str):
    def make(build: Build) -> None:
        (build.out / "sub").mkdir()
        (build.out / "sub" / "a.txt").write_text(text)

    return make


def test_made_once_then_found(tmp_path):
    store = Store(tmp_path)
    first, cached = store.ensure(inputs(x=1), write("hello"))
    assert not cached and (first.dir / "sub/a.txt").read_text() == "hello"
    second, cached = store.ensure(inputs(x=1), lambda build: pytest.fail("made twice"))
    assert cached and second == first


def test_key_follows_parameters_code_and_upstream_digests_only():
    base = inputs(x=1)
    assert inputs(x=1).key == base.key
    assert inputs(x=2).key != base.key
    assert Inputs(stage="toy", params={"x": 1}, code={"m": "2"}).key != base.key

    def with_parent(key: str, digest: str) -> str:
        parent = Ref(stage="up", key=key, digest=digest, path="/anywhere")
        return Inputs(stage="toy", params={"x": 1}, code={"m": "1"}, parents=(parent,)).key

    assert with_parent("k1", "d") == with_parent("k2", "d")  # rebuilt to the same bytes: nothing stale
    assert with_parent("k1", "d") != with_parent("k1", "e")


def test_same_files_same_digest_whatever_the_inputs(tmp_path):
    store = Store(tmp_path)
    a, _ = store.ensure(inputs(x=1), write("same"))
    b, _ = store.ensure(inputs(x=2), write("same"))
    assert a.digest == b.digest and a.key != b.key


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest", "extra digest"])
def test_damage_is_noticed_and_only_that_artefact_rebuilt(tmp_path, damage):
    store = Store(tmp_path)
    good, _ = store.ensure(inputs(x=1), write("payload"))
    other, _ = store.ensure(inputs(x=2), write("payload"))
    file = good.dir / "sub/a.txt"
    file.chmod(0o644)
    (good.dir / MANIFEST).chmod(0o644)
    if damage == "flip":
        file.write_text("pAyload")  # same size, so only the hash can tell
    elif damage == "truncate":
        file.write_text("pay")
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        (good.dir / MANIFEST).write_text("{")
    else:
        manifest = json.loads((good.dir / MANIFEST).read_text())
        manifest["files"]["sub/a.txt"]["sha256"] = "0" * 64
        (good.dir / MANIFEST).write_text(json.dumps(manifest))
    ref, why = store.find("toy", good.key)
    assert ref is None and why.startswith("damaged")
    again, cached = store.ensure(inputs(x=1), write("payload"))
    assert not cached and again.digest == good.digest
    assert store.find("toy", other.key)[0] == other


def test_a_failed_builder_leaves_nothing(tmp_path):
    store = Store(tmp_path)

    def fail(build: Build) -> None:
        write("half")(build)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        store.ensure(inputs(x=1), fail)
    assert store.find("toy", inputs(x=1).key) == (None, "not built yet")
    assert not list((tmp_path / "objects/toy").iterdir())


def test_files_the_manifest_does_not_list_are_not_part_of_it(tmp_path):
    store = Store(tmp_path)
    ref, _ = store.ensure(inputs(x=1), write("a"))
    assert set(store.manifest(ref)["files"]) == {"sub/a.txt"}


BUILDER = """
import sys, time
from pathlib import Path
from data.store import Inputs, Store
def make(build):
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    (build.out / "a").write_text("a")
    (build.work / "progress").write_text("some")
    print("begun", flush=True)
    time.sleep(float(sys.argv[3]))
Store(Path(sys.argv[1])).ensure(Inputs(stage="toy", params={"x": 1}, code={"m": "1"}), make)
print("done", flush=True)
"""


def start(tmp_path: Path, sleep: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(BUILDER), str(tmp_path / "store"), str(tmp_path / "log"), str(sleep)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_make_it_once(tmp_path):
    both = [start(tmp_path, 0.5), start(tmp_path, 0.5)]
    assert [p.wait(30) for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_kill_9_leaves_nothing_visible_frees_the_lock_and_keeps_the_work_folder(tmp_path):
    process = start(tmp_path, 60)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    store = Store(tmp_path / "store")
    assert store.find("toy", inputs(x=1).key)[0] is None
    seen = []
    began = time.monotonic()

    def make(build: Build) -> None:
        seen.append((build.work / "progress").read_text())
        (build.out / "a").write_text("a")

    ref, cached = store.ensure(inputs(x=1), make)
    assert not cached and seen == ["some"] and time.monotonic() - began < 5
    left = [p.name for p in (tmp_path / "store/objects/toy").iterdir()]
    assert left == [ref.key[:16]]
    assert not (tmp_path / "store/work/toy" / ref.key[:16]).exists()


def test_a_full_disk_and_a_read_only_store_are_one_line(tmp_path):
    import errno

    for code, word in [(errno.ENOSPC, "full"), (errno.EROFS, "cannot be written")]:
        with pytest.raises(BadInput, match=word) as caught, refusing_storage_faults(tmp_path):
            raise OSError(code, os.strerror(code), str(tmp_path / "x"))
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_really_full_disk_keeps_what_was_there(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        store = Store(mount)
        kept, _ = store.ensure(inputs(x=1), write("kept"))

        def fill(build: Build) -> None:
            with (build.out / "big").open("wb") as file:
                while True:
                    file.write(b"0" * 2**20)

        with pytest.raises(BadInput, match="full"):
            store.ensure(inputs(x=2), fill)
        assert store.find("toy", kept.key)[0] == kept
        assert [p.name for p in (mount / "objects/toy").iterdir()] == [kept.key[:16]]
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        with pytest.raises(BadInput, match="cannot be written"):
            store.ensure(inputs(x=3), write("no"))
        assert store.find("toy", kept.key)[0] == kept
    finally:
        subprocess.run(["umount", mount], check=False)


def test_verify_all_reads_every_byte(tmp_path):
    store = Store(tmp_path)
    ref, _ = store.ensure(inputs(x=1), write("payload"))
    assert [ok for _, ok, _ in store.verify_all()] == [True]
    (ref.dir / "sub/a.txt").chmod(0o644)
    (ref.dir / "sub/a.txt").write_text("pAyload")
    assert [ok for _, ok, _ in store.verify_all()] == [False]
