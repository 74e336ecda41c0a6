"""Checkpoints: what is saved is loaded, complete or invisible, strict, and never code."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import HEADS, SCHEMA, batch, build, config, generator

from data.errors import BadInput
from models import checkpoint
from models.acting import acting_policy
from models.checkpoint import latest, load_policy, publish, save_policy


def publish_policy(checkpoints: Path, step: int, policy=None) -> Path:
    folder = checkpoints / f"step-{step:08d}"
    publish(folder, lambda hidden: save_policy(policy or build(seed=step), hidden), step=step)
    return folder


@pytest.mark.parametrize("head", HEADS)
def test_saved_is_loaded(head, tmp_path):
    policy = build(config(head, pad_state=8, normalization="min_max")).eval()
    loaded = load_policy(publish_policy(tmp_path, 1, policy))
    assert loaded.spec == policy.spec
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    seen = batch().observation
    assert torch.equal(policy.predict_action(seen, generator(0)), loaded.predict_action(seen, generator(0)))
    assert not loaded.training


def test_the_average_acts_by_default(tmp_path):
    policy = build()
    average = {name: torch.full_like(w, 0.25) for name, w in policy.state_dict().items()}
    publish(tmp_path / "step-1", lambda hidden: save_policy(policy, hidden, ema=average), step=1)
    assert load_policy(tmp_path / "step-1").state_dict()["head.queries"].eq(0.25).all()
    last = load_policy(tmp_path / "step-1", weights="last").state_dict()["head.queries"]
    assert torch.equal(last, policy.state_dict()["head.queries"])


def test_two_saves_of_one_policy_have_the_same_bytes(tmp_path):
    a, b = (publish_policy(tmp_path / name, 3) for name in "ab")
    assert (a / checkpoint.INDEX).read_bytes() == (b / checkpoint.INDEX).read_bytes()


def test_another_schema_is_refused(tmp_path):
    folder = publish_policy(tmp_path, 1)
    assert load_policy(folder, fits=SCHEMA)
    with pytest.raises(BadInput, match="dataset D: control_mode is qpos, but checkpoint step-00000001 expects delta"):
        load_policy(folder, fits=replace(SCHEMA, control_mode="qpos"), whose="dataset D")
    with pytest.raises(BadInput, match="the environment: fps is 10"):
        acting_policy(folder, "digest", replace(SCHEMA, fps=10))


FILES = ("weights.safetensors", "ema.safetensors", "spec.json", "norm.json", "checkpoint.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit", "empty"])
def test_damage_is_refused_in_one_line(name, damage, tmp_path):
    folder = publish_policy(tmp_path, 1)
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"truncated": content[: len(content) // 2], "one bit": content, "empty": b""}
    path.unlink()
    if damage != "missing":
        path.write_bytes(damaged[damage])
    with pytest.raises(BadInput) as fault:
        load_policy(folder)
    assert str(folder) in str(fault.value) and "\n" not in str(fault.value)
    assert len(str(fault.value).replace(str(tmp_path), "")) < 200


def test_an_extra_file_is_refused(tmp_path):
    folder = publish_policy(tmp_path, 1)
    (folder / "hook.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match=r"hook.py: unknown"):
        load_policy(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.queries"), "head.queries is missing"),
        (lambda w: w.update(more=torch.zeros(1)), "more is unknown"),
        (lambda w: w.update({"head.queries": torch.zeros(2, 2)}), r"head.queries is float32\[2, 2\], the model's is"),
        (lambda w: w.update({"head.queries": w["head.queries"].double()}), "head.queries is float64"),
    ],
)
def test_weights_are_loaded_strictly(change, message, tmp_path):
    folder = publish_policy(tmp_path, 1)
    weights = load_file(folder / "ema.safetensors")
    change(weights)
    save_file(weights, folder / "ema.safetensors")
    checkpoint.seal(folder, step=1)  # whole in itself: only the model can tell
    with pytest.raises(BadInput, match=message):
        load_policy(folder)


def test_a_pickle_under_another_name_is_not_run(tmp_path):
    folder = publish_policy(tmp_path, 1)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"head.queries": Payload()}, folder / "ema.safetensors")
    checkpoint.seal(folder, step=1)
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        load_policy(folder)
    assert not (tmp_path / "executed").exists()


def test_another_format_is_refused(tmp_path):
    folder = publish_policy(tmp_path, 1)
    index = json.loads((folder / checkpoint.INDEX).read_text())
    (folder / checkpoint.INDEX).write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(BadInput, match="checkpoint format 2, this program reads 1"):
        load_policy(folder)


class Killed(BaseException):
    pass


def _raise(*_args, **_kwargs):
    raise Killed


@pytest.mark.parametrize("where", ["save_policy", "seal", "rename", "symlink_to", "replace"])
def test_a_kill_while_publishing_leaves_the_last_checkpoint(where, tmp_path, monkeypatch):
    publish_policy(tmp_path, 1)
    with monkeypatch.context() as patch:
        if where in ("rename", "symlink_to"):
            patch.setattr(Path, where, _raise)
        elif where == "replace":
            patch.setattr(os, where, _raise)
        else:
            patch.setattr(checkpoint, where, _raise)
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # a kill cleans nothing up
        with pytest.raises(Killed):
            publish(tmp_path / "step-00000002", lambda h: checkpoint.save_policy(build(), h), step=2)
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert load_policy(latest(tmp_path))
    publish_policy(tmp_path, 2)
    checkpoint.prune(tmp_path, 2)
    assert latest(tmp_path) == tmp_path / "step-00000002"
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".latest")}
    assert names == {"latest", "step-00000001", "step-00000002"}


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    publish_policy(tmp_path, 1)

    def full(*_args):
        raise checkpoint.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(BadInput, match="the disk is full"):
        publish_policy(tmp_path, 2)
    assert latest(tmp_path) == tmp_path / "step-00000001"
    assert errno.ENOSPC == 28 and not list(tmp_path.glob(".staging-*"))


def test_old_checkpoints_go(tmp_path):
    for step in (1, 2, 3, 4):
        publish_policy(tmp_path, step)
        checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
