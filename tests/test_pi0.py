"""PI0 and PI05: what we propose is what LeRobot predicts from the same noise, computed once; misfits in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pi0
import torch
from lerobot.utils.constants import OBS_STATE
from safetensors.torch import load_file, save_file
from tiny_policy import PX, SCHEMA, batch

from data.errors import BadInput
from data.relabel import folder_digest
from data.schema import IMAGE
from models import pi0
from models.policy import within_limits
from models.proposer import open_proposer
from models.types import Observation

K = 3
TASKS = ("pick up the cube", "lift", "push the red cube", "lift it")
OBSERVATION = replace(batch(size=4).observation, tasks=TASKS)
OBSERVATION = replace(OBSERVATION, state=OBSERVATION.state / 10)  # within the range that pi0.5 tells apart


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with tiny_pi0.tiny():
        yield


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def folder(request, tmp_path_factory) -> Path:
    return tiny_pi0.write(tmp_path_factory.mktemp(request.param), request.param, SCHEMA, empty_cameras=1)


@pytest.fixture
def copy(tmp_path_factory, tmp_path) -> Path:
    """A pi0 to damage."""
    return tiny_pi0.write(tmp_path / "pi0", "pi0", SCHEMA)


def noise(proposer, k: int = K) -> torch.Tensor:
    return torch.randn(len(TASKS), k, *proposer.noise_shape, generator=torch.Generator().manual_seed(1))


def lerobot(
    folder: Path, observation: Observation, noise: torch.Tensor, leave_out: str = "", relative: bool = False
) -> torch.Tensor:
    """[b k h a]: LeRobot's own policy and processors, asked once per sample."""
    kind = json.loads((folder / "config.json").read_text())["type"]
    policy = tiny_pi0.policy(kind, SCHEMA, empty_cameras=1, relative=relative)
    pictures = {
        IMAGE + camera: image.permute(0, 3, 1, 2) / 255
        for camera, image in observation.images.items()
        if camera != leave_out
    }
    before, after = tiny_pi0.processors(folder, policy.config)
    asked = before({OBS_STATE: observation.state, "task": list(observation.tasks), **pictures})
    chunks = [after(policy.predict_action_chunk(asked, noise=noise[:, k].clone())) for k in range(noise.shape[1])]
    return within_limits(torch.stack(chunks, dim=1), SCHEMA.action)


def test_equal_noise_gives_what_lerobot_predicts(folder):
    assert tiny_pi0.SMALLEST.image != PX  # so that pictures are scaled, too
    proposer = open_proposer(folder, SCHEMA)
    ours = proposer.propose(OBSERVATION, noise(proposer))
    theirs = lerobot(folder, OBSERVATION, noise(proposer))
    assert ours.shape == theirs.shape == (4, K, 6, 3)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours[:, 0] - ours[:, 1]).abs().amax(dim=(1, 2)).min() > 0.05  # samples differ, in every observation
    assert ours[..., :2].abs().max() <= 1  # components that are commands in [-1, 1]


@pytest.mark.parametrize("part", ["picture", "state", "words"])
def test_a_proposal_depends_on_all_that_is_seen(folder, part):
    """Otherwise the equality above would say little."""
    proposer = open_proposer(folder, SCHEMA)
    other = {
        "picture": replace(OBSERVATION, images={**OBSERVATION.images, "wrist": 255 - OBSERVATION.images["wrist"]}),
        "state": replace(OBSERVATION, state=OBSERVATION.state + 0.5),
        "words": replace(OBSERVATION, tasks=("throw the cup",) * 4),
    }[part]
    before, after = (proposer.propose(seen, noise(proposer)) for seen in (OBSERVATION, other))
    assert (before - after).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_the_prefix_is_read_once_for_all_samples_and_steps(folder, monkeypatch):
    proposer: Any = open_proposer(folder, SCHEMA, steps=5)
    inner = proposer.policy.model.paligemma_with_expert
    calls = []

    def counted(name, module, function):
        was = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, **k: calls.append(name) or was(*a, **k))

    counted("camera", inner, "embed_image")
    counted("prefix", inner.paligemma.model.language_model, "forward")
    counted("step", inner.gemma_expert.model, "forward")
    proposer.propose(OBSERVATION, noise(proposer, k=4))
    assert calls == ["camera"] * 2 + ["prefix"] + ["step"] * 5  # the third camera is empty: not even looked at


def test_a_camera_that_is_left_out_is_what_lerobot_makes_of_a_missing_one(folder):
    proposer = open_proposer(folder, SCHEMA, cameras={"wrist": ""})
    theirs = lerobot(folder, OBSERVATION, noise(proposer), leave_out="wrist")
    torch.testing.assert_close(proposer.propose(OBSERVATION, noise(proposer)), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_actions_relative_to_the_state_come_out_absolute(kind, tmp_path):
    folder = tiny_pi0.write(tmp_path, kind, SCHEMA, relative=True, empty_cameras=1)
    proposer = open_proposer(folder, SCHEMA)
    theirs = lerobot(folder, OBSERVATION, noise(proposer), relative=True)
    torch.testing.assert_close(proposer.propose(OBSERVATION, noise(proposer)), theirs, atol=1e-5, rtol=0)


def test_cameras_and_state_are_mapped_by_name(folder):
    straight = open_proposer(folder, SCHEMA)
    names = tuple(c.name for c in reversed(SCHEMA.state))
    crossed = open_proposer(folder, SCHEMA, cameras={"head": "wrist", "wrist": "head"}, state=names)
    images = {"head": OBSERVATION.images["wrist"], "wrist": OBSERVATION.images["head"]}
    seen = replace(OBSERVATION, images=images, state=OBSERVATION.state.flip(1))
    same = noise(straight)
    assert torch.equal(straight.propose(OBSERVATION, same), crossed.propose(seen, same))


def test_in_bfloat16_it_proposes_nearly_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "half")
    edit(tmp_path / "half", "config.json", dtype="bfloat16")
    half, whole = open_proposer(tmp_path / "half", SCHEMA), open_proposer(folder, SCHEMA)
    close = half.propose(OBSERVATION, noise(whole)), whole.propose(OBSERVATION, noise(whole))
    assert 0 < (close[0] - close[1]).abs().max() < 0.1


