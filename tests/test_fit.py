"""The training loop: it learns, it resumes bit for bit, it stops at the first NaN, frozen stays frozen."""

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_policy
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import FIT, HEADS, batch, batches, build, config, generator, with_head_options
from torch import nn

from data.errors import BadInput
from models import checkpoint, registry
from models.checkpoint import latest, load_policy
from models.ema import Ema
from models.fit import Diverged, fit, learning_rate
from models.freeze import frozen_digest, train_mode
from models.phases.bc import BehaviourCloning

POLICIES = {
    "act": replace(with_head_options("act", dropout=0.1, use_vae=True, latent=4, vae_layers=1), jitter=0.2),
    "flow": config("flow"),
}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of everything a checkpoint holds: weights, average, optimizer, parts, header."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def run(workdir: Path, policy=None, fit_config=FIT, **options) -> tuple[Path, list[float]]:
    losses = []
    out = fit(
        policy or build(),
        options.pop("make_batches", batches),
        fit_config,
        workdir,
        on_metrics=lambda done, metrics: losses.append(metrics["loss"]),
        **options,
    )
    return out, losses


@pytest.mark.parametrize("head", HEADS)
def test_overfits_eight_chunks(head, tmp_path):
    """From pictures, state and nothing else: the trained policy answers with the chunk it was shown."""
    data = batch(seed=7)
    policy = build(replace(with_head_options(head), shift=0))
    fit_config = replace(FIT, steps=250, lr=5e-3, warmup_steps=10, save_every=250, weight_decay=0.0, ema_decay=0.9)

    def same(start):
        while True:
            yield data

    out, _ = run(tmp_path, policy, fit_config, make_batches=same)
    chunk = load_policy(out).predict_action(data.observation, generator(0))
    wanted = data.action[~data.action_is_pad]
    width = torch.tensor(policy.action.width, dtype=torch.float32)
    error = ((chunk[~data.action_is_pad] - wanted) / width).abs().mean()
    baseline = ((wanted - wanted.mean(0)) / width).abs().mean()
    assert error < 0.15 * baseline


_SCRIPT = """
import json, os, signal, sys
import tiny_policy, test_fit
from models.fit import fit
workdir, kill_at, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
def record(done, metrics):
    with open(out, "a") as file:
        file.write(json.dumps(metrics["loss"]) + "\\n")
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
fit(tiny_policy.build(test_fit.POLICIES["act"]), tiny_policy.batches, tiny_policy.FIT, workdir, on_metrics=record)
"""


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def test_killed_and_resumed_equals_undisturbed(tmp_path):
    """Contract 11 and P3: a real SIGKILL between two checkpoints, then the same losses and the same bytes."""
    killed_at, log = 13, tmp_path / "losses.jsonl"
    killed = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tmp_path / "killed", str(killed_at), log],
        env=_environment(),
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(before) == killed_at and latest(tmp_path / "killed/checkpoints").name == "step-00000010"

    whole, losses = run(tmp_path / "whole", build(POLICIES["act"]))
    resumed, after = run(tmp_path / "killed", build(POLICIES["act"], seed=99))  # initial weights are not used
    assert before == losses[:killed_at] and after == losses[10:]
    assert hashes(resumed) == hashes(whole)
    assert len(set(losses)) == len(losses)


_ONE_OF_TWO = """
import sys, tiny_policy, test_fit
from dataclasses import replace
from models.fit import fit
policy = tiny_policy.build(replace(tiny_policy.config("act"), shift=0))
fit(policy, tiny_policy.batches, replace(tiny_policy.FIT, steps=3), sys.argv[1])
"""


