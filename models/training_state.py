"""What a phase needs beyond the published policy to go on as if it had never stopped.

```
training/
  state.json              phase, step, config, provenance, fingerprint of the arithmetic, the list of parts
  optimizer.safetensors   "<parameter>/<slot>": AdamW's two moments and its step count
  <part>.safetensors      the phase's other modules
```
Order of the data, noise, dropout, augmentation, learning rate and EMA decay are functions of (seed, step) and not here.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import BadInput
from models.checkpoint import (
    EMA,
    NORM,
    SPEC,
    WEIGHTS,
    load_strictly,
    read_json,
    read_matching,
    refuse_other_names,
    save_policy,
    verify,
    write_json,
    write_tensors,
)
from models.config import FitConfig
from models.ema import Ema
from models.types import Phase

STATE, OPTIMIZER = "training/state.json", "training/optimizer.safetensors"
FREE_TO_CHANGE = ("threads", "save_every")  # have no say in the result, or only in its last bits
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that changes from step to step, and what it must agree with when it is read back."""

    phase: Phase
    phase_name: str
    options: Mapping[str, Any]  # of the phase
    optimizer: torch.optim.Optimizer
    ema: Ema
    config: FitConfig
    provenance: Mapping[str, str]  # digests of what it learns from and of its parents
    fingerprint: Mapping[str, str | int]  # of the arithmetic: bits are equal only where this is

    def save(self, folder: Path, step: int) -> None:
        """Write everything into an empty folder. Raises FloatingPointError on a weight that is NaN or infinite."""
        self._refuse_non_finite()
        save_policy(self.phase.policy, folder, ema=self.ema.state_dict())
        (folder / STATE).parent.mkdir()
        write_tensors(folder / OPTIMIZER, self._slots())
        for name, part in self.phase.parts().items():
            write_tensors(folder / f"training/{name}.safetensors", part.state_dict())
        write_json(folder / STATE, self._header() | {"step": step})

    def load(self, folder: Path) -> int:
        """Fill everything from a checkpoint; returns its step.

        Raises `BadInput` when a part is missing, unknown or damaged, or was made by other options.
        """
        verify(folder)
        header, mine = read_json(folder / STATE), json.loads(json.dumps(self._header()))
        refuse_other_names(folder / STATE, header, mine | {"step": 0})
        self._refuse_other_run(folder, header, mine)
        for name, now in mine["fingerprint"].items():
            was = header["fingerprint"].get(name)
            if was != now:
                log.warning("%s: began with %s %s, now %s: correct, not bit-identical", folder, name, was, now)
        load_strictly(self.phase.policy, folder / WEIGHTS)
        self.ema.load_state_dict(read_matching(folder / EMA, self.ema.state_dict()))
        for name, part in self.phase.parts().items():
            load_strictly(part, folder / f"training/{name}.safetensors")
        self._load_optimizer(folder / OPTIMIZER)
        return header["step"]

    def _header(self) -> dict[str, Any]:
        return {
            "phase": self.phase_name,
            "options": dict(self.options),
            "parts": sorted(self.phase.parts()),
            "config": asdict(self.config),
            "provenance": dict(self.provenance),
            "fingerprint": dict(self.fingerprint),
        }

    def _refuse_other_run(self, folder: Path, header: dict[str, Any], mine: dict[str, Any]) -> None:
        policy = self.phase.policy
        theirs = {**header, "spec": read_json(folder / SPEC), "norm": read_json(folder / NORM)}
        ours = json.loads(json.dumps({**mine, "spec": policy.spec.to_json(), "norm": policy.norm_to_json()}))
        for name in ("phase", "options", "parts", "config", "provenance", "spec", "norm"):
            where = _first_difference(theirs[name], ours[name], name)
            if where:
                raise BadInput(
                    f"{folder}: {where[0]} was {where[1]!r:.40}, is now {where[2]!r:.40}; "
                    "train in another folder, or go on with what it was"
                )

    def _slots(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {p: name for name, p in self.phase.named_parameters()}
        return {f"{names[p]}/{slot}": t for p, slots in self.optimizer.state.items() for slot, t in slots.items()}

    @torch.no_grad()
    def _load_optimizer(self, path: Path) -> None:
        # In place: a moment keeps its parameter's memory layout, on which the fused kernel relies.
        slots, found = self._slots(), read_matching(path, self._slots())
        for name, tensor in slots.items():
            tensor.copy_(found[name])

    def _refuse_non_finite(self) -> None:
        modules = {"policy": self.phase.policy.state_dict(), "ema": self.ema.average, "optimizer": self._slots()}
        modules |= {name: part.state_dict() for name, part in self.phase.parts().items()}
        for module, tensors in modules.items():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise FloatingPointError(f"{module}: {name}")


def _first_difference(theirs: Any, ours: Any, where: str) -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first: (dotted path, value there, value here)."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted(theirs.keys() | ours.keys()):
            difference = _first_difference(theirs.get(name), ours.get(name), f"{where}.{name}")
            if difference and difference[0].removeprefix("config.") not in FREE_TO_CHANGE:
                return difference
        return None
    return None if theirs == ours else (where, theirs, ours)
