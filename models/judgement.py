"""A critic looks at every chunk of one collection, once, so that no later training has to run it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.loader import ChunkSource
from data.values import Values
from models.critic import Critic
from models.types import Batch

BATCH = 256  # chunks per question


@torch.inference_mode()
def judge(critic: Critic, source: ChunkSource, on_chunks: Callable[[int], None] = lambda n: None) -> Values:
    """Q and V of every chunk of `source`, in its order; with proposals beside it, the best of them too."""
    critic = critic.eval()
    answers: list[dict[str, Tensor]] = []
    for first in range(0, len(source), BATCH):
        index = np.arange(first, min(first + BATCH, len(source)))
        columns = source.gather(index, source.buffers(len(index)))
        answers.append(_answer(critic, columns))
        on_chunks(len(index))
    whole = {name: torch.cat([a[name] for a in answers]).cpu().numpy() for name in answers[0]}
    return Values(**whole)


def _answer(critic: Critic, columns: dict) -> dict[str, Tensor]:
    batch = Batch.of(columns).to(critic.device)
    seen = critic.prepare(batch.observation)
    mask = critic.mask(batch.action_is_pad)
    v = critic.v(seen)
    answer = {"q": critic.q(seen, critic.normalised(batch.action, mask), mask), "v": v}
    if "proposals" not in columns:
        return answer
    proposals = torch.as_tensor(columns["proposals"]).to(critic.device)
    q = critic.ranked(seen, proposals)
    best = q.min(dim=-1).values.argmax(dim=1)
    same = (q.argmax(dim=1) == best[:, None]).all(dim=-1)
    above = (q[torch.arange(len(q)), best] > v[:, None]).all(dim=-1)
    return answer | {"best": best, "agreed": same & above}
