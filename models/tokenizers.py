"""The PaliGemma tokenizer that pi0 reads its instructions with: found on disk, or a tiny one made for tests and demos.

Looked for in this order, and never downloaded from here:
```
<checkpoint>/            tokenizer.json beside the weights
store/checkpoints/paligemma/
the hub's cache          google/paligemma-3b-pt-224, gated: its licence has to be accepted once, on its page
```
Only `tokenizer.json` is read, by the `tokenizers` library: no code from a tokenizer's folder runs, no pickle is opened.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.paths import store_dir
from data.untrusted import fault

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

HUB_ID = "google/paligemma-3b-pt-224"
FETCH = "`flywheel fetch paligemma`"
VOCABULARY, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# PaliGemma's own, ids 0 to 3 in this order: padding is row 0 of the embedding.
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
SPACE = "▁"  # what the vocabulary writes for a space


def paligemma_dir() -> Path:
    """Where a PaliGemma tokenizer that serves every checkpoint lies."""
    return store_dir() / "checkpoints" / "paligemma"


def find_tokenizer(folder: Path | str) -> "PreTrainedTokenizerFast":
    """The tokenizer of the checkpoint in `folder`; it pads on the right.

    Raises `BadInput` saying how to get one when it is nowhere, and naming the file when it cannot be read.
    """
    for place in (Path(folder), paligemma_dir(), _hub_cache()):
        if place is not None and (place / VOCABULARY).is_file():
            return _load(place)
    raise fault(
        Path(folder),
        VOCABULARY,
        "no PaliGemma tokenizer there, in the store or the hub's cache",
        f"accept the licence of hub {HUB_ID}, then {FETCH}",
    )


def byte_tokenizer() -> "Tokenizer":
    """A tokenizer of 262 tokens, built as PaliGemma's is but with no words in it; nothing is downloaded.

    It has PaliGemma's four special tokens under their own ids, a token for "\\n", one for a space, and one for each
    byte of everything else.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256)), "\n", SPACE]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL["unk_token"], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = _begin_with_bos(tokenizer)
    return tokenizer


def write_tiny_tokenizer(folder: Path | str) -> Path:
    """Write the byte tokenizer into `folder`, to stand in for PaliGemma's in tests and demos. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / VOCABULARY))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", **SPECIAL}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return folder


def _load(folder: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = folder / VOCABULARY
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what this library raises for a file that it cannot read has no class of its own
        raise fault(folder, VOCABULARY, f"is no tokenizer: {error}", FETCH) from None
    for token in SPECIAL.values():
        if tokenizer.token_to_id(token) is None:
            raise fault(folder, VOCABULARY, f"has no token {token}, so it is not PaliGemma's", FETCH)
    tokenizer.post_processor = _begin_with_bos(tokenizer)  # as pi0 was trained, whatever the file says
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **SPECIAL)


def _begin_with_bos(tokenizer: "Tokenizer") -> "TemplateProcessing":
    from tokenizers.processors import TemplateProcessing

    bos = SPECIAL["bos_token"]
    return TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])


def _hub_cache() -> Path | None:
    """The folder of the hub's cache that holds PaliGemma's tokenizer, if somebody has fetched it."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_ID, VOCABULARY)
    return Path(found).parent if isinstance(found, str) else None
