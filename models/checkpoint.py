"""A policy on disk: weights as safetensors, everything else as JSON. Complete or invisible, strict to read, no pickle.

```
checkpoints/
  latest -> step-00001000           moved in one rename after the folder it names is complete
  step-00001000/
    checkpoint.json                 format, step, size and sha256 of every other file
    spec.json  norm.json            architecture and meaning; normalisation
    weights.safetensors             after the last step
    ema.safetensors                 averaged over steps: what acts
    training/                       what resuming needs beyond the above (models.training_state)
```
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import BadInput
from data.normalize import Normalizer
from data.schema import Schema
from data.store import MANIFEST, fsync, refusing_storage_faults, sha256_file
from models.critic import Critic, CriticSpec
from models.encoder import Encoder, EncoderSpec
from models.policy import Policy, PolicySpec
from models.reading import Reader, Spec
from models.registry import POLICIES

FORMAT = 1
INDEX, SPEC, NORM = "checkpoint.json", "spec.json", "norm.json"
WEIGHTS, EMA = "weights.safetensors", "ema.safetensors"
LATEST, PICTURES = "latest", "pictures"


def save_policy(policy: Reader, folder: Path, *, ema: Mapping[str, Tensor] | None = None) -> None:
    """Write the deployable files of `policy` into `folder`; `ema` are the averaged weights (default: the weights)."""
    weights = policy.state_dict()
    write_tensors(folder / WEIGHTS, weights)
    write_tensors(folder / EMA, weights if ema is None else ema)
    write_json(folder / SPEC, policy.spec.to_json())
    write_json(folder / NORM, policy.norm_to_json())


def load_policy(
    path: Path | str,
    *,
    weights: Literal["ema", "last"] = "ema",
    fits: Schema | None = None,
    whose: str = "the dataset",
) -> Policy:
    """The policy of a checkpoint folder, on the CPU and in eval mode.

    `fits` is the schema it must have been trained on, `whose` says in words whose schema that is. Raises `BadInput` for
    a file that is missing, damaged or of another kind, a weight that is missing or unknown, and a schema that differs.
    """
    return _load(path, weights, fits, whose, Policy, PolicySpec, "a policy")


def load_critic(path: Path | str, *, fits: Schema | None = None, whose: str = "the dataset") -> Critic:
    """The averaged weights of a critic's checkpoint: what Polyak's target is. Raises `BadInput` as `load_policy`."""
    return _load(path, "ema", fits, whose, Critic, CriticSpec, "a critic")


def load_encoder(path: Path | str, *, fits: Schema | None = None, whose: str = "the dataset") -> Encoder:
    """The averaged weights of an encoder's checkpoint. Raises `BadInput` as `load_policy`."""
    return _load(path, "ema", fits, whose, Encoder, EncoderSpec, "an encoder")


def _load[M: Reader](
    path: Path | str, weights: str, fits: Schema | None, whose: str, kind: type[M], of_kind: type[Spec[Any]], what: str
) -> M:
    path = Path(path)
    verify(path)
    spec = read_spec(path)
    if not isinstance(spec, of_kind):
        raise BadInput(f"{path}: holds a {spec.kind}, not {what}; name a checkpoint of {what}")
    if fits is not None:
        spec.schema.refuse_unless_fits(fits, mine=f"checkpoint {path.name}", others=whose)
    norm = read_json(path / NORM)
    normalizers = {name: Normalizer.from_json(value) for name, value in norm.items()}
    model = kind.restore(spec, normalizers)
    load_strictly(model, path / (EMA if weights == "ema" else WEIGHTS))
    return model.eval()


def read_spec(path: Path) -> Spec[Any]:
    value = read_json(path / SPEC)
    return POLICIES.resolve(value["kind"]).Spec.from_json(value)


# -- publishing ------------------------------------------------------------------------------------------------------


def publish(folder: Path, write: Callable[[Path], None], *, step: int) -> None:
    """Fill a hidden folder by `write(hidden)`, seal it, give it its name `folder` in one rename, point `latest` to it.

    A kill or a full disk at any moment leaves the previous `latest` in force. Raises `BadInput` when the disk is full.
    """
    staging = folder.parent / f".staging-{folder.name}-{uuid.uuid4().hex[:8]}"
    with refusing_storage_faults(folder.parent):
        staging.mkdir(parents=True)
        try:
            write(staging)
            seal(staging, step=step)
            if folder.exists():  # a kill came between its rename and `latest`: nobody was told of it
                shutil.rmtree(folder)
            staging.rename(folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _point(folder.parent / LATEST, folder.name)


def seal(folder: Path, *, step: int) -> None:
    """Write the index of `folder`'s files and bring all of it to the disk."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != INDEX):
        path.chmod(0o644)
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(folder / INDEX, {"format": FORMAT, "step": step, "files": files})
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def verify(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint whose every file is as it was written. Raises `BadInput` naming one that is not."""
    index = read_json(folder / INDEX)
    if index.get("format") != FORMAT:
        raise BadInput(f"{folder}: checkpoint format {index.get('format')}, this program reads {FORMAT}; train anew")
    # a store that holds this checkpoint adds its own manifest, and what was drawn of the training
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {INDEX, MANIFEST}
    present = {name for name in files if not name.startswith(f"{PICTURES}/")}
    for name in sorted(present ^ set(index["files"])):
        raise BadInput(f"{folder / name}: {'unknown' if name in present else 'missing'}; restore it or train anew")
    for name, expected in index["files"].items():
        if sha256_file(folder / name) != expected["sha256"]:
            raise BadInput(f"{folder / name}: damaged, not what was written; restore it or train anew")
    return index


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in a folder of them."""
    link = checkpoints / LATEST
    return checkpoints / link.readlink() if link.is_symlink() else None


def prune(checkpoints: Path, keep: int) -> None:
    """Remove what a kill left half-written, and all but the newest `keep` checkpoints."""
    complete = sorted(p for p in checkpoints.glob("step-*") if p.is_dir())
    for path in [*complete[:-keep], *checkpoints.glob(".staging-*")]:
        shutil.rmtree(path)


def _point(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}-{uuid.uuid4().hex[:8]}")
    temporary.symlink_to(target)
    os.replace(temporary, link)
    fsync(link.parent)


# -- files -----------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises `BadInput` for a file that is missing or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise BadInput(f"{path}: cannot be read ({type(fault).__name__}); is {path.parent} a checkpoint?") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds no JSON object; restore it or train anew")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Safetensors, contiguous and on the CPU. Raises OSError when the disk is full, as any other writer does."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as fault:
        if f"os error {errno.ENOSPC}" in str(fault):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises `BadInput` for a file that is missing or no safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as fault:
        raise BadInput(f"{path}: cannot be read as safetensors ({fault}); restore it or train anew") from None


def load_strictly(module: torch.nn.Module, path: Path) -> None:
    """Fill `module` from `path`, or raise as `read_matching` does."""
    module.load_state_dict(read_matching(path, module.state_dict()))


def read_matching(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `path`. Raises `BadInput` naming the first that `wanted` lacks, has besides, or has otherwise."""
    found = read_tensors(path)
    refuse_other_names(path, found, wanted)
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise BadInput(f"{path}: {name} is {_brief(found[name])}, the model's is {_brief(tensor)}; train anew")
    return found


def refuse_other_names(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise `BadInput` unless the two have the same keys."""
    for name in sorted(found.keys() ^ wanted.keys()):
        fault = "unknown" if name in found else "missing"
        raise BadInput(f"{path}: {name} is {fault}; the checkpoint belongs to another model or program version")


def _brief(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
