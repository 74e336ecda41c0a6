"""StateVLA's two phases: an encoder that foretells its own next state, a head that acts by what it says."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import ACTION, PX, SCHEMA, batch, generator, stats
from torch.testing import assert_close

from data.errors import BadInput
from data.loader import fake_batch
from models.checkpoint import load_encoder, load_policy
from models.config import FitConfig, JepaConfig, PolicyConfig, ReaderConfig
from models.encoder import Encoder, EncoderSpec, policy_on
from models.fit import fit
from models.layers.vicreg import covariance_floor, covariance_loss, effective_rank, variance_loss
from models.pair import Pair
from models.phases.bc import BehaviourCloning
from models.phases.flow_matching import Encoded, FlowMatching
from models.phases.jepa import Jepa, TemporalPredictor, momentum
from models.probe import Probe, encode, probe, r_squared, ridge
from models.ranks import in_ranks
from models.types import Batch, NoOptions, Transition

TINY = {"preset": "tiny"}
FIT = FitConfig(steps=6, batch_size=8, lr=1e-3, warmup_steps=1, save_every=2, threads=1)
JEPA = JepaConfig(hidden=16, total_steps=FIT.steps)


def encoder(seed: int = 0, backbone: str = "statevla", shift: int = 0) -> Encoder:
    config = ReaderConfig(backbone=backbone, backbone_options=TINY, shift=shift)
    return Encoder.build(EncoderSpec(config=config, schema=SCHEMA, horizon=1), stats(), seed=seed)


def transition(seed: int = 0, size: int = 8) -> Transition:
    columns = fake_batch(SCHEMA, batch_size=size, horizon=1, seed=seed, with_next=True)
    return Transition.of(columns)


def transitions(start: int) -> Iterator[Transition]:
    while True:
        yield transition(start)
        start += 1


def jepa(**options) -> Jepa:
    return Jepa(encoder(), replace(JEPA, **options)).train()


# -- formulae --------------------------------------------------------------------------------------------------------


def test_momentum_over_the_steps():
    found = [momentum(step, 100, 0.996) for step in (0, 25, 50, 75, 100)]
    assert found == pytest.approx([0.996, 0.996586, 0.998, 0.999414, 1.0], abs=5e-7)


def test_the_published_predictor():
    with torch.device("meta"):
        whole = TemporalPredictor(width=256, action=7, hidden=512)
    sizes = [sum(p.numel() for p in m.parameters()) for m in whole.modules() if not list(m.children())]
    assert [n for n in sizes if n] == [131_584, 4_096, 524_800, 1_024, 262_656, 1_024, 131_328]
    assert sum(sizes) == 1_056_512
    z = torch.randn(3, 8, generator=generator("z"))
    new = TemporalPredictor(width=8, action=ACTION, hidden=16)
    assert torch.equal(new(z, torch.randn(3, 1, ACTION, generator=generator("a"))), z)


def test_the_covariance_s_floor():
    assert [covariance_floor(b, 256) for b in (64, 128, 256)] == pytest.approx([4.05, 2.01, 1.00], abs=5e-3)
    white = [covariance_loss(torch.randn(64, 256, generator=generator(i))) for i in range(20)]
    assert torch.stack(white).mean().item() == pytest.approx(covariance_floor(64, 256), rel=0.02)
    alike = torch.randn(64, 1, generator=generator("one")).expand(-1, 8)
    assert covariance_loss(alike).item() == pytest.approx(7 * alike[:, 0].var().item() ** 2, rel=1e-4)


def test_missing_variance_and_its_slope_where_there_is_none():
    z = torch.randn(64, 8, generator=generator("z"))
    assert variance_loss(3 * z) == 0
    assert variance_loss(z * 0.5 / z.std(dim=0)).item() == pytest.approx(0.5, abs=1e-3)
    same = torch.ones(4, 8, requires_grad=True)
    loss = variance_loss(same)
    loss.backward()
    assert loss.item() == pytest.approx(0.99) and same.grad is not None and same.grad.isfinite().all()


def test_effective_rank():
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator("q"))).Q
    mixed = basis @ torch.linalg.qr(torch.randn(20, 8, generator=generator("r"))).Q.mT
    assert effective_rank(mixed).item() == pytest.approx(8, abs=0.01)
    assert effective_rank(mixed[:5]).item() <= 5
    assert effective_rank(torch.ones(64, 8) + 1e-6 * torch.randn(64, 8, generator=generator("n"))).item() < 1.01


# -- phase 1 ---------------------------------------------------------------------------------------------------------


def test_loss_by_its_formula():
    phase, data = jepa().eval(), transition()
    torch.nn.init.normal_(phase.predictor.change[-1].weight, std=0.1, generator=generator("w"))
    z, following = phase.policy(data.observation), phase.target.backbone(phase.policy.prepare(data.next)).pooled
    action = phase.policy.action.apply(data.action)[:, 0]
    p = phase.predictor
    foretold = z + p.change(torch.cat([p.of_state(z), p.of_action(action)], dim=1))
    terms = [1.0 * variance_loss(v) + 0.04 * covariance_loss(v) for v in (z, foretold)]
    loss, info = phase(data, generator("l"))
    assert loss.shape == (8,)
    assert_close(loss, ((foretold - following) ** 2).mean(dim=1) + sum(terms) / 2)
    assert_close(loss.mean(), info["jepa_mse"] + info["jepa_variance"] + 0.04 * info["jepa_covariance"])
    assert_close(info["jepa_covariance_excess"], info["jepa_covariance"] - (32 - 1) / (8 - 1))
    assert 1 <= info["jepa_rank"] <= 8 and not any(v.requires_grad for v in info.values())


def test_the_target_is_the_whole_backbone_learns_nothing_and_follows():
    phase = jepa()
    before = {n: t.clone() for n, t in phase.target.backbone.state_dict().items()}
    assert before.keys() == phase.policy.backbone.state_dict().keys()  # tokens and projection too
    torch.nn.init.normal_(phase.predictor.change[-1].weight, std=0.1, generator=generator("w"))
    phase(transition(), generator("l"))[0].mean().backward()
    assert [n for n, p in phase.target.named_parameters() if p.grad is not None] == []
    learnt = {n: p for n, p in phase.named_parameters() if p.requires_grad}
    assert [n for n, p in learnt.items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        for p in phase.policy.backbone.parameters():
            p.add_(1.0)
    phase.after_step(3)
    kept = momentum(3, FIT.steps, 0.996)
    for name, p in phase.target.backbone.named_parameters():
        assert_close(p, before[name] + (1 - kept), atol=1e-6, rtol=1e-5)
    phase.after_step(FIT.steps)
    assert_close(phase.target.backbone.cls, before["cls"] + (1 - kept), atol=1e-6, rtol=1e-5)


def test_what_comes_later_is_never_an_input():
    phase, data = jepa().eval(), transition()
    given = []
    phase.policy.backbone.register_forward_hook(lambda m, args, answer: given.append(answer.pooled))
    phase.predictor.register_forward_hook(lambda m, args, answer: given.append(answer))
    first, _ = phase(data, generator("l"))
    second, _ = phase(replace(data, next=transition(1).next), generator("l"))
    assert torch.equal(given[0], given[2]) and torch.equal(given[1], given[3])
    assert (first != second).all()


def test_both_moments_are_shifted_alike():
    """A new predictor foretells no change, and a new target is the encoder: what does not change is then no error."""
    phase = Jepa(encoder(shift=4), JEPA).train()
    still = transition()
    _, info = phase(replace(still, next=still.observation), generator("l"))
    assert info["jepa_mse"] == 0
    drawn = [phase.policy.prepare(still.observation, generator(name)).images["head"] for name in ("l", "other")]
    assert not torch.equal(*drawn)


def test_one_sample_and_no_schedule_are_refused():
    with pytest.raises(BadInput, match=r"fit\.batch_size 2 or more"):
        jepa()(transition(size=1), generator("l"))
    with pytest.raises(BadInput, match="total_steps is 0; give the steps"):
        jepa(total_steps=0)


def learn(folder: Path, config: FitConfig = FIT, stop: int | None = None, told: dict | None = None) -> Path:
    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if told is not None:
            told[step] = {n: v for n, v in metrics.items() if n != "samples_per_s"}
        if step == stop:
            raise KeyboardInterrupt

    options = {"hidden": 16, "total_steps": config.steps}
    return fit(
        encoder(shift=2), transitions, config, folder, phase_name="jepa", phase_options=options, on_metrics=on_metrics
    )


def test_killed_and_resumed_is_undisturbed(tmp_path):
    whole: dict = {}
    undisturbed, parts = learn(tmp_path / "whole", told=whole), {}
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", stop=3, told=parts)
    resumed = learn(tmp_path / "killed", told=parts)
    assert parts == whole
    files = sorted(p.relative_to(undisturbed) for p in undisturbed.rglob("*.safetensors"))
    assert {"predictor.safetensors", "target.safetensors"} < {p.name for p in files}
    for file in files:
        assert (undisturbed / file).read_bytes() == (resumed / file).read_bytes(), file


def in_one_rank(job: tuple[Path, FitConfig], on_metrics) -> Path:
    folder, config = job
    options = {"hidden": 16, "total_steps": config.steps}
    return fit(encoder(), transitions, config, folder, phase_name="jepa", phase_options=options, on_metrics=on_metrics)


def test_two_ranks_learn_what_one_process_does(tmp_path):
    """Variance and covariance are of all rows, wherever they are."""
    one, two, config = {}, {}, replace(FIT, steps=2)
    alone = in_ranks(in_one_rank, (tmp_path / "one", config), 1, lambda s, m: one.update({s: m}))
    shared = in_ranks(in_one_rank, (tmp_path / "two", config), 2, lambda s, m: two.update({s: m}))
    for name in ("loss", "jepa_mse", "jepa_variance", "jepa_covariance", "jepa_rank"):
        assert two[2][name] == pytest.approx(one[2][name], rel=1e-4), name
    apart = load_file(shared / "weights.safetensors")
    for name, weight in load_file(alone / "weights.safetensors").items():
        assert torch.allclose(weight, apart[name], atol=1e-5), name


@pytest.mark.parametrize("backbone", ["statevla", "mamba"])
def test_an_encoder_is_saved_and_loaded(backbone, tmp_path):
    told = encoder(backbone=backbone)
    options = {"hidden": 16, "total_steps": 1}
    config = replace(FIT, steps=1, save_every=1)
    path = fit(told, transitions, config, tmp_path, phase_name="jepa", phase_options=options)
    loaded = load_encoder(path, fits=SCHEMA)
    assert loaded.spec == told.spec
    seen = transition().observation
    averaged = load_file(path / "ema.safetensors")
    told.load_state_dict(averaged)
    assert torch.equal(loaded(seen), told.eval()(seen))
    with pytest.raises(BadInput, match="holds a encoder, not a policy"):
        load_policy(path)


# -- phase 2 ---------------------------------------------------------------------------------------------------------


def acting(head: str = "statevla", frozen: Encoder | None = None) -> Pair:
    return policy_on(frozen or encoder(), PolicyConfig(head=head, head_options=TINY, shift=4), horizon=4)


def encoded(policy: Pair, data: Batch) -> Encoded:
    with torch.no_grad():
        z = policy.context(data.observation).pooled
    images = {}  # are never looked at
    values = {name: getattr(data, name) for name in ("action", "action_is_pad", "index")}
    return Encoded(observation=replace(data.observation, images=images), z=z, **values)


def test_cached_encodings_give_the_loss_of_the_encoder_in_the_loop():
    data, inside, cached = batch(), BehaviourCloning(acting(), NoOptions()), FlowMatching(acting(), NoOptions())
    inside.policy.backbone.requires_grad_(False)
    slow, slow_info = inside(data, generator("l"))
    fast, fast_info = cached(encoded(cached.policy, data), generator("l"))
    assert_close(fast, slow, atol=1e-6, rtol=0)
    assert fast_info.keys() == slow_info.keys()
    slow.mean().backward()
    fast.mean().backward()
    for (name, p), q in zip(cached.policy.named_parameters(), inside.policy.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == name.startswith("backbone."), name
        if p.grad is not None:
            assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5)


def test_the_encoder_stands_still_and_a_killed_run_goes_on(tmp_path):
    def batches(start: int) -> Iterator[Encoded]:
        while True:
            yield encoded(known, batch(start))
            start += 1

    def stop(step: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        if step == 3 and len(losses) == 9:
            raise KeyboardInterrupt

    known, losses = acting().eval(), []
    whole = fit(acting(), batches, FIT, tmp_path / "whole", phase_name="flow_matching", on_metrics=stop)
    with pytest.raises(KeyboardInterrupt):
        fit(acting(), batches, FIT, tmp_path / "killed", phase_name="flow_matching", on_metrics=stop)
    again = fit(acting(), batches, FIT, tmp_path / "killed", phase_name="flow_matching", on_metrics=stop)
    assert losses[6:8] + losses[9:] == losses[:6]
    weights = load_file(whole / "weights.safetensors")
    for name, weight in load_file(again / "weights.safetensors").items():
        assert torch.equal(weight, weights[name]), name
    backbone = {f"backbone.{n}": t for n, t in encoder().backbone.state_dict().items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in backbone.items())
    seen = batch().observation
    assert torch.equal(load_policy(whole, weights="last").context(seen).pooled, known.context(seen).pooled)


def test_what_reads_more_than_z_is_refused():
    with pytest.raises(BadInput, match="head 'act' reads more than an encoder's z"):
        acting("act")


# -- what it knows ---------------------------------------------------------------------------------------------------


def test_a_probe_reads_what_is_there_on_other_rows():
    z = np.random.default_rng(0).normal(2.0, [1.0, 10.0, 0.1, 1.0], (600, 4)).astype(np.float32)
    y = np.stack([z[:, 0] - 30 * z[:, 2] + 5, np.random.default_rng(1).normal(size=600)], axis=1)
    found = probe(z[:400], y[:400], z[400:], y[400:])
    assert found.r2[0] > 0.999 and abs(found.r2[1]) < 0.1
    assert found.score == pytest.approx(sum(found.r2) / 2) and 1 <= found.rank <= 4
    assert ridge(z[:400], y[:400])(z[400:]).shape == (200, 2)
    assert r_squared(y, np.broadcast_to(y.mean(axis=0), y.shape)).tolist() == pytest.approx([0, 0], abs=1e-9)


class Source:
    """A `ChunkSource` of noise, whose rows are known by their number."""

    def __init__(self, rows: int) -> None:
        self.columns = fake_batch(SCHEMA, batch_size=rows, horizon=1)

    def __len__(self) -> int:
        return len(self.columns["index"])

    def buffers(self, batch_size: int) -> dict:
        return {}

    def gather(self, index: np.ndarray, into: dict) -> dict:
        return {n: [v[i] for i in index] if n == "task" else v[index] for n, v in self.columns.items()}


def test_encoding_goes_through_all_rows_in_order():
    knows, source, counted = encoder().eval(), Source(260), []
    z = encode(knows, source, counted.append)
    assert counted == [256, 4] and z.shape == (260, 32)
    seen = Batch.of(source.gather(np.arange(255, 258), {})).observation
    with torch.no_grad():
        assert_close(torch.from_numpy(z[255:258]), knows(seen), atol=1e-5, rtol=1e-5)


# -- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularised", [True, False])
def test_it_learns_where_things_are_and_without_vicreg_it_collapses(regularised):
    weights = {"covariance": 0.2} if regularised else {"variance": 0.0, "covariance": 0.0}
    phase = jepa(hidden=32, total_steps=60, momentum=0.5, **weights)
    optimizer = torch.optim.AdamW([p for p in phase.parameters() if p.requires_grad], lr=3e-3)
    untrained = knows(encoder())
    for step in range(60):
        phase(dots(step)[0], generator("step", step))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        phase.after_step(step)
    found = knows(phase.policy)
    if regularised:
        assert found.score > 0.85 > untrained.score + 0.1 and found.rank > 6
    else:
        assert found.rank < 4


def knows(encoder: Encoder) -> Probe:
    encoder.eval()
    with torch.no_grad():
        pairs = [(encoder(data.observation).numpy(), where) for data, where in map(dots, range(1000, 1012))]
    z, where = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return probe(z[:256], where[:256], z[256:], where[256:])


def dots(seed: int, size: int = 32) -> tuple[Transition, np.ndarray]:
    """A bright square on noise, which the action moves, and where it is; the state knows nothing of it."""
    rng = np.random.default_rng([seed, 7])
    where = rng.uniform(0, PX - 4, (size, 2))
    action = rng.uniform(-1, 1, (size, 1, ACTION)).astype(np.float32)
    columns = fake_batch(SCHEMA, batch_size=size, horizon=1, seed=seed, with_next=True)
    for prefix, place in (("", where), ("next.", np.clip(where + 3 * action[:, 0, :2], 0, PX - 4))):
        for camera in SCHEMA.cameras:
            columns[f"{prefix}observation.images.{camera}"] = drawn(place, rng)
    return Transition.of(columns | {"action": action}), where


def drawn(where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pictures = rng.integers(0, 60, (len(where), PX, PX, 3), np.uint8)
    for picture, (row, column) in zip(pictures, where.round().astype(int), strict=True):
        picture[row : row + 4, column : column + 4] = 255
    return pictures
