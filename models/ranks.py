"""One training in several processes on this machine, started from wherever a training is started.

```
 processes = 1   work(job, on_metrics)                              here
 processes = n   rank 0: work(job, on_metrics) --queue--> here      each rank in a process of its own; torch's
                 rank 1: work(job, nothing)                         elastic agent ends all of them when one dies
```
Inside, Accelerate finds the ranks as under `accelerate launch` or torchrun and shares out each batch. Several machines
are what those are for: they start the same `fit`.
"""

import os
import queue
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.errors import BadInput

OnMetrics = Callable[[int, dict[str, float]], None]


def in_ranks[J](work: Callable[[J, OnMetrics], Path], job: J, processes: int, on_metrics: OnMetrics) -> Path:
    """`work(job, on_metrics)` in `processes` ranks; returns rank 0's answer.

    `work` is a function of a module and `job` can be pickled. Raises the `BadInput` that a rank raised, and torch's
    `ChildFailedError` for anything else that ended one.
    """
    if processes == 1:
        return work(job, on_metrics)
    import torch.multiprocessing as multiprocessing
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    told, refused = multiprocessing.get_context("spawn").Queue(), []
    listener = threading.Thread(target=_listen, args=(told, on_metrics, refused), daemon=True)
    listener.start()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
    )
    try:
        return elastic_launch(config, _rank)(work, job, told)[0]
    except ChildFailedError:
        _hang_up(told, listener)
        if refused:
            raise BadInput(refused[0]) from None
        raise
    finally:
        _hang_up(told, listener)


def _rank[J](work: Callable[[J, OnMetrics], Path], job: J, told: Any) -> Path:
    """The body of one process."""
    import torch

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # gloo
    first = os.environ["RANK"] == "0"
    try:
        return work(job, (lambda step, metrics: told.put((step, metrics))) if first else (lambda step, metrics: None))
    except BadInput as fault:
        told.put(str(fault))
        told.close()
        told.join_thread()  # or it would be lost with this process
        raise


def _hang_up(told: Any, listener: threading.Thread) -> None:
    if listener.is_alive():
        told.put(None)
        listener.join()


def _listen(
    told: "queue.Queue[tuple[int, dict[str, float]] | str | None]", on_metrics: OnMetrics, refused: list
) -> None:
    while (heard := told.get()) is not None:
        if isinstance(heard, str):
            refused.append(heard)
        else:
            on_metrics(*heard)
