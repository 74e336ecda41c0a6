"""LeRobot's own pi0 and pi0.5, saved its own way, read as ours: the same chunks in the robot's units."""

import json

import pytest
import tiny_pi0
import torch
from safetensors.torch import load_file, save_file
from tiny_paligemma import published_sizes
from tiny_policy import ACTION, PX, SCHEMA, STATE, generator
from torch.testing import assert_close

from data.errors import BadInput
from models.policy import Policy
from models.published.loading import load_published
from models.published.pi0 import read, renamed
from models.types import Observation

HORIZON, B = 4, 3
TASKS = ["pick up the cube", "pick_up\nit", "pick up the red cube\n"]
KINDS = pytest.mark.parametrize("kind", ["pi0", "pi05"])
WEIGHTS, BEFORE, CONFIG = "model.safetensors", "policy_preprocessor.json", "config.json"


@pytest.fixture(autouse=True)
def tiny():
    """What is published is tiny, theirs and ours."""
    with tiny_pi0.tiny(), published_sizes():
        yield


def saved(folder, kind: str, **options):
    return tiny_pi0.write(folder, kind, SCHEMA, horizon=HORIZON, **options)


def observed() -> tuple[Observation, dict]:
    """The same for us and for LeRobot's processors; the state leaves its quantiles on both sides."""
    pictures = {
        name: torch.randint(0, 256, (B, PX, PX, 3), generator=generator(name), dtype=torch.uint8)
        for name in SCHEMA.cameras
    }
    state = torch.randn(B, STATE, generator=generator("state"))
    theirs = {f"observation.images.{name}": p.permute(0, 3, 1, 2).float() / 255 for name, p in pictures.items()}
    return Observation(images=pictures, state=state, tasks=(*TASKS,)), theirs | {
        "observation.state": state,
        "task": [*TASKS],
    }


@pytest.mark.parametrize(("kind", "options"), [("pi0", {}), ("pi05", {}), ("pi0", {"empty_cameras": 1})])
def test_chunks_in_units_are_lerobot_s(kind, options, tmp_path):
    folder = saved(tmp_path, kind, **options)
    theirs = tiny_pi0.policy(kind, SCHEMA, horizon=HORIZON, **options)
    before, after = tiny_pi0.processors(folder, theirs.config)
    seen, batch = observed()
    noise = torch.randn(B, HORIZON, theirs.config.max_action_dim, generator=generator("noise"))
    expected = after(theirs.predict_action_chunk(before(batch), noise=noise))
    ours = load_published(folder)
    assert_close(ours.predict_action(seen, noise=noise), expected, atol=1e-5, rtol=1e-5)
    assert ours.spec.schema.cameras == SCHEMA.cameras and ours.spec.schema.image_size == (PX, PX)
    assert [c.name for c in ours.spec.schema.action] == [f"action_{i}" for i in range(ACTION)]
    assert ours.spec == type(ours.spec).from_json(json.loads(json.dumps(ours.spec.to_json())))


@KINDS
def test_every_weight_has_its_place_or_is_listed_as_unread(kind, tmp_path):
    theirs = tiny_pi0.policy(kind, SCHEMA).state_dict()
    ours = renamed(theirs)
    spec, normalizers, _ = read(saved(tmp_path, kind))
    assert ours.keys() == Policy.restore(spec, normalizers).state_dict().keys()
    language, last = "model.paligemma_with_expert.paligemma.model.language_model", tiny_pi0.SMALLEST.depth - 1
    used = {id(tensor) for tensor in ours.values()}
    assert {name for name, tensor in theirs.items() if id(tensor) not in used} == {
        "model.paligemma_with_expert.paligemma.lm_head.weight",  # tied to the embedding
        "model.paligemma_with_expert.gemma_expert.lm_head.weight",
        f"{language}.norm.weight",
        f"{language}.layers.{last}.post_attention_layernorm.weight",
        *(f"{language}.layers.{last}.self_attn.{part}_proj.weight" for part in "qo"),
        *(f"{language}.layers.{last}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_names_without_prefix_and_the_tied_matrix_under_either_name_fit_too(tmp_path):
    whole = load_file(saved(tmp_path, "pi0") / WEIGHTS)
    expected = load_published(tmp_path).state_dict()
    embedding = next((n for n in whole if n.endswith("embed_tokens.weight")), None)
    tied = "model.paligemma_with_expert.paligemma.lm_head.weight"
    matrix = whole.pop(embedding) if embedding else whole[tied]
    whole[tied] = matrix
    save_file({name.removeprefix("model."): w.contiguous() for name, w in whole.items()}, tmp_path / WEIGHTS)
    found = load_published(tmp_path).state_dict()
    assert all(torch.equal(found[name], w) for name, w in expected.items())


# -- refusals --------------------------------------------------------------------------------------------------------


def change(folder, file, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def first_step(folder, name, **values):
    content = json.loads((folder / BEFORE).read_text())
    next(s for s in content["steps"] if s["registry_name"] == name).update(values)
    (folder / BEFORE).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, CONFIG, paligemma_variant="gemma_300m"), "paligemma_variant is gemma_300m"),
        (lambda f: change(f, CONFIG, use_relative_actions=True), "use_relative_actions is True"),
        (lambda f: change(f, CONFIG, image_resolution=[28, 56]), r"image_resolution is \[28, 56\]"),
        (lambda f: change(f, CONFIG, min_period=1e-3), "min_period is 0.001"),
        (
            lambda f: first_step(f, "relative_actions_processor", config={"enabled": True}),
            "its actions are relative to the state",
        ),
        (lambda f: first_step(f, "pi0_new_line_processor", registry_name="mine"), "step 'mine' is not known here"),
        (lambda f: first_step(f, "pi0_new_line_processor", registry_name="tokenizer_processor"), "how a task is put"),
        (lambda f: change(f, BEFORE, steps=[{"class": "os.system"}]), "holds no steps of a processor"),
        (lambda f: (f / BEFORE).unlink(), "policy_preprocessor.json: is missing"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 64), "model.safetensors: cannot be read as safetensors"),
        (lambda f: other_weights(f), r"of \d+ weights 1 missing, 1 unknown: .*action_in_proj"),
    ],
)
def test_refused(damage, message, tmp_path):
    damage(saved(tmp_path, "pi0"))
    with pytest.raises(BadInput, match=message) as fault:
        load_published(tmp_path)
    assert "\n" not in str(fault.value)


def other_weights(folder):
    weights = load_file(folder / WEIGHTS)
    weights["model.stranger.weight"] = weights.pop("model.action_in_proj.weight")
    save_file(weights, folder / WEIGHTS)
