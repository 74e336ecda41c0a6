"""Chunk-level offline RL on a LeRobot dataset: the seed design's trainer, on our stages.

```
 dataset_dir -> frames, chunks -> (pi0's proposals) -> Q, V and policy together -> a checkpoint
```
Every box is a cached artefact of the store: the same call again finds it, a killed one goes on.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.chunk_config import ChunkConfig
from data.errors import BadInput
from data.paths import root
from data.refs import Ref
from data.relabel_config import Relabel
from data.store import Store
from models.config import ChunkRLConfig, CriticConfig, FitConfig, PolicyConfig
from tasks.actors import checkpoint_in
from tasks.adopt import adopt_datasets
from tasks.chunks import chunk_tables
from tasks.dataset import aggregate_batches, read_set
from tasks.frames import frame_stores
from tasks.recipe import Collect, Dataset, Recipe, jsonable
from tasks.relabel import relabel_chunks
from tasks.train import train_phase


@dataclass(frozen=True, kw_only=True)
class OfflineRL:
    """Chunk-level offline RL on a LeRobot dataset. docs/hyperparameters.md says when to change which option."""

    dataset_dir: str  # LeRobot dataset with sub-goal columns
    action_horizon: int = 10  # H, actions per chunk
    action_dim: int = 7  # components of an action; refused if the dataset has another number
    gamma: float = 0.99  # discount per step
    beta: float = 1.0  # weight of a chunk = exp(beta * advantage)
    lambda_v: float = 1.0  # weight of V's loss; acts with joint
    lambda_pi: float = 1.0  # weight of the policy's loss; acts with joint
    lr: float = 3e-4  # peak learning rate
    batch_size: int = 32  # chunks per step; 64 and more on a large GPU
    num_epochs: int = 100  # passes over all chunks
    device: str = ""  # cpu or cuda; empty = the best there is
    use_pi0_actions: bool = False  # V averages over chunks that pi0 proposes (algorithm sarsa_entropy)
    pi0_config: str = "pi05_libero"  # folder below pi0_checkpoints_dir
    pi0_checkpoints_dir: str = "store/checkpoints/pi0"  # where `flywheel fetch` puts them
    save_interval: int = 10  # epochs between checkpoints
    log_interval: int = 100  # steps between two points of a curve
    resume: str = ""  # folder of a checkpoint artefact to start from; a killed run goes on by itself
    algorithm: str = "iql"  # or sarsa_entropy, the seed design's V
    alpha: float = 0.0  # entropy per dimension in V's target; sarsa_entropy only
    expectile: float = 0.7  # of iql's V
    joint: bool = False  # one objective through one backbone, in which the lambdas act
    head: str = "gaussian"  # of the policy: gaussian, flow or act
    seed: int = 0  # weights, order, noise


class ChunkLevelOfflineRL:
    """`ChunkLevelOfflineRL(dataset_dir="...").train(num_epochs=100)` returns the checkpoint's folder.

    Options are the fields of `OfflineRL`. Raises `BadInput` for what cannot be.
    """

    def __init__(self, **options: Any) -> None:
        if unknown := sorted(set(options) - set(OfflineRL.__dataclass_fields__)):
            raise BadInput(f"ChunkLevelOfflineRL has no option {unknown[0]!r}; known: see tasks.offline_rl.OfflineRL")
        self.options = OfflineRL(**options)

    def train(self, num_epochs: int | None = None) -> Path:
        """Train for so many passes over the chunks, or as many as the options say."""
        asked = self.options if num_epochs is None else replace(self.options, num_epochs=num_epochs)
        return run(asked).dir


def run(asked: OfflineRL) -> Ref:
    """The checkpoint that `asked` describes."""
    _choose_device(asked.device)
    recipe = _recipe(asked)
    batches = adopt_datasets(recipe)
    frames, chunks = frame_stores(recipe, batches), chunk_tables(recipe, batches)
    dataset = aggregate_batches(recipe, batches)
    _refuse_other_actions(asked, dataset)
    proposals = relabel_chunks(_pi0(asked), batches, frames, chunks, checkpoint=None) if asked.use_pi0_actions else []
    parents = [checkpoint_in(asked.resume, "resume")] if asked.resume else []
    policy = Store().manifest(parents[0])["params"]["policy"] if parents else jsonable(recipe.policy)
    steps = math.ceil(_chunks(chunks) / asked.batch_size)
    fit = replace(recipe.fit, steps=asked.num_epochs * steps, save_every=asked.save_interval * steps)
    return train_phase(
        "chunk_rl",
        jsonable(_losses(asked)),
        policy,
        jsonable(fit),
        asked.action_horizon,
        [*parents, dataset, *frames, *chunks, *proposals],
        label=f"offline RL, {asked.algorithm}",
        log_every=asked.log_interval,
    )


def _recipe(asked: OfflineRL) -> Recipe:
    return Recipe(
        name="offline-rl",
        about="chunk-level offline RL on a dataset recorded elsewhere",
        model="offline-rl",
        collect=Collect(episodes=0),
        dataset=Dataset(sources=(asked.dataset_dir,), held_out=0.0, failures=True),
        chunks=ChunkConfig(horizon=asked.action_horizon, gamma=asked.gamma),
        policy=PolicyConfig(head=asked.head),
        fit=FitConfig(lr=asked.lr, batch_size=asked.batch_size, seed=asked.seed),
    )


def _losses(asked: OfflineRL) -> ChunkRLConfig:
    shared = {name: value for name, value in asdict(asked).items() if name in ChunkRLConfig.__dataclass_fields__}
    return ChunkRLConfig(**shared, critic=CriticConfig())


def _pi0(asked: OfflineRL) -> Relabel:
    if asked.algorithm != "sarsa_entropy":
        raise BadInput("use_pi0_actions: only sarsa_entropy averages over proposals; add --algorithm sarsa_entropy")
    folder = root() / asked.pi0_checkpoints_dir / asked.pi0_config
    if not folder.is_dir():
        raise BadInput(f"{folder}: no pi0 there; `flywheel fetch {asked.pi0_config}` brings it")
    return Relabel(source=str(folder), seed=asked.seed)


def _refuse_other_actions(asked: OfflineRL, dataset: Ref) -> None:
    found = len(read_set(dataset).schema.action)
    if found != asked.action_dim:
        raise BadInput(f"{asked.dataset_dir}: actions have {found} components, not {asked.action_dim}; set action_dim")


def _chunks(tables: list[Ref]) -> int:
    from data.chunks import read_chunks
    from tasks.chunks import TABLE

    return sum(len(read_chunks(ref.dir / TABLE).rows) for ref in tables)


def _choose_device(device: str) -> None:
    """Accelerate's own switch: it reads the environment when training begins."""
    import os

    import torch

    if device not in ("", "cpu", "cuda"):
        raise BadInput(f"device {device!r}: use cpu or cuda, or leave it out")
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("device cuda: this machine has none that torch can use; leave it out")
    if device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