def test_provenance_names_the_policy_its_steps_and_its_normalisation(folder, tmp_path):
    proposer = open_proposer(folder, SCHEMA, steps=7)
    told = proposer.provenance()
    kind = json.loads((folder / "config.json").read_text())["type"]
    assert (told["kind"], told["policy"], told["steps"]) == (kind, folder_digest(folder), 7)
    other = shutil.copytree(folder, tmp_path / "other")
    file = next(other.glob("policy_postprocessor_*.safetensors"))
    numbers = load_file(file)
    save_file({name: v * 2 for name, v in numbers.items()}, file)
    changed = open_proposer(other, SCHEMA).provenance()
    assert changed["normalization"] != told["normalization"] and changed["policy"] != told["policy"]


def test_a_matrix_written_under_its_other_name_is_found(copy):
    """Older transformers tied the words that come in to those that go out, and wrote one of them."""
    whole = open_proposer(copy, SCHEMA)
    tensors = load_file(copy / pi0.WEIGHTS)
    tensors[pi0.WORDS_OUT] = tensors.pop(pi0.EMBEDDING)
    bare = {name.removeprefix("model."): v for name, v in tensors.items() if "gemma_expert.lm_head" not in name}
    save_file(bare, copy / pi0.WEIGHTS)
    older = open_proposer(copy, SCHEMA)
    assert torch.equal(older.propose(OBSERVATION, noise(older)), whole.propose(OBSERVATION, noise(whole)))


# -- refusals --------------------------------------------------------------------------------------------------------


def edit(folder: Path, file: str, **values) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / pi0.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / pi0.WEIGHTS)


def edit_step(folder: Path, name: str, **values) -> None:
    content = json.loads((folder / pi0.BEFORE).read_text())
    for step in content["steps"]:
        if step["registry_name"] == name:
            step |= values
    (folder / pi0.BEFORE).write_text(json.dumps(content))


def no_numbers(folder: Path) -> None:
    for path in folder.glob("policy_*_normalizer_processor.safetensors"):
        save_file({"observation.other.mean": torch.zeros(1)}, path)


PROJECTION = "model.action_in_proj.weight"
DAMAGE = {
    "extra weight": (lambda f: edit_weights(f, lambda t: t.update(x=torch.zeros(1))), "model.x is unknown"),
    "lost weight": (lambda f: edit_weights(f, lambda t: t.pop(PROJECTION)), f"{PROJECTION} is missing"),
    "shape": (lambda f: edit_weights(f, lambda t: t.update({PROJECTION: torch.zeros(2, 2)})), r"is \[2, 2\]"),
    "cut weights": (lambda f: (f / pi0.WEIGHTS).write_bytes(b"x" * 99), "cannot be read as safetensors"),
    "no weights": (lambda f: (f / pi0.WEIGHTS).unlink(), "cannot be read as safetensors.*flywheel fetch"),
    "no processors": (lambda f: (f / pi0.BEFORE).unlink(), "policy_preprocessor.json: is missing.*flywheel fetch"),
    "no numbers": (no_numbers, "no statistics to scale observation.state.*flywheel fetch"),
    "unknown step": (lambda f: edit_step(f, "device_processor", registry_name="mystery"), "'mystery' is not known"),
    "class path": (lambda f: edit_step(f, "device_processor", registry_name=None, **{"class": "os.system"}),
                   "'os.system' is not known"),
    "relative": (lambda f: edit(f, "config.json", use_relative_actions=True), "disagree whether actions are relative"),
    "alien field": (lambda f: edit(f, "config.json", warp=1), "is no configuration of LeRobot"),
    "alien kind": (lambda f: edit(f, "config.json", type="act"), "of type 'act'; use pi0 or pi05"),
    "no folder": (lambda f: shutil.rmtree(f), "neither LeRobot's pi0 nor.*flywheel fetch"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json.*flywheel fetch"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_in_one_line(copy, damage, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    do, said = DAMAGE[damage]
    do(copy)
    refused(said, copy)


MISFIT = {
    "camera": (
        {"schema": replace(SCHEMA, cameras=("head",))},
        r"camera 'wrist' is none of .*\(head\).*relabel.cameras",
    ),
    "unknown camera": ({"cameras": {"wirst": "head"}}, "no camera 'wirst'.*wrist"),
    "nothing seen": ({"cameras": {"wrist": "", "head": ""}}, "no camera of the dataset is shown"),
    "state": ({"state": ("joint_1.pos",)}, "state has 5 components, the dataset's 1; say which with relabel.state"),
    "unknown state": ({"state": ("joint_9.pos",)}, "no component 'joint_9.pos'"),
    "action": ({"schema": replace(SCHEMA, action=SCHEMA.action[:2])}, "action has 3 components, the dataset's 2"),
}


@pytest.mark.parametrize("misfit", MISFIT)
def test_what_does_not_fit_the_dataset_is_refused_in_one_line(folder, misfit):
    options, said = MISFIT[misfit]
    refused(said, folder, **options)


def refused(said: str, folder: Path, *, schema=SCHEMA, **options) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        open_proposer(folder, schema, **options)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200, str(raised.value)
