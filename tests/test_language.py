"""Tasks as CLIP's vectors: the table a policy keeps, the weights they come from, the stage that makes them once."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from malformed import tiny_dataset
from test_diffusion import config
from tiny_policy import STATE, batch, build, generator
from torch.testing import assert_close

from data.errors import BadInput
from models.checkpoint import load_policy, publish, save_policy
from models.config import PolicyConfig
from models.layers.language import (
    CLIP_WIDTH,
    FILES,
    LanguageTable,
    clip_digest,
    clip_dir,
    clip_embeddings,
    fill_tables,
    find_clip,
)
from tasks.language import embed_tasks, fill_in, language_of, with_tasks
from tasks.stages import Session, ensure, session

TASKS = ("lift the cube", "pick up the cube")
LONGEST = 12  # tokens that the tiny CLIP reads


def vectors(*texts: str) -> dict[str, torch.Tensor]:
    return {text: torch.randn(CLIP_WIDTH, generator=generator(text)) for text in texts}


def with_language(**options) -> PolicyConfig:
    return config(backbone={"language": "clip", "tasks": TASKS, **options})


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A whole CLIP of transformers' own class, as small as can be, with a byte tokenizer that ends texts as CLIP's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPConfig, CLIPModel

    from models.tokenizers import byte_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "projection_dim": CLIP_WIDTH}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    text = {**narrow, **ends, "num_hidden_layers": 2, "vocab_size": 262, "max_position_embeddings": LONGEST}
    picture = {**narrow, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=CLIP_WIDTH)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    return tmp_path


# -- the table -------------------------------------------------------------------------------------------------------


def test_each_sample_gets_the_row_of_its_task_and_nothing_trains_them():
    table, known = LanguageTable(TASKS), vectors(*TASKS)
    table.fill(known)
    assert torch.equal(table((TASKS[1], TASKS[0], TASKS[1])), torch.stack([known[TASKS[i]] for i in (1, 0, 1)]))
    assert not list(table.parameters())
    copied = LanguageTable(TASKS)
    copied.load_state_dict(table.state_dict())
    assert torch.equal(copied(TASKS), table(TASKS))


def test_what_is_not_known_is_refused_and_never_zero():
    table = LanguageTable(TASKS)
    with pytest.raises(BadInput, match=r"task 'lift the cube' has no vector yet; train by `flywheel train`"):
        table(TASKS[:1])
    with pytest.raises(BadInput, match=r"no vector for task 'pick up the cube'"):
        table.fill(vectors(TASKS[0]))
    with pytest.raises(BadInput, match=r"is \(3,\), not \(512,\)"):
        table.fill(dict.fromkeys(TASKS, torch.zeros(3)))
    table.fill(vectors(*TASKS))
    with pytest.raises(BadInput, match="is not one of the 2 tasks it was trained on") as fault:
        table((TASKS[0], "stack " + "very " * 100))
    assert len(str(fault.value)) < 200


# -- a policy --------------------------------------------------------------------------------------------------------


def test_words_reach_the_chunk_and_the_checkpoint(tmp_path):
    policy = build(with_language()).eval()
    fill_tables(policy, vectors(*TASKS))
    plain, data = build(config()), batch()
    assert policy.backbone.width == plain.backbone.width + 32
    pooled = policy.context(data.observation).pooled
    other = replace(data.observation, tasks=(TASKS[0],) * 8)
    changed = (policy.context(other).pooled != pooled).any(dim=0)
    assert changed.tolist() == [i >= plain.backbone.width for i in range(policy.backbone.width)]
    assert torch.equal(pooled[:, :STATE], policy.prepare(data.observation).state)
    publish(tmp_path / "step-1", lambda hidden: save_policy(policy, hidden), step=1)
    loaded = load_policy(tmp_path / "step-1")
    assert torch.equal(loaded.predict_action(other, generator(0)), policy.predict_action(other, generator(0)))
    with pytest.raises(BadInput, match="task 'juggle' is not one of the 2 tasks"):
        loaded.predict_action(replace(other, tasks=("juggle",) * 8), generator(0))


def test_tasks_that_nobody_reads_are_refused():
    with pytest.raises(BadInput, match="tasks without language are not read; set language clip"):
        build(config(backbone={"tasks": TASKS}))


# -- CLIP ------------------------------------------------------------------------------------------------------------


def test_vectors_are_transformers_own(clip):
    from transformers import CLIPModel

    from models.layers.language import _tokenizer

    tokenizer = _tokenizer(clip)
    model = CLIPModel.from_pretrained(clip, local_files_only=True).eval()
    found = clip_embeddings(clip, ["pick up", "lift it and more and more"])
    for text, vector in found.items():
        ids = tokenizer.encode(text).ids
        assert len(ids) > LONGEST or text == "pick up"
        cut = ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], 1]  # what is too long still ends as CLIP's texts do
        with torch.no_grad():
            expected = model.get_text_features(input_ids=torch.tensor([cut])).pooler_output[0]
        assert vector.dtype == torch.float32 and vector.shape == (CLIP_WIDTH,)
        assert_close(vector, expected, atol=1e-6, rtol=0)


def test_weights_are_looked_for_where_they_are_fetched_to(clip, store, monkeypatch):
    monkeypatch.setattr("models.layers.language._hub_cache", lambda: None)
    with pytest.raises(BadInput, match=r"no CLIP there or in the hub's cache; run `flywheel fetch clip`") as fault:
        find_clip()
    assert len(str(fault.value)) < 200
    monkeypatch.setattr("models.layers.language._hub_cache", lambda: clip)
    assert find_clip() == clip
    shutil.copytree(clip, clip_dir())
    assert find_clip() == clip_dir() and clip_digest(clip_dir()) == clip_digest(clip)
    with pytest.raises(BadInput, match=r"elsewhere/model.safetensors: no CLIP there; run"):
        find_clip(store / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model.safetensors": b"no"}, "model.safetensors: cannot be read as safetensors"),
        ({"config.json": b'{"model_type": "bert"}'}, "config.json: is no CLIP's"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json: cannot be read as a tokenizer"),
    ],
)
def test_what_is_no_clip_is_refused_in_one_line(clip, tmp_path, damage, message):
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    for name, content in damage.items():
        (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as fault:
        clip_embeddings(folder, ["t"])
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_weights_that_lack_a_part_are_refused(clip, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"text_projection.weight is missing"):
        clip_embeddings(folder, ["t"])


# -- the stage -------------------------------------------------------------------------------------------------------


def test_a_training_set_s_tasks_become_vectors_once(clip, store, tmp_path):
    shutil.copytree(clip, clip_dir())
    source = tiny_dataset(tmp_path / "recorded")
    with session(Session()) as current:
        batch = ensure("adopt", {"content": "tiny"}, execution={"source": str(source)})
        dataset = ensure("dataset", {"held_out": 0.0, "failures": False}, [batch])
        language = embed_tasks(dataset)
        assert embed_tasks(dataset).digest == language.digest
    assert [o.cached for o in current.outcomes if o.stage == "language"] == [False, True]
    texts = json.loads((language.dir / "texts.json").read_text())
    assert texts == ["lift the cube", "pick the cube up"]

    assert language_of({"backbone_options": {"language": "clip"}}, dataset)[0].digest == language.digest
    assert language_of({"backbone_options": {}}, dataset) == []
    asked = with_language(tasks=())
    assert with_tasks(asked, []) == asked
    policy = build(with_tasks(asked, [language]))
    fill_in(policy, [language])
    expected = clip_embeddings(clip, texts)
    assert torch.equal(policy.backbone.words(tuple(texts)), torch.stack([expected[text] for text in texts]))


def test_other_weights_are_other_vectors(clip, store, tmp_path):
    """Provenance: the artefact's key holds what CLIP's files hold."""
    folder = clip_dir()
    shutil.copytree(clip, folder)
    before = clip_digest(folder)
    for name in FILES:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        assert clip_digest(folder) != before
        (folder / name).write_bytes(content)