def test_two_processes_learn_what_one_does(tmp_path):
    """DistributedDataParallel, as `accelerate launch` starts it: each takes its rows of the same global batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = _environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_OF_TWO, tmp_path / "two"],
            env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"},
        )
        for rank in range(2)
    ]
    one, _ = run(tmp_path / "one", build(replace(config("act"), shift=0)), replace(FIT, steps=3))
    assert [process.wait() for process in both] == [0, 0]
    two = load_file(latest(tmp_path / "two/checkpoints") / "weights.safetensors")
    header = json.loads((latest(tmp_path / "two/checkpoints") / "training/state.json").read_text())
    assert header["fingerprint"]["processes"] == 2
    for name, weight in load_file(one / "weights.safetensors").items():
        if not name.endswith("in_proj_bias"):  # nothing depends on the keys' part: its gradient is rounding alone
            assert torch.allclose(weight, two[name], atol=1e-5), name


class Interrupted(Exception):
    pass


def interrupted(workdir: Path, policy, at: int) -> None:
    def stop(done, total):
        if done == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(workdir, policy, on_progress=stop)


@pytest.mark.parametrize("at", [5, 14])
def test_flow_interrupted_and_resumed_equals_undisturbed(at, tmp_path):
    whole, _ = run(tmp_path / "whole", build(POLICIES["flow"]))
    interrupted(tmp_path / "cut", build(POLICIES["flow"]), at)
    resumed, _ = run(tmp_path / "cut", build(POLICIES["flow"], seed=99))
    assert hashes(resumed) == hashes(whole)


@pytest.mark.parametrize("part", ["weights", "ema", "optimizer", "step"])
def test_a_part_left_behind_would_be_noticed(part, tmp_path):
    """The controls: change one part of the state in a way that its seal does not show, and the end differs."""
    whole, _ = run(tmp_path / "whole", build())
    interrupted(tmp_path / "cut", build(), 5)
    folder = latest(tmp_path / "cut/checkpoints")
    if part == "step":
        header = json.loads((folder / "training/state.json").read_text())
        (folder / "training/state.json").write_text(json.dumps(header | {"step": 4}))
    else:
        path = folder / ("training/optimizer.safetensors" if part == "optimizer" else f"{part}.safetensors")
        tensors = load_file(path)
        name = next(iter(tensors))
        save_file(tensors | {name: tensors[name] + 0.1}, path)
    checkpoint.seal(folder, step=5)
    resumed, _ = run(tmp_path / "cut", build())
    assert hashes(resumed) != hashes(whole)


def test_another_seed_is_another_run(tmp_path):
    """The control: equal bytes above are not for lack of anything random."""
    policy = POLICIES["act"]
    (a, first), (b, second) = (run(tmp_path / str(s), build(policy), replace(FIT, seed=s, steps=4)) for s in (0, 1))
    assert first[0] != second[0] and hashes(a)["weights.safetensors"] != hashes(b)["weights.safetensors"]


PARTS = ("weights.safetensors", "ema.safetensors", "training/optimizer.safetensors", "training/state.json", "norm.json")


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Path:
    """A run of 5 of 20 steps."""
    workdir = tmp_path_factory.mktemp("half")
    interrupted(workdir, build(), 5)
    return workdir


def copy(workdir: Path, to: Path) -> Path:
    shutil.copytree(workdir, to / "run", symlinks=True)
    return to / "run"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("damage", ["missing", "one bit"])
def test_damaged_training_state_refuses_to_resume(part, damage, half, tmp_path):
    path = latest(copy(half, tmp_path) / "checkpoints") / part
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content)
    with pytest.raises(BadInput, match=part) as fault:
        run(tmp_path / "run")
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("training/optimizer.safetensors", lambda t: t.popitem(), "is missing"),
        ("training/optimizer.safetensors", lambda t: t.update(more=torch.zeros(1)), "more is unknown"),
        ("ema.safetensors", lambda t: t.update({"head.queries": torch.zeros(1)}), "head.queries is float32"),
        ("weights.safetensors", lambda t: t.pop("head.queries"), "head.queries is missing"),
    ],
)
def test_training_state_is_read_strictly(part, change, message, half, tmp_path):
    folder = latest(copy(half, tmp_path) / "checkpoints")
    tensors = load_file(folder / part)
    change(tensors)
    save_file(tensors, folder / part)
    checkpoint.seal(folder, step=5)
    with pytest.raises(BadInput, match=message):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit_config": replace(FIT, lr=1e-2)}, "config.lr was 0.001, is now 0.01"),
        ({"fit_config": replace(FIT, steps=40)}, "config.steps was 20, is now 40"),
        ({"provenance": {"dataset": "abc"}}, "provenance.dataset was None, is now 'abc'"),
        ({"policy": build(config("flow"))}, "spec.config.head was 'act', is now 'flow'"),
        ({"resume": False}, "holds a run; resume it, or train in another folder"),
    ],
)
def test_another_run_is_not_resumed(options, message, half, tmp_path):
    with pytest.raises(BadInput, match=message):
        run(copy(half, tmp_path), **options)


def test_other_threads_are_said(half, tmp_path, caplog):
    folder = latest(copy(half, tmp_path) / "checkpoints")
    header = json.loads((folder / "training/state.json").read_text())
    header["fingerprint"]["threads"] = 8
    (folder / "training/state.json").write_text(json.dumps(header))
    checkpoint.seal(folder, step=5)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", fit_config=replace(FIT, save_every=20))
    assert "began with threads 8, now 1: correct, not bit-identical" in caplog.text


def test_a_finished_run_is_not_trained_again(tmp_path):
    short = replace(FIT, steps=2)
    out, losses = run(tmp_path, fit_config=short)
    again, none = run(tmp_path, fit_config=short, make_batches=lambda start: iter(()))
    assert (again, none, len(losses)) == (out, [], 2)
    assert sorted(p.name for p in out.parent.iterdir()) == ["latest", "step-00000002"]


def test_metrics_are_plain_floats(tmp_path):
    seen, progress = {}, []
    fit(
        build(),
        batches,
        replace(FIT, steps=3),
        tmp_path,
        on_metrics=seen.__setitem__,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == [(1, 3), (2, 3), (3, 3)] and list(seen) == [1, 2, 3]
    assert seen[1].keys() == {"loss", "grad_norm", "lr", "samples_per_s", "l1"}
    assert all(type(v) is float for m in seen.values() for v in m.values())


def poisoned(at: int, where: str):
    def make(start):
        for step, data in enumerate(batches(start), start):
            if step == at:
                getattr(data, where, data.observation.state)[2] = float("nan")
            yield data

    return make


@pytest.mark.parametrize("where", ["action", "state"])
def test_nan_stops_within_the_step_and_keeps_the_last_checkpoint(where, tmp_path):
    with pytest.raises(Diverged, match=r"step 7: loss is nan in row 2 of its batch \(chunks 58\)") as fault:
        run(tmp_path, make_batches=poisoned(7, where))
    assert len(str(fault.value)) < 200
    assert latest(tmp_path / "checkpoints").name == "step-00000005"
    whole, _ = run(tmp_path)  # the data mended, it goes on
    assert hashes(whole) == hashes(run(tmp_path / "undisturbed")[0])


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    ],
)
def test_out_of_memory_says_what_to_lower(fault, tmp_path):
    """What the allocators raise, word for word: neither can be made to here without harming the machine."""
    policy = build()
    policy.head.queries.register_hook(lambda grad: (_ for _ in ()).throw(fault))
    with pytest.raises(BadInput, match=r"step 0: cpu is out of memory with fit.batch_size \d+; .* try \d+") as said:
        run(tmp_path, policy)
    assert len(str(said.value)) < 200 and "\n" not in str(said.value)


def test_infinite_gradient_stops(tmp_path):
    policy = build()
    policy.head.queries.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(Diverged, match="step 0: gradient norm is"):
        run(tmp_path, policy)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("where", ["weights", "ema"])
def test_nan_in_what_would_be_saved_is_not_saved(where, tmp_path, monkeypatch):
    """One that no loss has shown yet."""
    original = Ema.update

    def poison(self, step):
        original(self, step)
        if step == 9:
            tensors = self.average if where == "ema" else self.trained
            tensors["head.queries"].data[0, 0] = float("nan")

    monkeypatch.setattr(Ema, "update", poison)
    with pytest.raises(Diverged, match=r"step 10: NaN or infinity in (ema|policy): head.queries"):
        run(tmp_path)
    assert latest(tmp_path / "checkpoints").name == "step-00000005"


def test_frozen_parts_stay_as_they_are(tmp_path):
    policy = build(with_head_options("act", dropout=0.5))
    policy.backbone.requires_grad_(False)
    before, trained = frozen_digest(policy), policy.head.queries.clone()
    out, _ = run(tmp_path, policy, replace(FIT, steps=3))
    after = load_policy(out, weights="last")
    assert all(
        torch.equal(a, b) for a, b in zip(policy.backbone.parameters(), after.backbone.parameters(), strict=True)
    )
    assert frozen_digest(policy) == before and not torch.equal(trained, policy.head.queries)
    assert not policy.backbone.training and policy.head.training


def test_a_phase_that_moves_a_frozen_part_is_found_out(tmp_path, monkeypatch):
    policy = build()
    policy.backbone.requires_grad_(False)
    monkeypatch.setattr(BehaviourCloning, "after_step", lambda self, step: policy.backbone.state[0].bias.data.add_(1))
    with pytest.raises(RuntimeError, match="a frozen part changed"):
        run(tmp_path, policy, replace(FIT, steps=2))


def test_train_mode_leaves_frozen_dropout_off():
    module = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    module[0].requires_grad_(False)
    train_mode(module)
    assert [m.training for m in (module[0][1], module[1][1])] == [False, True]


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(BadInput, match="every parameter is frozen"):
        run(tmp_path, build().requires_grad_(False))


class WithCritic(BehaviourCloning):
    """A phase with a part of its own: a head that learns beside the policy, and its slow copy."""

    def __init__(self, policy, config):
        super().__init__(policy, config)
        self.critic, self.target = nn.Linear(5, 1), nn.Linear(5, 1).requires_grad_(False)

    def forward(self, data, generator):
        loss, info = self.policy(data, generator)
        return loss + (self.critic(data.observation.state) - self.target(data.observation.state)).squeeze(-1) ** 2, info

    def followers(self):
        return [self.target]

    def parts(self):
        return {"critic": self.critic, "target": self.target}


class Forgetful(WithCritic):
    def followers(self):
        return [self.target]

    def parts(self):
        return {"critic": self.critic}


@pytest.fixture
def phases(monkeypatch):
    for name, target in {"critic": "test_fit:WithCritic", "forgetful": "test_fit:Forgetful"}.items():
        monkeypatch.setitem(registry.PHASES.table, name, target)


def test_a_phase_s_parts_are_saved_and_asked_for(phases, tmp_path):
    torch.manual_seed(0)
    out, losses = run(tmp_path, fit_config=replace(FIT, steps=6), phase_name="critic")
    saved = load_file(out / "training/critic.safetensors")
    assert saved.keys() == {"weight", "bias"}
    shutil.rmtree(out)  # back to step 5
    checkpoint._point(tmp_path / "checkpoints/latest", "step-00000005")
    again, last = run(tmp_path, fit_config=replace(FIT, steps=6), phase_name="critic")
    assert last == losses[-1:] and torch.equal(load_file(again / "training/critic.safetensors")["bias"], saved["bias"])
    with pytest.raises(BadInput, match="phase was 'critic', is now 'bc'"):
        run(tmp_path, fit_config=replace(FIT, steps=6))


def test_a_phase_that_hides_state_is_refused(phases, tmp_path):
    with pytest.raises(TypeError, match=r"Forgetful carries target.weight, which is in none of its parts"):
        run(tmp_path, phase_name="forgetful")


def test_average_of_weights():
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    slow, last = Ema(module, 0.9), Ema(module, 0.0)
    expected = 0.0
    for step in range(200):
        module.weight.data.fill_(step)
        slow.update(step)
        last.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert slow.state_dict()["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert last.state_dict()["weight"].item() == 199 and module.weight.item() == 199


def test_learning_rate():
    schedule = [learning_rate(replace(FIT, steps=100, warmup_steps=10, lr=1.0), s) for s in range(101)]
    assert schedule[0] == 0.1 and schedule[9] == 1.0 and schedule[10] == 1.0
    assert schedule[55] == pytest.approx(0.525) and schedule[100] == pytest.approx(0.05)
    assert learning_rate(replace(FIT, steps=2, warmup_steps=10), 1) < FIT.lr  # shorter than its warm-up


def test_batches_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(BadInput, match="the batches ended at step 2 of 20"):
        run(tmp_path / "a", make_batches=lambda start: iter([batch(0), batch(1)]))
    with pytest.raises(BadInput, match=r"a batch of 4 at step 0, fit.batch_size is 8"):
        run(tmp_path / "b", make_batches=lambda start: iter([tiny_policy.batch(0, size=4)]))
