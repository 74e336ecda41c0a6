"""A task's words as a vector, learnt from their bytes: nothing to download, any language, a few hundred tasks."""

from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from models.layers.embedding import sequence_positions

LONGEST = 128  # bytes that are read
BYTES = 256
END = 0  # a byte no text holds; pads too
READ = 32  # width of a byte's embedding


class Words(nn.Module):
    """One attention layer over UTF-8 bytes and their places, then the mean. Equal tasks are read once per call."""

    places: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, READ)
        self.read = nn.TransformerEncoderLayer(READ, nhead=4, dim_feedforward=2 * READ, dropout=0.0, batch_first=True)
        self.vector = nn.Linear(READ, width)
        self.register_buffer("places", sequence_positions(LONGEST, READ), persistent=False)

    def forward(self, tasks: tuple[str, ...]) -> Float[Tensor, "b d"]:
        distinct = sorted(set(tasks))
        text = torch.stack([_bytes(task) for task in distinct]).to(self.places.device)
        text = text[:, : max(1, int((text != END).sum(dim=1).max()))]
        is_pad = text == END
        is_pad[:, 0] = False  # a task without words is one byte long
        states = self.read(self.byte(text) + self.places[: text.shape[1]], src_key_padding_mask=is_pad)
        counts = (~is_pad).to(states.dtype)[..., None]
        vectors = self.vector((states * counts).sum(dim=1) / counts.sum(dim=1))
        row = {task: i for i, task in enumerate(distinct)}
        return vectors[torch.tensor([row[task] for task in tasks], device=vectors.device)]


@lru_cache(maxsize=4096)
def _bytes(task: str) -> Int64[Tensor, " n"]:
    text = task.encode()[:LONGEST]
    return torch.tensor([*text, *[END] * (LONGEST - len(text))])
