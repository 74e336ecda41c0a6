"""The one training loop.

```
 step              0    1    2   ...           a batch, its noise and its learning rate are functions of (seed, step),
 checkpoint        |---- save_every ----|      so that a run killed anywhere and started again goes on from its last
 on_metrics(done)  1    2    3                 checkpoint and ends with the same bits (same machine, same threads)
```
Accelerate owns devices and processes: one process here, several under `accelerate launch`, where each takes its rows of
the same global batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.errors import BadInput
from models import checkpoint
from models.config import FitConfig
from models.devices import threads, usable_threads, uses_bf16
from models.ema import Ema
from models.freeze import frozen_digest, train_mode
from models.reading import Reader
from models.registry import PHASES, configure
from models.seeds import derive
from models.training_state import TrainingState
from models.types import Batch, Phase

KEPT = 2  # checkpoints; the newest and the one before it
Metrics = dict[str, float]


class Diverged(BadInput):
    """A loss, a gradient or a weight is NaN or infinite. The last good checkpoint is intact."""


def fit(
    policy: Reader,
    make_batches: Callable[[int], Iterator[Any]],
    config: FitConfig,
    workdir: Path,
    *,
    on_metrics: Callable[[int, Metrics], None] = lambda step, metrics: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    resume: bool = True,
    phase_name: str = "bc",
    phase_options: Mapping[str, Any] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Path:
    """Train `policy` by the registered phase `phase_name`; returns the folder of the final checkpoint.

    `policy` is what the phase publishes: a `Policy`, or a `Critic` for one that trains a critic. `phase_options` are
    fields of the phase's Config.

    `make_batches(step)` yields global batches from that step on, as `Batch` or as a loader's columns; what it yields
    must be a function of the step. `on_metrics(done, {...})` is called after every step with floats (loss, lr,
    grad_norm, samples_per_s, and the head's), `on_progress(done, total)` too. `provenance` are digests (dataset, parent
    checkpoint, code) that are written into the checkpoint and must be the same when the run is resumed.

    Raises `BadInput` when `workdir` holds another run, or one and not `resume`, and where memory does not suffice;
    `Diverged` on NaN or infinity.
    """
    kind = PHASES.resolve(phase_name)
    options = configure(kind, phase_options or {}, whose=f"phase {phase_name}")
    run = _Run(kind(policy, options), phase_name, options, config, Path(workdir), dict(provenance or {}))
    return run(make_batches, on_metrics, on_progress, resume)


class _Run:
    """One phase in one folder."""

    def __init__(
        self,
        phase: Phase,
        phase_name: str,
        options: Any,
        config: FitConfig,
        workdir: Path,
        provenance: Mapping[str, str],
    ) -> None:
        _refuse_unnamed_state(phase)
        self.config, self.checkpoints = config, workdir / "checkpoints"
        # Arithmetic is ours (bf16 needs no gradient scaler); Accelerate's mixed precision is one per process for good.
        self.accelerator = Accelerator(mixed_precision="no")
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        if config.batch_size % self.world:
            raise BadInput(f"fit.batch_size {config.batch_size} does not divide among {self.world} processes")
        self.threads = config.threads or usable_threads()
        self.bf16 = uses_bf16(config.precision, self.device)
        self.phase = phase.to(self.device)
        optimizer = _adamw(phase, config)
        self.objectives = _objectives(optimizer)
        self.state = TrainingState(
            phase=phase,
            phase_name=phase_name,
            options=asdict(options),
            optimizer=optimizer,
            ema=Ema(phase.policy, config.ema_decay),
            config=config,
            provenance=provenance,
            fingerprint={
                "torch": torch.__version__,
                "device": str(self.device.type),
                "threads": self.threads,
                "processes": self.world,
                "bf16": int(self.bf16),
            },
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(phase, optimizer)

    def __call__(
        self,
        make_batches: Callable[[int], Iterator[Any]],
        on_metrics: Callable[[int, Metrics], None],
        on_progress: Callable[[int, int], None],
        resume: bool,
    ) -> Path:
        with threads(self.threads):
            start = self._start(resume)
            frozen = frozen_digest(self.phase, without=self.phase.followers())
            batches = make_batches(start) if start < self.config.steps else iter(())
            train_mode(self.phase)
            for step in range(start, self.config.steps):
                metrics = self._within_memory(step, batches)
                if step + 1 == self.config.steps or (step + 1) % self.config.save_every == 0:
                    self._save(step + 1)
                on_metrics(step + 1, metrics)
                on_progress(step + 1, self.config.steps)
            if frozen_digest(self.phase, without=self.phase.followers()) != frozen:
                raise RuntimeError("a frozen part changed while training: a bug in the phase")
        return self._folder(self.config.steps)

    def _start(self, resume: bool) -> int:
        """The first step to do: after the newest checkpoint, or 0."""
        newest = checkpoint.latest(self.checkpoints)
        if newest and not resume:
            raise BadInput(f"{self.checkpoints}: holds a run; resume it, or train in another folder")
        step = self.state.load(newest) if newest else 0
        if self.accelerator.is_main_process and self.checkpoints.exists():
            checkpoint.prune(self.checkpoints, KEPT)
        return step

    def _within_memory(self, step: int, batches: Iterator[Any]) -> Metrics:
        try:
            return self._step(step, batches)
        except RuntimeError as fault:
            if not (isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in str(fault)):
                raise
            size = self.config.batch_size
            raise BadInput(
                f"step {step}: {self.device.type} is out of memory with fit.batch_size {size}; memory goes with it, "
                f"try {max(1, size // 2)}, or more fit.processes on as many GPUs. The last checkpoint is intact"
            ) from None

    def _step(self, step: int, batches: Iterator[Any]) -> Metrics:
        began = time.perf_counter()
        batch = self._batch(step, batches)
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        seed = derive("step", self.config.seed, step, self.accelerator.process_index)
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            per_sample, info = self.wrapped(batch, generator)
        loss = per_sample.mean()
        self.accelerator.backward(loss)
        values = {"loss": loss.detach(), **self._clip(), **info}
        # one transfer for all numbers, and before the weights are touched
        numbers: Any = self.accelerator.reduce(torch.stack([v.float() for v in values.values()]), "mean")
        metrics = dict(zip(values, numbers.tolist(), strict=True))
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
            raise Diverged(_diverged(step, metrics, batch, per_sample))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.phase.after_step(step)
        self.state.ema.update(step)
        return metrics | {"lr": lr, "samples_per_s": self.config.batch_size / (time.perf_counter() - began)}

    def _clip(self) -> dict[str, Tensor]:
        """Clip the gradients of each objective; their norms before that, and the largest of them as grad_norm."""
        norms = {
            name: torch.as_tensor(self.accelerator.clip_grad_norm_(trained, self.config.grad_clip))
            for name, trained in self.objectives.items()
        }
        named = {f"grad_norm.{name}": norm for name, norm in norms.items() if name}
        return named | {"grad_norm": torch.stack(list(norms.values())).max()}

    def _batch(self, step: int, batches: Iterator[Any]) -> Batch:
        raw = next(batches, None)
        if raw is None:
            raise BadInput(f"the batches ended at step {step} of {self.config.steps}; they must go on for ever")
        batch = raw if isinstance(raw, Batch) else self.phase.reads.of(raw)
        if len(batch) != self.config.batch_size:
            raise BadInput(f"a batch of {len(batch)} at step {step}, fit.batch_size is {self.config.batch_size}")
        return batch.rows(slice(self.accelerator.process_index, None, self.world)).to(self.device)

    def _save(self, done: int) -> None:
        if self.accelerator.is_main_process:
            try:
                checkpoint.publish(self._folder(done), lambda folder: self.state.save(folder, done), step=done)
            except FloatingPointError as fault:
                raise Diverged(f"step {done}: NaN or infinity in {fault}; not saved, lower fit.lr") from None
            checkpoint.prune(self.checkpoints, KEPT)
        self.accelerator.wait_for_everyone()

    def _folder(self, done: int) -> Path:
        return self.checkpoints / f"step-{done:08d}"


def learning_rate(config: FitConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine to `min_lr_ratio` of it. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def _adamw(phase: Phase, config: FitConfig) -> torch.optim.AdamW:
    """AdamW over the phase's groups, its state in place from the start, so that a checkpoint has every part."""
    groups = [
        {
            "params": list(group.parameters.values()),
            "lr_scale": group.lr_scale,
            "objective": group.objective,
            "weight_decay": config.weight_decay if group.decay else 0.0,
        }
        for group in phase.parameter_groups()
        if group.parameters
    ]
    if not groups:
        raise BadInput("nothing to train: every parameter is frozen")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    for group in groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    return optimizer


