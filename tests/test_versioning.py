"""The digest we compute is the one `dvc add` writes."""

import os

import pytest
import yaml

from data.errors import BadInput
from flows.environment import prepare
from tasks.versioning import dvc_digest

prepare()


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    folder = tmp_path / "store" / "dataset"
    (folder / "meta" / "episodes").mkdir(parents=True)
    (folder / "meta" / "info.json").write_bytes(b'{"fps": 10}\r\n')  # DVC hashes bytes as they are, CRLF too
    (folder / "meta" / "episodes" / "0.parquet").write_bytes(os.urandom(3_000_000))
    (folder / "empty").write_bytes(b"")
    (folder / "ünïcode name").write_text("x")
    (folder / "no files in here").mkdir()
    return folder


def test_equals_what_dvc_add_writes(tmp_path, dataset):
    from dvc.repo import Repo

    with Repo.init(str(tmp_path), no_scm=True) as repo:
        repo.add(str(dataset))
    written = yaml.safe_load((tmp_path / "store" / "dataset.dvc").read_text())["outs"][0]
    assert written["hash"] == "md5"
    assert dvc_digest(dataset) == written["md5"]
    assert dvc_digest(dataset).endswith(".dir") and len(dvc_digest(dataset)) == 36


def test_every_change_is_another_digest_also_when_most_is_remembered(dataset):
    seen = {dvc_digest(dataset)}
    file = dataset / "meta" / "info.json"
    text = file.read_bytes()
    for change in (
        lambda: file.write_bytes(text.replace(b"10", b"20")),
        lambda: (dataset / "added").touch(),
        lambda: (dataset / "added").rename(dataset / "renamed"),
        lambda: (dataset / "renamed").rename(dataset / "meta" / "renamed"),
    ):
        change()
        seen.add(dvc_digest(dataset))
    assert len(seen) == 5
    (dataset / "meta" / "renamed").unlink()
    file.write_bytes(text)
    file.touch()
    assert dvc_digest(dataset) in seen


def test_known_files_are_not_read_again(dataset, monkeypatch):
    import dvc_data.hashfile.build as build

    first = dvc_digest(dataset)
    read = []
    monkeypatch.setattr(build, "hash_file", lambda path, *args, **kwargs: read.append(path))
    assert dvc_digest(dataset) == first
    assert not read


def test_nothing_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    with pytest.raises(BadInput, match="nothing there"):
        dvc_digest(tmp_path / "missing")
