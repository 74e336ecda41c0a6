"""openpi's parameters (JAX) under the names and in the layout of LeRobot's PI0 and PI05 (PyTorch), and back.

```
 openpi    PaliGemma/llm/layers/attn/q_einsum_1/w      [l n d h]     all layers in one array, "_1" is the action expert
 LeRobot   ...gemma_expert.model.layers.{l}.self_attn.q_proj.weight   [(n h) d], one tensor per layer
```
`ROWS` says of every array what its axes are and where each goes, in einops' notation:
  l layer, n query heads, k heads of keys and values, h width of a head, d width of the model, m hidden width,
  s two arrays that openpi keeps in one, c width of the condition, w three times d (scale, shift, gate), v vocabulary,
  y x patch, p patches, i and o what a projection takes and gives.
Names and shapes are openpi's (`src/openpi/models/{gemma,siglip,pi0}.py`) and LeRobot 0.6.1's.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from einops import rearrange

from data.errors import BadInput
from data.untrusted import LINE, fault, load_json

Kind = Literal["pi0", "pi05"]
Tree = Mapping[str, Any]  # openpi's name, joined by "/" -> array, or what numpy can read as one

PALIGEMMA = "model.paligemma_with_expert.paligemma"
EXPERT = "model.paligemma_with_expert.gemma_expert"
EMBEDDING = f"{PALIGEMMA}.model.language_model.embed_tokens.weight"
# LeRobot's classes carry two heads for words that acting never reads: PaliGemma's is the embedding again (tied in
# openpi), the expert's exists in LeRobot only and is written as zeros.
WORDS_OUT, EXPERT_WORDS_OUT = f"{PALIGEMMA}.lm_head.weight", f"{EXPERT}.lm_head.weight"
PARAMS, METADATA = "params", "params/_METADATA"
REMEDY = "convert a plain pi0 or pi0.5 of openpi (no LoRA, no FAST)"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One array of openpi's, and the tensors of LeRobot's it becomes."""

    openpi: str
    axes: str  # "openpi's axes -> LeRobot's"; a leading s or l on the right counts tensors, not an axis of them
    lerobot: tuple[str, ...]  # one name per s; {l} is the layer
    part: str = ""  # within a part, an axis letter has one size

    def forward(self, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Views of `array`."""
        moved = rearrange(array, self.axes)
        for name, tensors in zip(self.lerobot, moved if self._split else [moved], strict=True):
            if "{l}" in name:
                yield from ((name.format(l=layer), tensor) for layer, tensor in enumerate(tensors))
            else:
                yield name, tensors

    def backward(self, tensors: Mapping[str, np.ndarray], layers: int, heads: Mapping[str, int]) -> np.ndarray:
        """The inverse. `heads` has the sizes of n and k, which LeRobot's shapes do not tell."""
        found = [self._gather(name, tensors, layers) for name in self.lerobot]
        left, right = self.axes.split(" -> ")
        sizes = {axis: heads[axis] for axis in "nk" if f"({axis} " in right}
        return rearrange(np.stack(found) if self._split else found[0], f"{right} -> {left}", **sizes)

    @property
    def _split(self) -> bool:
        return len(self.lerobot) > 1

    @staticmethod
    def _gather(name: str, tensors: Mapping[str, np.ndarray], layers: int) -> np.ndarray:
        if "{l}" not in name:
            return tensors[name]
        return np.stack([tensors[name.format(l=layer)] for layer in range(layers)])


def rows(kind: Kind) -> tuple[Row, ...]:
    """Every array of a pi0 or pi0.5."""
    return (
        *_siglip(),
        Row(openpi="PaliGemma/llm/embedder/input_embedding", axes="v d -> v d", lerobot=(EMBEDDING,), part="gemma"),
        *_gemma("", f"{PALIGEMMA}.model.language_model", part="gemma", adaptive=False),
        *_gemma("_1", f"{EXPERT}.model", part="expert", adaptive=kind == "pi05"),
        *_projections(kind),
    )


def _gemma(suffix: str, model: str, *, part: str, adaptive: bool) -> Iterator[Row]:
    """One of the two transformers that attend together. adaptive: its norms are scaled by the denoising time."""
    layer = f"{model}.layers.{{l}}"
    at = "PaliGemma/llm/layers"
    table = {
        f"attn/q_einsum{suffix}/w": ("l n d h -> l (n h) d", "self_attn.q_proj"),
        f"attn/kv_einsum{suffix}/w": ("l s k d h -> s l (k h) d", "self_attn.k_proj", "self_attn.v_proj"),
        f"attn/attn_vec_einsum{suffix}/w": ("l n h d -> l d (n h)", "self_attn.o_proj"),
        f"mlp{suffix}/gating_einsum": ("l s d m -> s l m d", "mlp.gate_proj", "mlp.up_proj"),
        f"mlp{suffix}/linear": ("l m d -> l d m", "mlp.down_proj"),
    }
    for name, (axes, *targets) in table.items():
        yield Row(openpi=f"{at}/{name}", axes=axes, lerobot=tuple(f"{layer}.{t}.weight" for t in targets), part=part)
    for norm, target, l_ in (
        (f"{at}/pre_attention_norm{suffix}", f"{layer}.input_layernorm", "l "),
        (f"{at}/pre_ffw_norm{suffix}", f"{layer}.post_attention_layernorm", "l "),
        (f"PaliGemma/llm/final_norm{suffix}", f"{model}.norm", ""),
    ):
        if adaptive:
            to = f"{target}.dense"
            yield Row(openpi=f"{norm}/Dense_0/kernel", axes=f"{l_}c w -> {l_}w c", lerobot=(f"{to}.weight",), part=part)
            yield Row(openpi=f"{norm}/Dense_0/bias", axes=f"{l_}w -> {l_}w", lerobot=(f"{to}.bias",), part=part)
        else:
            yield Row(openpi=f"{norm}/scale", axes=f"{l_}d -> {l_}d", lerobot=(f"{target}.weight",), part=part)


def _siglip() -> Iterator[Row]:
    """The vision tower and the projection of its tokens to PaliGemma's width."""
    tower = f"{PALIGEMMA}.model.vision_tower.vision_model"
    block, layer = "Transformer/encoderblock", f"{tower}.encoder.layers.{{l}}"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    table = {
        "embedding/kernel": ("y x i d -> d i y x", f"{tower}.embeddings.patch_embedding.weight"),
        "embedding/bias": ("d -> d", f"{tower}.embeddings.patch_embedding.bias"),
        "pos_embedding": ("1 p d -> p d", f"{tower}.embeddings.position_embedding.weight"),
        **{f"{attention}/{name}/kernel": ("l d n h -> l (n h) d", f"{layer}.self_attn.{to}.weight")
           for name, to in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))},
        **{f"{attention}/{name}/bias": ("l n h -> l (n h)", f"{layer}.self_attn.{to}.bias")
           for name, to in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))},
        f"{attention}/out/kernel": ("l n h d -> l d (n h)", f"{layer}.self_attn.out_proj.weight"),
        f"{attention}/out/bias": ("l d -> l d", f"{layer}.self_attn.out_proj.bias"),
        f"{block}/MlpBlock_0/Dense_0/kernel": ("l d m -> l m d", f"{layer}.mlp.fc1.weight"),
        f"{block}/MlpBlock_0/Dense_0/bias": ("l m -> l m", f"{layer}.mlp.fc1.bias"),
        f"{block}/MlpBlock_0/Dense_1/kernel": ("l m d -> l d m", f"{layer}.mlp.fc2.weight"),
        f"{block}/MlpBlock_0/Dense_1/bias": ("l d -> l d", f"{layer}.mlp.fc2.bias"),
        **{f"{block}/LayerNorm_{n}/{name}": ("l d -> l d", f"{layer}.layer_norm{n + 1}.{to}")
           for n in (0, 1) for name, to in (("scale", "weight"), ("bias", "bias"))},
        "Transformer/encoder_norm/scale": ("d -> d", f"{tower}.post_layernorm.weight"),
        "Transformer/encoder_norm/bias": ("d -> d", f"{tower}.post_layernorm.bias"),
        "head/kernel": ("d o -> o d", f"{PALIGEMMA}.model.multi_modal_projector.linear.weight"),
        "head/bias": ("o -> o", f"{PALIGEMMA}.model.multi_modal_projector.linear.bias"),
    }  # fmt: skip
    for name, (axes, target) in table.items():
        yield Row(openpi=f"PaliGemma/img/{name}", axes=axes, lerobot=(target,), part="siglip")


