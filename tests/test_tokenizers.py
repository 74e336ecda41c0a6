"""The tokenizer: found where a person would put it, refused in one line, and a tiny one that behaves as PaliGemma's."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from data.errors import BadInput
from models.tokenizers import HUB_ID, find_tokenizer, paligemma_dir, write_tiny_tokenizer

TASK = "put the blüe cube, 3 cm high, into the bin\n"


@pytest.fixture
def own_root(tmp_path, monkeypatch):
    """A root and a hub cache with nothing in them."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path / "root"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_tiny_one_pads_right_begins_with_bos_and_keeps_every_character(own_root):
    tokenizer = find_tokenizer(write_tiny_tokenizer(own_root / "tiny"))
    assert len(tokenizer) < 300
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id] == [0, 1, 2]
    batch = tokenizer([TASK, "lift\n"], padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    assert torch.as_tensor(batch["input_ids"]).shape == (2, 64)
    for row, text in enumerate((TASK, "lift\n")):
        ids, mask = torch.as_tensor(batch["input_ids"])[row], torch.as_tensor(batch["attention_mask"])[row]
        length = int(mask.sum())
        assert mask.tolist() == [1] * length + [0] * (64 - length)
        assert ids[0] == tokenizer.bos_token_id and not ids[length:].any()
        assert ids[length - 1] == tokenizer.convert_tokens_to_ids("\n") != tokenizer.unk_token_id
        assert tokenizer.decode(ids[:length], skip_special_tokens=True) == text


def test_transformers_own_loader_reads_the_tiny_one_alike(own_root):
    folder = write_tiny_tokenizer(own_root / "tiny")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.padding_side == "right"
    assert theirs(TASK)["input_ids"] == find_tokenizer(folder)(TASK)["input_ids"]


def test_bos_comes_first_even_if_the_file_does_not_say_so(own_root):
    from tokenizers import Tokenizer, processors

    folder = write_tiny_tokenizer(own_root / "tiny")
    path = str(folder / "tokenizer.json")
    plain = Tokenizer.from_file(path)
    plain.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    plain.save(path)
    assert Tokenizer.from_file(path).encode("a").ids[0] != 2
    assert find_tokenizer(folder).encode("a")[0] == 2


def test_the_checkpoint_s_own_wins_then_the_store_then_the_hub_s_cache(own_root):
    checkpoint = own_root / "checkpoint"
    snapshot = own_root / "cache" / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    for place, mark in ((snapshot, "<hub>"), (paligemma_dir(), "<store>"), (checkpoint, "<own>")):
        path = write_tiny_tokenizer(place) / "tokenizer.json"
        path.write_text(path.read_text().replace("<0xFF>", mark))
        assert find_tokenizer(checkpoint).convert_ids_to_tokens(259) == mark


def test_a_missing_tokenizer_is_one_line_that_says_how_to_get_it(own_root):
    with pytest.raises(BadInput) as raised:
        find_tokenizer(own_root / ("a-long-folder-name/" * 12))
    line = str(raised.value)
    assert HUB_ID in line and "flywheel fetch paligemma" in line and "licence" in line
    assert "\n" not in line and len(line) < 200


@pytest.mark.parametrize(("damage", "said"), [(lambda t: t[: len(t) // 2], "no tokenizer"),
                                              (lambda t: t.replace("<bos>", "<go>"), "no token <bos>")])  # fmt: skip
def test_a_damaged_or_foreign_tokenizer_is_named(own_root, damage, said):
    path = write_tiny_tokenizer(own_root / "tiny") / "tokenizer.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(BadInput, match=said) as raised:
        find_tokenizer(path.parent)
    assert "tokenizer.json" in str(raised.value) and len(str(raised.value)) < 200