def _objectives(optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
    """What is clipped together."""
    together: dict[str, list[nn.Parameter]] = {}
    for group in optimizer.param_groups:
        together.setdefault(group["objective"], []).extend(group["params"])
    return together


def _refuse_unnamed_state(phase: Phase) -> None:
    """Raise unless all that the phase carries lies in `policy` and `parts()`: the rest would not be saved."""
    named = [phase.policy, *phase.parts().values()]
    saved = {id(t) for module in named for t in module.state_dict(keep_vars=True).values()}
    for name, tensor in phase.state_dict(keep_vars=True).items():
        if id(tensor) not in saved:
            raise TypeError(f"{type(phase).__name__} carries {name}, which is in none of its parts()")


def _diverged(step: int, metrics: Metrics, batch: Batch, per_sample: Tensor) -> str:
    what = "loss" if not math.isfinite(metrics["loss"]) else "gradient norm"
    value = metrics["loss"] if what == "loss" else metrics["grad_norm"]
    rows = (~per_sample.detach().isfinite()).nonzero().flatten().tolist()[:3]
    chunks = f" (chunks {', '.join(str(batch.index[r]) for r in rows)})" if batch.index and rows else ""
    where = f" in row {', '.join(map(str, rows))} of its batch{chunks}" if rows else ""
    return f"step {step}: {what} is {value}{where}; nothing was saved of it; look at the data or lower fit.lr"