def _projections(kind: Kind) -> Iterator[Row]:
    """Between actions, state, time and the expert's width."""
    own = {"pi0": ("state_proj", "action_time_mlp_in", "action_time_mlp_out"), "pi05": ("time_mlp_in", "time_mlp_out")}
    for name in ("action_in_proj", "action_out_proj", *own[kind]):
        yield Row(openpi=f"{name}/kernel", axes="i o -> o i", lerobot=(f"model.{name}.weight",), part=name)
        yield Row(openpi=f"{name}/bias", axes="o -> o", lerobot=(f"model.{name}.bias",), part=name)


def kind_of(tree: Tree) -> Kind:
    """pi0 shows its expert the state as a token; pi0.5 does not."""
    return "pi0" if "state_proj/kernel" in tree else "pi05"


def to_lerobot(tree: Tree) -> Iterator[tuple[str, np.ndarray]]:
    """LeRobot's tensors, one array of `tree` read at a time. Views: copy what must outlast the step.

    Raises `BadInput` before the first one when a name of `tree` is unknown, missing, or of another shape.
    """
    refuse_unless_complete(tree)
    return _tensors(tree, rows(kind_of(tree)))


def _tensors(tree: Tree, table: Iterable[Row]) -> Iterator[tuple[str, np.ndarray]]:
    for row in table:
        array = np.asarray(tree[row.openpi])
        yield from row.forward(array)
        if row.lerobot == (EMBEDDING,):
            width = tree["action_in_proj/kernel"].shape[1]
            yield WORDS_OUT, array
            yield EXPERT_WORDS_OUT, np.broadcast_to(np.zeros((), array.dtype), (len(array), width))
        del array  # before the next is read: the largest of pi0 has 4.8 GB


