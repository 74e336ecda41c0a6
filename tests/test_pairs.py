"""What every backbone promises with every head that fits it: at its tiny preset, whatever the registry holds."""

import sys
from dataclasses import fields, replace
from functools import cache
from typing import get_args, get_type_hints

import pytest
import torch
from tiny_policy import ACTION, BACKBONE, HORIZON, SCHEMA, STATE, batch, generator, stats
from torch.nn.functional import pad

from models import flow
from models.checkpoint import load_policy, publish, save_policy
from models.config import PolicyConfig
from models.pair import Pair, fitting_heads
from models.policy import Policy, PolicySpec
from models.registry import BACKBONES, HEADS
from models.types import Batch, Context

# options of what has no preset "tiny"
TINY = {
    "resnet": BACKBONE,
    "flow": {"dim": 32, "layers": 2, "steps": 4},
    "gaussian": {},  # its default; narrower, it finds eight chunks, but not how sure it may be of them
}
# of the 200 steps: more draws per step say in each what to do with all noise, and the chunk is learnt sooner than it
DRAWS, LR = 16, {"act": 3e-3, "diffusion": 3e-3}  # the learning rate is 1e-2 unless said
CYCLES = {"gaussian": (200,)}  # of warm-up and cosine, steps: 100 twice unless said, and most need only the first
LEARNING = {"diffusion": {"prediction": "sample", "down_dims": [16, 32]}}
NAMES = [(backbone, head) for backbone in BACKBONES for head in fitting_heads(BACKBONES.resolve(backbone))]
PAIRS = [pytest.param(*names, id="+".join(names)) for names in NAMES]
every_pair = pytest.mark.parametrize(("backbone", "head"), PAIRS)


def tiny(name: str, part: type) -> dict:
    preset = get_type_hints(part.Config).get("preset")
    return {"preset": "tiny"} if "tiny" in get_args(preset) else TINY[name]


def config(backbone: str, head: str, **options) -> PolicyConfig:
    return PolicyConfig(
        backbone=backbone,
        backbone_options=tiny(backbone, BACKBONES.resolve(backbone)),
        head=head,
        **{"head_options": tiny(head, HEADS.resolve(head)), "shift": 0, **options},
    )


def build(backbone: str, head: str, **options) -> Pair:
    spec = PolicySpec(config=config(backbone, head, **options), schema=SCHEMA, horizon=HORIZON)
    return Policy.build(spec, stats())


def shaken(policy: Pair) -> Pair:
    """No gate is closed and no output is zero, as a new policy's may be."""
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator(name))
    return policy


def data(size: int = 8) -> Batch:
    """Chunks whose instructions differ in length, of things that look different: a patch of its own colour in each."""
    whole = batch(size=size)
    seen = whole.observation
    for pictures in seen.images.values():
        pictures //= 4
        for i in range(size):
            row, column = divmod(i * 5 % 16, 4)
            colour = torch.randint(64, 256, (3,), generator=generator("colour", i), dtype=torch.uint8)
            pictures[i, 3 * row : 3 * row + 7, 3 * column : 3 * column + 7] = colour
    tasks = tuple("pick up the cube"[: 4 + i % 12] for i in range(size))
    return replace(whole, observation=replace(seen, tasks=tasks))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- what counts -----------------------------------------------------------------------------------------------------


