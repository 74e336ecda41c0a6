"""What a critic thinks of every chunk: a table beside the chunk table, row by row.

```
 chunks.parquet    start t h next reward discount ...          the data, as it happened
 values.parquet    q1 q2 v | best agreed return                one critic's judgement of it
```
Source data is never touched; another critic writes another table. `best` is the proposal that the smaller Q ranks
first, `agreed` whether each Q on its own ranks it first and puts it above V.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Float32, Int64

from data.chunks import ChunkTable
from data.errors import BadInput


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """A critic's judgement of n chunks, in the order of their table."""

    q: Float32[np.ndarray, "n 2"]  # of the executed chunk
    v: Float32[np.ndarray, " n"]
    best: Int64[np.ndarray, " n"] | None = None  # number of the best proposal, where there are proposals
    agreed: Bool[np.ndarray, " n"] | None = None

    @property
    def advantage(self) -> Float32[np.ndarray, " n"]:
        """min Q - V: how much better the executed chunk is than what to expect."""
        return self.q.min(axis=1) - self.v


def write_values(values: Values, path: Path) -> None:
    columns = {"q1": values.q[:, 0], "q2": values.q[:, 1], "v": values.v}
    ranked = {} if values.best is None else {"best": values.best, "agreed": values.agreed}
    pl.DataFrame(columns | ranked).write_parquet(path)


def read_values(path: Path) -> Values:
    """What `write_values` wrote. Raises `BadInput` on a damaged file or one of another kind."""
    try:
        table = pl.read_parquet(path)
        ranked = {name: table[name].to_numpy() for name in ("best", "agreed") if name in table.columns}
        return Values(q=table[["q1", "q2"]].to_numpy(), v=table["v"].to_numpy(), **ranked)
    except (OSError, pl.exceptions.PolarsError) as fault:
        raise BadInput(f"{path}: no table of values ({type(fault).__name__}); judge the chunks again") from fault


def realised_return(table: ChunkTable) -> Float[np.ndarray, " n"]:
    """What each chunk and those that followed it every H steps really earned: G_t = r_t + γ^h · G_{t+h}.

    An episode that was cut off counts what it had earned until then.
    """
    rows, stride = table.rows, table.meta.config.stride
    if table.meta.config.horizon % stride:
        raise BadInput(f"stride {stride} does not divide the horizon: chunks do not follow each other; build with 1")
    episode, h = rows["episode_index"].to_numpy(), rows["h"].to_numpy()
    reward, gamma = rows["reward"].to_numpy(), table.meta.config.gamma
    step = table.meta.config.horizon // stride
    total = reward.astype(np.float64)
    for i in range(len(rows) - 1, -1, -1):
        after = i + step
        if after < len(rows) and episode[after] == episode[i]:
            total[i] += gamma ** int(h[i]) * total[after]
    return total