def to_openpi(tensors: Mapping[str, np.ndarray], *, heads: int, vision_heads: int, kv_heads: int = 1) -> Tree:
    """The inverse: openpi's arrays. Raises `BadInput` for a tensor that is missing or unknown."""
    kind: Kind = "pi0" if "model.state_proj.weight" in tensors else "pi05"
    tree, known = {}, {WORDS_OUT, EXPERT_WORDS_OUT}
    for row in rows(kind):
        layers = _layers(tensors, row.lerobot[0])
        names = {name.format(l=layer) for name in row.lerobot for layer in range(layers)}
        _refuse("this state dict", missing=names - tensors.keys(), unknown=())
        n = vision_heads if row.part == "siglip" else heads
        tree[row.openpi] = row.backward(tensors, layers, {"n": n, "k": kv_heads})
        known |= names
    _refuse("this state dict", missing=(), unknown=tensors.keys() - known)
    return tree


def _layers(tensors: Mapping[str, np.ndarray], name: str) -> int:
    """How many layers `tensors` has of `name`; at least one, so that none is reported as missing."""
    count = 1
    while "{l}" in name and name.format(l=count) in tensors:
        count += 1
    return count


# -- refusing --------------------------------------------------------------------------------------------------------


def refuse_unless_complete(tree: Tree, where: str = "this checkpoint") -> None:
    """Raise `BadInput` naming what `tree` has besides, lacks, or has in another shape than the rest of it."""
    table = {row.openpi: row for row in rows(kind_of(tree))}
    _refuse(where, missing=table.keys() - tree.keys(), unknown=tree.keys() - table.keys())
    sizes: dict[tuple[str, str], int] = {}
    for name, row in table.items():
        axes, shape = row.axes.split(" -> ")[0].split(), tuple(tree[name].shape)
        fits = len(axes) == len(shape) and all(
            sizes.setdefault((row.part, axis), _size(row, axis, size)) == size
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits:
            raise _line(where, f"{name} has shape {list(shape)}, not the [{' '.join(axes)}] of the others")


def _size(row: Row, axis: str, size: int) -> int:
    """What the first array to have `axis` must have there."""
    return {"1": 1, "s": len(row.lerobot)}.get(axis, size)


def _refuse(where: str, *, missing: Iterable[str], unknown: Iterable[str]) -> None:
    faults = [f"{what} {len(names)} ({', '.join(names)})" for what, names in
              (("lacks", sorted(missing)), ("has unknown", sorted(unknown))) if names]  # fmt: skip
    if faults:
        raise _line(where, "; ".join(faults))


def _line(where: str, what: str) -> BadInput:
    room = LINE - len(where) - len(REMEDY) - len(": ; ")
    return BadInput(f"{where}: {what if len(what) <= room else what[: room - 3] + '...'}; {REMEDY}")


# -- reading ---------------------------------------------------------------------------------------------------------


def read_params(folder: Path) -> Tree:
    """openpi's arrays from a checkpoint's `params/` (Orbax over OCDBT); each is read when numpy asks for it.

    Raises `BadInput` when tensorstore is not installed, or the folder is no such checkpoint.
    """
    refuse_without_tensorstore()
    import tensorstore  # pyright: ignore[reportMissingImports]  (the extra "openpi")

    base = {"driver": "file", "path": f"{(folder / PARAMS).resolve()}/"}
    store = {"driver": "ocdbt", "base": base}
    driver = "zarr3" if _metadata(folder).get("use_zarr3") else "zarr"
    arrays = {}
    try:
        for key in tensorstore.KvStore.open(store).result().list().result():
            path, _, file = key.decode().rpartition("/")
            if file in (".zarray", "zarr.json"):
                spec = {"driver": driver, "kvstore": {**store, "path": f"{path}/"}}
                arrays[path] = Leaf(array=tensorstore.open(spec, read=True).result(), folder=folder)
    except (ValueError, OSError) as error:
        raise _unreadable(folder, error) from None
    return _named(arrays)


def _unreadable(folder: Path, error: Exception) -> BadInput:
    return fault(folder, PARAMS, f"is no intact Orbax checkpoint: {str(error).splitlines()[0]}", "fetch it again")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array on disk."""

    array: Any  # of tensorstore
    folder: Path  # the checkpoint it belongs to

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype.numpy_dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        try:
            return np.asarray(self.array.read().result(), dtype=dtype)
        except (ValueError, OSError) as error:
            raise _unreadable(self.folder, error) from None


def refuse_without_tensorstore() -> None:
    from importlib.util import find_spec

    if find_spec("tensorstore") is None:
        raise BadInput(
            "openpi's checkpoints are read by tensorstore, which is not installed: `uv pip install tensorstore`"
        )


def _metadata(folder: Path) -> Any:
    return load_json(folder, METADATA) if (folder / METADATA).is_file() else {}


def _named(arrays: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Under openpi's names: without what Orbax (`params.`) and a training run (`.value`) put around them."""
    names = {path: path.removeprefix("params.") for path in arrays}
    if all(name.endswith(".value") for name in names.values()):
        names = {path: name.removesuffix(".value") for path, name in names.items()}
    return {names[path].replace(".", "/"): leaf for path, leaf in arrays.items()}