@every_pair
def test_only_what_was_executed_teaches(backbone, head):
    """Contracts 2 and 7: a loss per sample; padded steps and components change neither it nor any prediction."""
    policy, whole = shaken(build(backbone, head, pad_state=STATE + 3, pad_action=WIDE)).eval(), data()
    is_pad = torch.zeros_like(whole.action_is_pad)
    is_pad[:, EXECUTED:] = True
    whole = replace(whole, action_is_pad=is_pad)
    other = whole.action.clone()
    other[:, EXECUTED:] = 1e6
    predictions = predicted_by(policy.head)
    loss, info = policy.loss(whole, generator("loss"))
    assert loss.shape == (8,) and not any(value.requires_grad for value in info.values())
    assert torch.equal(policy.loss(replace(whole, action=other), generator("loss"))[0], loss)
    loss.sum().backward()
    taught = [p.grad for p in predictions if p.grad is not None]
    assert taught, "no module of the head gives the prediction"
    for gradient in taught:
        gradient = gradient if gradient.shape[-1] == WIDE else gradient.unflatten(-1, (HORIZON, WIDE))
        entries = gradient.flatten(0, -3).abs().sum(dim=0) > 0
        assert entries.any(dim=0).tolist() == [i < ACTION for i in range(WIDE)]
        assert entries.any(dim=1).sum() == EXECUTED


WIDE, EXECUTED = ACTION + 4, 2  # components inside the network, steps before the episode's end


def predicted_by(head: torch.nn.Module) -> list[torch.Tensor]:
    """What modules of the head answer that is as wide as an action, or as a chunk; filled while it computes."""
    found = []

    def look(module, args, answer):
        if isinstance(answer, torch.Tensor) and answer.requires_grad and answer.shape[-1] in (WIDE, HORIZON * WIDE):
            answer.retain_grad()
            found.append(answer)

    for module in head.modules():
        module.register_forward_hook(look)
    return found


@every_pair
def test_every_parameter_learns(backbone, head):
    policy = shaken(build(backbone, head))
    policy.loss(data(), generator("loss"))[0].mean().backward()
    trained = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None or not gradient.any()] == []


# -- what it answers -------------------------------------------------------------------------------------------------


@every_pair
def test_the_answer_is_a_function_of_observation_and_noise(backbone, head, tmp_path):
    """Not of the global generator, nor of the company it is asked in; and a checkpoint answers the same."""
    policy, seen = shaken(build(backbone, head)).eval(), data(3).observation
    noise = torch.randn(3, *policy.noise_shape, generator=generator("noise"))
    chunk = policy.predict_action(seen, noise=noise)
    assert chunk.shape == (3, HORIZON, ACTION) and chunk.isfinite().all()
    torch.manual_seed(1)
    assert torch.equal(policy.predict_action(seen, noise=noise), chunk)
    for i in range(3):
        alone = policy.predict_action(seen.rows(slice(i, i + 1)), noise=noise[i : i + 1])
        assert torch.allclose(alone[0], chunk[i], atol=1e-4)
    publish(tmp_path / "step-1", lambda hidden: save_policy(policy, hidden), step=1)
    loaded = load_policy(tmp_path / "step-1")
    assert loaded.spec == policy.spec and torch.equal(loaded.predict_action(seen, noise=noise), chunk)


def reads_tokens(head: str) -> bool:
    part = HEADS.resolve(head)
    return bool((part.needs | part.likes) & {"tokens", "layers"})


@pytest.mark.parametrize(("backbone", "head"), [p for p in PAIRS if reads_tokens(p.values[1])])
def test_padded_tokens_change_nothing(backbone, head):
    """Neither the loss nor the answer, wherever they stand and whatever they hold."""
    policy, whole = shaken(build(backbone, head)).eval(), data()
    with torch.no_grad():
        plain = policy.context(whole.observation)
        padded = with_padding(plain)
        noise = torch.randn(8, *policy.noise_shape, generator=generator("noise"))
        answers = [policy.head.sample(context, noise) for context in (plain, padded)]
        assert torch.allclose(*answers, atol=1e-4)
        mask = policy.mask(whole.action_is_pad)
        action = policy.normalised(whole.action, mask)
        losses = [policy.head.loss(context, action, mask, generator("loss"))[0] for context in (plain, padded)]
        assert torch.allclose(*losses, atol=1e-4)


