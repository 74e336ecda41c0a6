"""Datasets that others recorded: adopted when they are sound, refused in one line when they are not."""

import shutil

import polars as pl
import pytest
from malformed import KINDS, tiny_dataset, to_v21

from data.chunks import read_chunks
from data.loader import ChunkSource
from data.store import Store
from flows.cli import main
from flows.recipes import load
from tasks.adopt import adopt_datasets
from tasks.chunks import TABLE, chunk_tables
from tasks.dataset import aggregate_batches, read_set
from tasks.frames import frame_stores

LOUD = 20  # the kinds LeRobot trains on without a word come first


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_dataset(tmp_path_factory.mktemp("good") / "dataset")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    return Store()


def dataset_of(source):
    night = load("debug", ["collect.episodes=0", f"dataset.sources={source}", "chunks.horizon=4"])
    batches = []
    batches += adopt_datasets(night)
    frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
    return aggregate_batches(night, batches), frames, chunks


@pytest.mark.parametrize("form", ["v3", "v2.1"])
def test_an_adopted_dataset_becomes_chunks_to_train_on(good, store, tmp_path, form):
    source = good if form == "v3" else to_v21(good, tmp_path / "v21")
    dataset, frames, chunks = dataset_of(source)
    whole = read_set(dataset)
    rows = read_chunks(chunks[0].dir / TABLE).rows
    assert whole.episodes == 4 and whole.steps == len(rows)
    loaded = ChunkSource.open([frames[0].dir], [chunks[0].dir / TABLE], episodes=[whole.members[0].train])
    assert len(loaded) == rows.filter(pl.col("episode_index").is_in(whole.members[0].train)).height


def test_a_source_that_changed_is_another_artefact(good, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(good, copy)
    first = adopt_datasets(load("debug", [f"dataset.sources={copy}"]))[0]
    assert adopt_datasets(load("debug", [f"dataset.sources={good}"]))[0] == first  # the same content elsewhere
    (copy / "notes.txt").write_text("one file more")
    assert adopt_datasets(load("debug", [f"dataset.sources={copy}"]))[0].digest != first.digest


@pytest.mark.parametrize("kind", list(KINDS)[:LOUD])
def test_the_loudest_malformed_datasets_are_refused_by_the_command_line(good, store, tmp_path, capsys, kind):
    copy = tmp_path / "dataset"
    shutil.copytree(good, copy)
    KINDS[kind][0](copy)
    words = ["dataset", "debug", "--collect.episodes", "0", "--dataset.sources", str(copy)]
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flywheel: ") and "/dataset/" in lines[0]
    assert all(word in lines[0] for word in KINDS[kind][1])
    assert not list(store.root.rglob("*")), "something was written"
