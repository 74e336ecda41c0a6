"""GR00T N1 and N1.5 as NVIDIA lays them out: what is read acts as what was written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_eagle import TAGS, as_published, write_tokenizer
from tiny_policy import PX, generator

from data.errors import BadInput
from data.normalize import Normalizer, Stats
from data.schema import Component, Schema
from models.config import PolicyConfig
from models.layers.flow_dit import PRESETS
from models.policy import Policy, PolicySpec
from models.published import gr00t
from models.types import Observation

HORIZON, PADDED_STATE, PADDED_ACTION, ROBOTS = 4, 8, 6, 32
PARTS = {"arm": 3, "hand": 1}  # of state and action
TINY = PRESETS["tiny"]
DIT = {
    "num_layers": TINY.layers,
    "num_attention_heads": TINY.heads,
    "attention_head_dim": TINY.head,
    "interleave_self_attention": True,
}
EITHER = pytest.mark.parametrize("kind", ["gr00t_n1", "gr00t_n1_5"])
LAYOUT = {"gr00t_n1": "n1", "gr00t_n1_5": "n1.5"}


def metadata() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    statistics: dict[str, Any] = {"state": {}, "action": {}}
    for feature in statistics.values():
        for name, width in PARTS.items():
            low, high = rng.uniform(-2, -1, width), rng.uniform(1, 2, width)
            vectors = {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4}
            feature[name] = {key: vector.tolist() for key, vector in vectors.items()}
    parts = {name: {"absolute": True, "shape": [width], "continuous": True} for name, width in PARTS.items()}
    video = {name: {"resolution": [24, PX], "channels": 3, "fps": 20.0} for name in ("ego_view", "wrist")}
    return {"statistics": statistics, "modalities": {"video": video, "state": parts, "action": parts}}


def policy_of(kind: str, folder: Path) -> Policy:
    """Written by hand: what `read` must find."""
    projected = {"gr00t_n1": 0, "gr00t_n1_5": None}[kind]
    backbone = {
        "preset": "tiny",
        "tokenizer": str(folder),
        "crop": 0.95,
        "project_to_dim": projected,
        "vocabulary": 270,
    }
    head = {"preset": "tiny", "max_embodiments": ROBOTS, "embodiment": 31}
    names = gr00t.KINDS[kind]
    numbered = tuple(Component(name=f"{name}_{i}", unit="") for name, width in PARTS.items() for i in range(width))
    schema = Schema(
        cameras=("ego_view", "wrist"),
        image_size=(PX, 24),
        state=numbered,
        action=numbered,
        fps=20,
        control_mode="?",
        gripper="?",
        orientation="?",
    )
    config = PolicyConfig(
        backbone=names.backbone,
        backbone_options=backbone,
        head=names.head,
        head_options=head,
        normalization="min_max",
        shift=0,
        pad_state=PADDED_STATE,
        pad_action=PADDED_ACTION,
    )
    statistics = metadata()["statistics"]
    stats = {}
    for feature in ("state", "action"):
        low, high = (np.concatenate([statistics[feature][p][side] for p in PARTS]) for side in ("min", "max"))
        stats[feature] = Stats(count=1, mean=(low + high) / 2, m2=((high - low) / 4) ** 2, min=low, max=high)
    normalizers = {name: Normalizer(stats=s, mode="min_max") for name, s in stats.items()}
    return Policy.restore(PolicySpec(config=config, schema=schema, horizon=HORIZON), normalizers).eval()


def write(kind: str, folder: Path, **changes: Any) -> Policy:
    """A tiny GR00T in NVIDIA's layout, its weights in two files; the policy it holds."""
    write_tokenizer(folder, *TAGS)
    policy: Any = policy_of(kind, folder)
    torch.manual_seed(5)
    for p in policy.parameters():
        torch.nn.init.normal_(p, std=0.3)
    found = as_published(policy.backbone, LAYOUT[kind])
    found |= {f"action_head.{name}": tensor.clone() for name, tensor in policy.head.state_dict().items()}
    names = sorted(found)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in files.items():
        save_file({name: found[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in files.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": kind,
        "architectures": [kind.upper()],
        "action_horizon": HORIZON,
        "action_dim": PADDED_ACTION,
        "backbone_cfg": {"select_layer": 1, "tune_llm": False, "tune_visual": True, "reproject_vision": False},
        "action_head_cfg": {
            "action_horizon": HORIZON,
            "num_inference_timesteps": 4,
            "diffusion_model_cfg": DIT,
            "tune_projector": True,
            "tune_diffusion_model": True,
            **({"use_vlln": True} if kind == "gr00t_n1_5" else {}),
        },
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "experiment_cfg").mkdir()
    (folder / "experiment_cfg/metadata.json").write_text(json.dumps({"new_embodiment": metadata()}))
    return policy


def observation(size: int = 3) -> Observation:
    rng = np.random.default_rng(1)
    pictures = torch.as_tensor(rng.integers(0, 256, (2, size, PX, 24, 3), np.uint8))
    images = {"ego_view": pictures[0], "wrist": pictures[1]}
    state = torch.as_tensor(rng.uniform(-2, 2, (size, 4)).astype(np.float32))
    return Observation(images=images, state=state, tasks=("go", "pick it up", "")[:size])


@EITHER
def test_it_acts_as_what_was_written(kind, tmp_path):
    policy = write(kind, tmp_path)
    spec, normalizers, weights = gr00t.read(tmp_path)
    assert spec.schema == policy.spec.schema and spec.horizon == HORIZON
    restored: Any = Policy.restore(spec, normalizers)
    restored.load_state_dict(weights)  # strictly: every key is mapped
    seen = observation()
    expected = policy.predict_action(seen, generator("noise"))
    assert torch.equal(restored.eval().predict_action(seen, generator("noise")), expected)
    assert expected.std() > 0.01 and expected.shape == (3, HORIZON, 4)
    frozen = {name for name, p in restored.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in weights if name.startswith("backbone.language.")}  # as its config says


@EITHER
def test_what_is_read_is_what_its_config_says(kind, tmp_path):
    write(kind, tmp_path)
    spec, normalizers, _ = gr00t.read(tmp_path, robot="new_embodiment")
    options = spec.config.backbone_options
    assert (options["preset"], options["select_layer"], options["vocabulary"]) == ("tiny", 1, 270)
    n1 = kind == "gr00t_n1"
    shape = options["shuffle"], options["connector"], options["project_to_dim"]
    assert shape == ((2, 2, 24) if n1 else (1, 1, None))
    head = spec.config.head_options
    assert (head["embodiment"], head["max_embodiments"], head["steps"]) == (31, 32, 4)
    assert (spec.config.pad_state, spec.config.pad_action) == (PADDED_STATE, PADDED_ACTION)
    assert [c.name for c in spec.schema.state] == ["arm_0", "arm_1", "arm_2", "hand_0"]
    low = metadata()["statistics"]["action"]["arm"]["min"]
    assert normalizers["action"].apply(np.array([*low, 0.0]))[:3] == pytest.approx([-1, -1, -1])
    assert PolicySpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_component_that_never_moved_is_read_as_zero_and_answered_with_its_value(tmp_path):
    write("gr00t_n1", tmp_path)
    path = tmp_path / "experiment_cfg/metadata.json"
    value = json.loads(path.read_text())
    for feature in ("state", "action"):
        value["new_embodiment"]["statistics"][feature]["hand"] |= {"min": [0.7], "max": [0.7]}
    path.write_text(json.dumps(value))
    _, normalizers, _ = gr00t.read(tmp_path)
    assert abs(normalizers["state"].apply(np.array([0.0, 0, 0, 5.0]))[3]) < 1e-5
    assert normalizers["action"].invert(np.array([0.0, 0, 0, 1.0]))[3] == pytest.approx(0.7, abs=1e-5)


def test_keys_that_are_not_ours_keep_their_names_and_are_refused_by_a_strict_load(tmp_path):
    write("gr00t_n1_5", tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"backbone.lora.A": torch.zeros(1), "action_head.mask_token": torch.zeros(1)}, file)
    spec, normalizers, weights = gr00t.read(tmp_path)
    known = Policy.restore(spec, normalizers).state_dict()
    assert weights.keys() - known.keys() == {"backbone.lora.A", "head.mask_token"}
    assert not any("lm_head" in name or "layers.1." in name for name in weights)


def change(path: Path, *keys: str, value: Any) -> None:
    """Of a JSON file."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


CONFIG, METADATA = "config.json", "experiment_cfg/metadata.json"


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        (CONFIG, ("model_type",), "gr00t_n1_7", "model_type is not one of gr00t_n1, gr00t_n1_5"),
        (CONFIG, ("backbone_cfg",), None, "has no backbone_cfg"),
        (
            CONFIG,
            ("action_head_cfg", "diffusion_model_cfg", "num_layers"),
            33,
            r"33, 4, 16\); no such DiT is known here",
        ),
        (CONFIG, ("action_head_cfg", "vl_self_attention_cfg"), {"num_attention_heads": 3}, "has 3 heads; only 2"),
        (METADATA, ("gr1",), {}, None),
        (METADATA, ("new_embodiment", "modalities", "video"), {}, "modalities are not cameras, state and action"),
        (METADATA, ("new_embodiment", "modalities", "video", "wrist", "resolution"), [8, 8], "only one size"),
        (METADATA, ("new_embodiment", "statistics", "state"), {}, "holds no min, max, mean and std of state"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(file, keys, value, message, tmp_path):
    write("gr00t_n1", tmp_path)
    change(tmp_path / file, *keys, value=value)
    if message is None:
        assert gr00t.read(tmp_path)[0].config.head_options["embodiment"] == 31  # new_embodiment is meant
        return
    with pytest.raises(BadInput, match=message) as fault:
        gr00t.read(tmp_path)
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_robots_and_files_that_are_not_there_are_refused(tmp_path):
    write("gr00t_n1", tmp_path)
    with pytest.raises(BadInput, match="is of new_embodiment, not of oxe_droid; name one of them"):
        gr00t.read(tmp_path, robot="oxe_droid")
    (tmp_path / METADATA).write_text(json.dumps({"gr1": metadata()}))
    with pytest.raises(BadInput, match="gr1's state goes in as sines and cosines"):
        gr00t.read(tmp_path)
    (tmp_path / METADATA).write_text(json.dumps({"my_robot": metadata()}))
    with pytest.raises(BadInput, match="which projector is my_robot's is not known; one of oxe_droid"):
        gr00t.read(tmp_path)
    (tmp_path / METADATA).write_text(json.dumps({"new_embodiment": metadata()}))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"tokenizer.json: is missing; copy the one of GR00T's"):
        gr00t.read(tmp_path)