def with_padding(context: Context) -> Context:
    """Two tokens more in front, one more behind; none of them counts."""

    def more(value: torch.Tensor, dim: int) -> torch.Tensor:
        first, last = (torch.full_like(value.narrow(dim, 0, 1), x) for x in (9.0, -7.0))
        return torch.cat([first, first, value, last], dim=dim)

    some = context.tokens if context.tokens is not None else context.layers[0][0][:, 0]
    is_pad = torch.zeros(some.shape[:2], dtype=torch.bool) if context.token_is_pad is None else context.token_is_pad
    return replace(
        context,
        tokens=None if context.tokens is None else more(context.tokens, 1),
        token_is_pad=pad(is_pad, (2, 1), value=True),
        places=None if context.places is None else more(context.places, 0),
        layers=None if context.layers is None else tuple((more(k, 2), more(v, 2)) for k, v in context.layers),
    )


# -- what it learns --------------------------------------------------------------------------------------------------


@every_pair
def test_it_learns_eight_chunks(backbone, head):
    """In 200 steps, below a tenth of the error at the start, or of standing still in the middle if that is smaller."""
    policy, whole = build(backbone, head, **learning(backbone, head)), data()
    noise = torch.randn(8, *policy.noise_shape, generator=generator("noise"))

    def error() -> float:
        chunk = policy.eval().predict_action(whole.observation, noise=noise)
        return (chunk - whole.action).abs()[~whole.action_is_pad].mean().item()

    middle = policy.in_units(torch.zeros(8, HORIZON, ACTION))
    still = (middle - whole.action).abs()[~whole.action_is_pad].mean().item()
    enough = 0.1 * min(still, error())
    trained = [p for p in policy.parameters() if p.requires_grad]
    peak = LR.get(head, 1e-2)
    optimizer = torch.optim.AdamW(trained, lr=peak, fused=True)
    for cycle, steps in enumerate(CYCLES.get(head, (100, 100))):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1, pct_start=0.05)
        policy.train()
        for step in range(steps):
            policy.loss(whole, generator("step", cycle, step))[0].mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if error() < enough:
            return
    raise AssertionError(f"{error() / enough / 10:.1%} of the error is left")


def learning(backbone: str, head: str) -> dict:
    """What is chosen otherwise for few steps."""
    known = {f.name for f in fields(HEADS.resolve(head).Config)}
    draws = {name: DRAWS for name in ("draws", "expand_batch") if name in known}
    return {"head_options": {**tiny(head, HEADS.resolve(head)), **LEARNING.get(head, draws)}}


# -- flow ------------------------------------------------------------------------------------------------------------


@cache
def flows(head: str) -> bool:
    return hasattr(build(next(b for b, h in NAMES if h == head), head).head, "convention")


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("head", sorted({head for _, head in NAMES}))
def test_the_exact_field_of_one_point_leads_there(head, steps, monkeypatch):
    """Contract 5: Euler is exact on it for every number of steps, under the head's own convention."""
    if not flows(head):
        assert not hasattr(sys.modules[HEADS.module(head)], "euler")
        return
    policy = build(next(b for b, h in NAMES if h == head), head).eval()
    module = sys.modules[HEADS.module(head)]
    policy.head.config = replace(policy.head.config, steps=steps)
    noise = torch.randn(5, *policy.noise_shape, generator=generator("noise"))
    point = torch.randn(1, *policy.noise_shape, generator=generator("point"))

    def exact(x, t):
        far = (t if policy.head.convention.noise_at else 1 - t)[:, None, None]  # from the point, as a share
        return policy.head.convention.velocity(x - point, torch.zeros(())) / far

    asked = []

    def euler(convention, field, start, count):
        asked.append((convention, count, field(start, torch.full((5,), 0.5)).shape))
        return flow.euler(convention, exact, start, count)

    monkeypatch.setattr(module, "euler", euler)
    with torch.no_grad():
        reached = policy.head.sample(policy.context(data(5).observation), noise)
    assert asked == [(policy.head.convention, steps, noise.shape)]
    assert torch.allclose(reached, point.expand(5, -1, -1), atol=1e-5)
