"""Tasks in words as the token ids a language model reads.

| tokenizer          | what it is                                                                              |
|--------------------|-----------------------------------------------------------------------------------------|
| "" (the default)   | one id per byte, 262 in all, made in memory: nothing to download, for models that start |
|                    | from random weights                                                                     |
| a folder           | `tokenizer.json` of a published language model, read by the `tokenizers` library alone   |
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from data.errors import BadInput
from models.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTE_VOCABULARY = 262  # ids that a byte tokenizer knows


class Instructions:
    """Reads each text once; a batch is as long as its longest text, padded on the right with id `pad`."""

    def __init__(self, tokenizer: str = "", *, longest: int = 48, pad: int = 0) -> None:
        """longest: ids that are read of a text; the rest is left away.

        Raises `BadInput` for a folder without a `tokenizer.json` that can be read.
        """
        self.tokenizer = _load(Path(tokenizer)) if tokenizer else byte_tokenizer()
        self.longest, self.pad = longest, pad
        self.known: dict[str, list[int]] = {}

    def __call__(
        self, tasks: tuple[str, ...], device: torch.device | str = "cpu"
    ) -> tuple[Int64[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """Token ids, and which of them are padding."""
        texts = [self._ids(task) for task in tasks]
        lengths = torch.tensor([len(ids) for ids in texts])
        n = max(1, int(lengths.max()))
        ids = torch.tensor([[*text, *[self.pad] * (n - len(text))] for text in texts])
        is_pad = torch.arange(n) >= lengths[:, None]
        return ids.to(device), is_pad.to(device)

    def _ids(self, task: str) -> list[int]:
        if task not in self.known:
            self.known[task] = self.tokenizer.encode(task).ids[: self.longest]
        return self.known[task]


def _load(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what this library raises for a file that it cannot read has no class of its own
        raise BadInput(f"{path}: cannot be read as a tokenizer ({error}); name the folder of the model") from None
