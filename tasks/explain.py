"""Why a stage is stale: which parameter, input or piece of code differs from the nearest artefact there is."""

from typing import Any

from data.store import Inputs, Store


def why_stale(inputs: Inputs, store: Store, fault: str, *, per_batch: bool) -> str:
    """One line, e.g. `fit.lr 0.0003 -> 0.001`.

    fault: what the store says of the entry itself. per_batch: the stage has an artefact per batch of episodes, and only
    one of the same batch can be its precedent.
    """
    if fault.startswith("damaged"):
        return fault
    wanted = _flat(inputs)
    flat = [_flat_manifest(m) for m in store.manifests(inputs.stage)]
    if per_batch:
        flat = [m for m in flat if _batch(m) == _batch(wanted)]
    differences = [_differences(m, wanted) for m in flat]
    if not differences:
        return "not built yet"
    nearest = min(differences, key=len)
    code = [name.removeprefix("code ") for name in nearest if name.startswith("code ")]
    rest = [_told(name, *change) for name, change in nearest.items() if not name.startswith("code ")]
    if code:
        rest.append(f"code of {code[0]}" + (f" and {len(code) - 1} more modules" if len(code) > 1 else "") + " changed")
    return ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")


def _batch(flat: dict[str, Any]) -> dict[str, Any]:
    """What tells one batch from another: its seeds, or the batch it was made from."""
    return {name: value for name, value in flat.items() if name == "seeds" or name.startswith("input ")}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)}


def _told(name: str, old: Any, new: Any) -> str:
    def brief(value: Any) -> str:
        text = "none" if value is None else str(value)
        return text if len(text) <= 24 else text[:21] + "..."

    return f"{name} changed" if name.startswith("input ") else f"{name} {brief(old)} -> {brief(new)}"


def _flat(inputs: Inputs) -> dict[str, Any]:
    return _flat_manifest(inputs.as_json)


def _flat_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    _flatten("", manifest["params"], flat)
    flat |= {f"code {module}": digest for module, digest in manifest["code"].items()}
    parents = manifest["parents"]
    return flat | {f"input {p['stage']} {i}": p["digest"] for i, p in enumerate(parents)}


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{prefix}.{key}" if prefix else key, item, into)
    else:
        into[prefix] = value
