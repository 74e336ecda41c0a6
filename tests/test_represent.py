"""A recipe that learns an encoder first: what is made, from what, and that a kill changes nothing of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import new_root

from data.errors import BadInput
from data.loader import ChunkSource
from data.schema import IMAGE
from flows.recipes import load
from models.checkpoint import load_encoder, load_policy, verify
from models.types import Observation
from tasks.chunks import TABLE, chunk_tables
from tasks.collect import collect_batches
from tasks.dataset import aggregate_batches, read_set
from tasks.encode import read_encodings
from tasks.frames import frame_stores
from tasks.jepa import ENCODER, LAST, one_step, read_probes, train_encoder
from tasks.probing import Probing
from tasks.recipe import Improve
from tasks.stages import Outcome, Session, session
from tasks.train import train_checkpoint


def learn(root: Path, monkeypatch, *, phase: int = 2) -> dict[str, list[Outcome]]:
    """Per stage, what was made of the debug recipe."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(root))
    night = load("statevla-debug")
    with session(Session()) as current:
        batches = collect_batches(night)
        frames, chunks = frame_stores(night, batches), chunk_tables(night, batches)
        dataset = aggregate_batches(night, batches)
        (train_encoder if phase == 1 else train_checkpoint)(night, dataset, frames, chunks)
    made: dict[str, list[Outcome]] = {}
    for outcome in current.outcomes:
        made.setdefault(outcome.stage, []).append(outcome)
    return made


@pytest.fixture(scope="module")
def made(empty_mlflow, tmp_path_factory):
    root = new_root(tmp_path_factory.mktemp("represent"))
    shutil.copytree(empty_mlflow, root / ".flywheel" / "mlflow")
    with pytest.MonkeyPatch.context() as patch:
        yield root, learn(root, patch)


@pytest.fixture
def opened(made, monkeypatch) -> ChunkSource:
    monkeypatch.setenv("FLYWHEEL_ROOT", str(made[0]))
    stores, tables = ([o.ref.dir for o in made[1][stage]] for stage in ("frames", "chunks"))
    return ChunkSource.open(stores, [table / TABLE for table in tables])


def test_both_phases_and_what_lies_between(made, opened):
    _, outcomes = made
    encoder_ref = outcomes["jepa"][0].ref
    encoder = load_encoder(encoder_ref.dir / ENCODER)
    rows = np.arange(0, len(opened), 9)
    columns = opened.gather(rows, opened.buffers(len(rows)))
    with torch.no_grad():
        z = encoder(Observation.of(columns, columns["task"])).numpy()
    encodings = np.concatenate([read_encodings(outcome.ref) for outcome in outcomes["encode"]])
    assert len(encodings) == len(opened) and np.allclose(encodings[rows], z, atol=1e-5)
    policy = load_policy(outcomes["train"][0].ref.dir)
    for name, weight in encoder.backbone.state_dict().items():
        assert torch.equal(policy.backbone.state_dict()[name], weight), name
    assert policy.spec.horizon == 10 and policy.action.stats.mean.tolist() == encoder.action.stats.mean.tolist()


def test_the_best_probe_is_published_beside_the_last_step(made):
    ref = made[1]["jepa"][0].ref
    found = read_probes(ref)
    assert found["untrained"]["step"] == 0 and [r["step"] for r in found["trained"]] == [2, 4, 6, 8]
    assert list(found["untrained"]["r2"]) == ["cube.x", "cube.y", "cube.z"]
    best = max(found["trained"], key=lambda record: record["score"])
    assert found["best"] == best["step"] == verify(ref.dir / ENCODER)["step"] and verify(ref.dir / LAST)["step"] == 8
    assert best["score"] == pytest.approx(np.mean(list(best["r2"].values())))


def test_a_kill_between_a_checkpoint_and_its_probe_changes_nothing(made, tmp_path, monkeypatch):
    root, outcomes = made
    shutil.copytree(root, tmp_path / "root", symlinks=True)
    shutil.rmtree(tmp_path / "root" / "store" / "objects" / "jepa")
    look = Probing.look

    def killed(probing: Probing, step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return look(probing, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Probing, "look", killed)
        learn(tmp_path / "root", patch, phase=1)
    again = learn(tmp_path / "root", monkeypatch, phase=1)["jepa"][0]
    assert not again.cached and again.ref.digest == outcomes["jepa"][0].ref.digest


def test_single_steps_stay_within_their_episode(made, opened):
    single = one_step(opened)
    assert len(single) == len(opened) - sum(len(m.seeds) for m in read_set(made[1]["dataset"][0].ref).members)
    for member, frames in enumerate(single.members):
        here = single.member == member
        episode, frame = (frames.rows[name].to_numpy() for name in ("episode_index", "frame_index"))
        start, after = single.start[here], single.next[here]
        assert (episode[start] == episode[after]).all() and (frame[after] == frame[start] + 1).all()
    columns = single.gather(np.arange(5), single.buffers(5, with_next=True))
    assert columns["action"].shape[1] == 1 and not columns["action_is_pad"].any()


def test_who_reads_encodings_reads_no_pictures(opened):
    blind = opened.without_pictures()
    columns = blind.gather(np.arange(3), blind.buffers(3))
    assert not any(name.startswith(IMAGE) for name in columns)
    seeing = opened.gather(np.arange(3), opened.buffers(3))
    assert np.array_equal(columns["action"], seeing["action"]) and any(name.startswith(IMAGE) for name in seeing)


def test_phase_and_checkpoint_as_statevla_s_commands_have_them():
    assert not load("statevla").only_represents
    assert load("statevla", ["phase=1"]).only_represents
    asked = load("statevla", ["phase=2", "checkpoint=store/objects/jepa/x"]).represent
    assert asked is not None and asked.start == "store/objects/jepa/x"
    with pytest.raises(BadInput, match=r"represent\.phase"):
        load("statevla", ["phase=3"])
    with pytest.raises(BadInput, match="unknown option"):
        load("demo", ["phase=1"])
    with pytest.raises(BadInput, match="choose one"):
        replace(load("statevla"), improve=Improve())


def test_what_is_no_encoder_is_refused(made, monkeypatch):
    root, outcomes = made
    monkeypatch.setenv("FLYWHEEL_ROOT", str(root))
    other = outcomes["train"][0].ref.dir
    night = load("statevla-debug", [f"checkpoint={other}"])
    refs = [[o.ref for o in outcomes[stage]] for stage in ("dataset", "frames", "chunks")]
    with pytest.raises(BadInput, match="was made by stage train; name an artefact of jepa"):
        train_encoder(night, refs[0][0], refs[1], refs[2])
    right = load("statevla-debug", [f"checkpoint={outcomes['jepa'][0].ref.dir}"])
    assert train_encoder(right, refs[0][0], refs[1], refs[2]).digest == outcomes["jepa"][0].ref.digest
