"""Tasks in words as vectors that CLIP made beforehand: a table in the checkpoint, no language model when acting.

```
 training set --its tasks--> CLIP's text encoder, once per set --> {task: 512 numbers} --fill--> LanguageTable
 observation.tasks ----------------------------------------------------------------rows--------> [b 512]
```
CLIP's weights are looked for in this order, and never downloaded from here:
```
<folder>                    model.safetensors, config.json and tokenizer.json; where one is named, only there
store/checkpoints/clip/     `flywheel fetch clip`
the hub's cache             openai/clip-vit-base-patch32, the proposal that has safetensors: its main branch has pickles
```
InternManip's diffusion policy runs the frozen encoder in every step; StateVLA's published code reads zeros for a task
that nobody has encoded, which is refused here. The vectors are CLIP's projected ones (`text_embeds`), not normalised.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.errors import BadInput
from data.paths import store_dir
from data.store import sha256_file
from data.untrusted import fault, load_json
from models.layers.pretrained import fill, read_weights

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPTextModelWithProjection

CLIP_WIDTH = 512  # of ViT-B/32's vectors
HUB_ID, REVISION = "openai/clip-vit-base-patch32", "refs/pr/15"
WEIGHTS, CONFIG, TOKENIZER = FILES = ("model.safetensors", "config.json", "tokenizer.json")
FETCH = "`flywheel fetch clip`"


class LanguageTable(nn.Module):
    """One row per known task; the rows are in the checkpoint, and nothing trains them."""

    table: Tensor

    def __init__(self, tasks: tuple[str, ...], width: int = CLIP_WIDTH) -> None:
        super().__init__()
        self.rows = {task: i for i, task in enumerate(tasks)}
        self.register_buffer("table", torch.full((len(tasks), width), torch.nan))
        self._seen: set[str] = set()  # tasks whose row was looked at: a look waits for the device

    def forward(self, tasks: tuple[str, ...]) -> Float[Tensor, "b w"]:
        """Raises `BadInput` for a task that it was not made for, and for one whose row was never filled in."""
        for task in set(tasks) - self._seen:
            self._refuse_unknown(task)
            self._seen.add(task)
        return self.table[torch.tensor([self.rows[task] for task in tasks], device=self.table.device)]

    @torch.no_grad()
    def fill(self, vectors: Mapping[str, Float[Tensor, " w"]]) -> None:
        """Raises `BadInput` for a task without a vector, and for vectors of another width."""
        for task, row in self.rows.items():
            if task not in vectors:
                raise BadInput(f"no vector for task {_short(task)}; embed the tasks of this dataset anew")
            if vectors[task].shape != self.table[row].shape:
                found, wanted = tuple(vectors[task].shape), tuple(self.table[row].shape)
                raise BadInput(f"the vector of task {_short(task)} is {found}, not {wanted}; use the CLIP of {FETCH}")
            self.table[row] = vectors[task]

    def _refuse_unknown(self, task: str) -> None:
        if task not in self.rows:
            known = f"one of the {len(self.rows)} tasks it was trained on"
            raise BadInput(f"task {_short(task)} is not {known}; ask for one of them, or train on data with it")
        if self.table[self.rows[task]].isnan().any():
            raise BadInput(f"task {_short(task)} has no vector yet; train by `flywheel train`, which fills it in")


def fill_tables(module: nn.Module, vectors: Mapping[str, Float[Tensor, " w"]]) -> None:
    """Fill in every `LanguageTable` inside `module`."""
    for part in module.modules():
        if isinstance(part, LanguageTable):
            part.fill(vectors)


# -- CLIP ------------------------------------------------------------------------------------------------------------


def clip_dir() -> Path:
    """Where `flywheel fetch clip` puts it."""
    return store_dir() / "checkpoints" / "clip"


def find_clip(folder: Path | str = "") -> Path:
    """The folder of CLIP's weights: `folder` if it is named. Raises `BadInput` saying how to get them."""
    for place in [Path(folder)] if folder else [clip_dir(), _hub_cache()]:
        if place is not None and all((place / name).is_file() for name in FILES):
            return place
    where = Path(folder) if folder else clip_dir()
    missing = next(name for name in FILES if not (where / name).is_file())
    raise fault(where, missing, "no CLIP there" if folder else "no CLIP there or in the hub's cache", f"run {FETCH}")


def clip_digest(folder: Path) -> str:
    """Of what its vectors depend on."""
    return ":".join(sha256_file(folder / name)[:16] for name in FILES)


def clip_embeddings(folder: Path | str, texts: Iterable[str]) -> dict[str, Float[Tensor, " w"]]:
    """text -> its vector, float32 on the CPU; of a text longer than CLIP reads (77 tokens) the beginning counts.

    `folder` as for `find_clip`. Raises `BadInput` for weights that are missing or no CLIP's.
    """
    place = find_clip(folder)
    tokenizer, model = _tokenizer(place), _text_model(place)
    tokenizer.enable_truncation(model.config.max_position_embeddings)
    ids = {text: torch.tensor([tokenizer.encode(text).ids]) for text in texts}
    with torch.no_grad():
        return {text: model(input_ids=row).text_embeds[0] for text, row in ids.items()}


def _text_model(folder: Path) -> "CLIPTextModelWithProjection":
    """The text side of a whole CLIP, or a text side that was saved alone."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    settings = load_json(folder, CONFIG)
    if not isinstance(settings, dict) or settings.get("model_type") not in ("clip", "clip_text_model"):
        raise fault(folder, CONFIG, "is no CLIP's", f"run {FETCH}")
    model = CLIPTextModelWithProjection(CLIPTextConfig(**settings.get("text_config", settings)))
    fill(model, read_weights(folder), folder)
    return model.eval()


def _tokenizer(folder: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # what this library raises for a file that it cannot read has no class of its own
        raise fault(folder, TOKENIZER, f"cannot be read as a tokenizer: {error}", f"run {FETCH}") from None


def _hub_cache() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(HUB_ID, WEIGHTS, revision=REVISION)
    return Path(found).parent if isinstance(found, str) else None


def _short(task: str) -> str:
    return repr(task if len(task) <= 60 else task[:57] + "...")
