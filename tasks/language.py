"""The tasks of a training set as CLIP's vectors, once per set: for policies that know a task by its vector.

```
 dataset --its distinct tasks--> language (this stage) --> train: `tasks` among the backbone's options, rows filled in
```
A policy asks for them by `backbone_options.language = "clip"`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data.refs import Ref
from data.store import Build
from models.config import ReaderConfig
from tasks.dataset import read_set
from tasks.stages import Work, ensure

if TYPE_CHECKING:
    from torch import nn

VECTORS, TEXTS = "embeddings.safetensors", "texts.json"


def language_of(policy: Mapping[str, Any], dataset: Ref) -> list[Ref]:
    """The vectors that `policy`, a `PolicyConfig` as JSON, reads of `dataset`'s tasks: one artefact, or none."""
    return [embed_tasks(dataset)] if policy["backbone_options"].get("language") == "clip" else []


def embed_tasks(dataset: Ref) -> Ref:
    """The vectors of all tasks of `dataset`, by the CLIP of the store or the hub's cache.

    Its weights count by what is in them, not by where they lie.
    """
    from models.layers.language import clip_digest, find_clip

    folder = find_clip()
    return ensure(
        "language",
        {"clip": clip_digest(folder)},
        [dataset],
        label="tasks as vectors",
        execution={"clip": str(folder)},
    )


def write_embeddings(build: Build, work: Work) -> None:
    """The body of the `language` stage."""
    from data.training_set import open_member
    from models.checkpoint import write_tensors
    from models.layers.language import clip_embeddings

    members = read_set(work.upstream("dataset")[0]).members
    texts = sorted({task for member in members for task in open_member(member).meta.tasks.values()})
    vectors = clip_embeddings(work.execution["clip"], texts)
    write_tensors(build.out / VECTORS, {str(i): vectors[text] for i, text in enumerate(texts)})
    (build.out / TEXTS).write_text(json.dumps(texts, indent=1, ensure_ascii=False) + "\n")


def with_tasks[C: ReaderConfig](config: C, language: Sequence[Ref]) -> C:
    """`config` with the tasks that its backbone is built for; as it is without an artefact of this stage."""
    if not language:
        return config
    return replace(config, backbone_options={**config.backbone_options, "tasks": _texts(language[0])})


def fill_in(policy: "nn.Module", language: Sequence[Ref]) -> None:
    """The vectors, in every table of a new policy."""
    if not language:
        return
    from models.checkpoint import read_tensors
    from models.layers.language import fill_tables

    rows = read_tensors(language[0].dir / VECTORS)
    fill_tables(policy, {text: rows[str(i)] for i, text in enumerate(_texts(language[0]))})


def _texts(language: Ref) -> list[str]:
    return json.loads((language.dir / TEXTS).read_text())
