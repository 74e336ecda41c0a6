"""StateVLA: its sizes, what its encoder may know of what, the policy's flow and its gripper, down to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_policy import ACTION, HORIZON, PX, SCHEMA, STATE, batch, generator, spec, stats
from torch.testing import assert_close

from data.errors import BadInput
from data.normalize import Normalizer, Stats, fit, merge
from models.backbones.mamba import MambaBackbone, MambaBackboneConfig
from models.backbones.statevla import StateVLA, StateVLAConfig
from models.config import PolicyConfig
from models.flow import CONVENTIONS
from models.freeze import train_mode
from models.heads.statevla import StateVLAHead, StateVLAHeadConfig, steady_signs
from models.layers.embedding import grid_positions
from models.policy import Policy
from models.types import Batch, Context, Observation, Sizes

GRIPPER = 1  # of the tiny schema's action
TINY = {"preset": "tiny"}
WORDS = ("pick up the cube", "open the drawer")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make(config: StateVLAConfig | None = None, pixels: int = PX, give: tuple[str, ...] = ("pooled", "tokens")):
    torch.manual_seed(0)
    return StateVLA(
        config or StateVLAConfig(**TINY),
        cameras=SCHEMA.cameras,
        image_size=(pixels, pixels),
        state_width=STATE,
        give=frozenset(give),
    ).eval()


def seen(b: int = 3, pixels: int = PX, purpose: str = "seen") -> Observation:
    draw = generator(purpose)
    images = {name: torch.rand(b, 3, pixels, pixels, generator=draw) for name in SCHEMA.cameras}
    return Observation(images=images, state=torch.randn(b, STATE, generator=draw), tasks=(WORDS * b)[:b])


def policy(normalization: str = "mean_std_signs", seed: int = 0, **head) -> Policy:
    config = PolicyConfig(
        backbone="statevla",
        backbone_options=TINY,
        head="statevla",
        head_options=TINY | {"gripper": GRIPPER} | head,
        normalization=normalization,
        shift=0,
    )
    return Policy.build(spec(config), statistics(), seed=seed)


def statistics() -> dict[str, Stats]:
    return stats() | {"action": fit(signed(batch()).action.flatten(0, 1).numpy())}


def signed(data: Batch) -> Batch:
    """With a gripper that is only ever -1 or +1."""
    action = data.action.clone()
    action[..., GRIPPER] = torch.where(action[..., GRIPPER] > 0.3, 1.0, -1.0)
    return replace(data, action=action)


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_parameters_of_the_published_encoder():
    with torch.device("meta"):
        encoder = StateVLA(
            StateVLAConfig(preset="published", language="clip", tasks=WORDS),
            cameras=("agentview", "eye_in_hand"),
            image_size=(128, 128),
            state_width=9,
            give=frozenset({"pooled"}),
        )
    assert count(encoder.encoder) == 5_256_448
    assert count(encoder.words) == 131_328 == 512 * 256 + 256
    assert count(encoder.robot) == 68_352
    assert [count(camera) for camera in encoder.pictures] == [196_864 + 196 * 256] * 2 == [247_040] * 2
    assert encoder.width == 256
    encoder = encoder.to_empty(device="cpu")
    encoder.words.table.fill({task: torch.ones(512) for task in WORDS})
    images = {name: torch.zeros(2, 3, 128, 128) for name in encoder.cameras}
    tokens = encoder.tokenize(Observation(images=images, state=torch.zeros(2, 9), tasks=WORDS))
    assert tokens.shape == (2, 395, 256)


def test_a_task_without_a_vector_is_refused():
    encoder = make(StateVLAConfig(**TINY, language="clip", tasks=WORDS))
    with pytest.raises(BadInput, match="has no vector yet"):
        encoder(seen())
    encoder.words.table.fill({task: torch.randn(512, generator=generator(task)) for task in WORDS})
    assert encoder(seen()).pooled.isfinite().all()
    with pytest.raises(BadInput, match="is not one of the 2 tasks"):
        encoder(replace(seen(), tasks=("fly",) * 3))


def test_parameters_of_the_published_policy():
    with torch.device("meta"):
        head = StateVLAHead(
            StateVLAHeadConfig(preset="published", gripper=-1), Sizes(context=256, state=9, horizon=10, action=7)
        )
    assert count(head.classifier) == 134_154 == 2 * (256 * 256 + 256) + 256 * 10 + 10
    assert head.places.shape == (12, 256) and head.velocity_of.out_features == 6 and head.noise_shape == (10, 6)
    assert len(head.mixer.layers) == 3 and head.mixer.layers[0].mixer.A_log.shape == (512, 64)
    assert head.mixer.layers[0].mlp.fc2.weight.shape == (256, 256)
    assert count(head.time) == 2 * (256 * 256 + 256)
    initial = StateVLAHead(StateVLAHeadConfig(), Sizes(context=8, state=9, horizon=100, action=7)).places
    assert initial.std().item() == pytest.approx(0.02, rel=0.05)


# -- the encoder -----------------------------------------------------------------------------------------------------


def test_order_of_tokens_and_who_knows_of_whom():
    """Words, state, camera after camera, CLS; each changes itself and what comes after it, nothing before."""
    encoder, now, other = make(), seen(), seen(purpose="other")
    patches = (PX // 8) ** 2
    tokens = encoder(now).tokens
    assert tokens.shape == (3, 1 + 1 + 2 * patches + 1, 32)
    mixed = {name: {**now.images, name: other.images[name]} for name in now.images}
    changes = [
        (0, replace(now, tasks=(*now.tasks[1:], "other words"))),
        (1, replace(now, state=other.state)),
        (2, replace(now, images=mixed["head"])),
        (2 + patches, replace(now, images=mixed["wrist"])),
    ]
    for first, changed in changes:
        after = encoder(changed)
        assert torch.equal(after.tokens[:, :first], tokens[:, :first])
        assert (after.tokens[:, first:] != tokens[:, first:]).any(dim=-1).all()
        assert (after.pooled != encoder(now).pooled).any(dim=-1).all()


def test_z_is_read_off_at_the_last_token_and_each_row_is_normed():
    encoder = make()
    context = encoder(seen())
    assert_close(context.pooled, encoder.project(context.tokens[:, -1]))
    assert_close(context.pooled.mean(dim=-1), torch.zeros(3), atol=1e-5, rtol=0)
    assert make(give=("tokens",))(seen()).pooled is None and not hasattr(make(give=("tokens",)), "project")


def test_a_picture_is_cut_into_squares_row_by_row():
    encoder, dark, lit = make(), torch.zeros(1, 3, PX, PX), torch.zeros(1, 3, PX, PX)
    lit[:, :, :8, 8:] = 1  # above, on the right
    difference = (encoder.pictures[0](lit) - encoder.pictures[0](dark)).abs().sum(dim=-1)[0]
    assert difference.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("give", ["pooled", "tokens"])
@pytest.mark.parametrize("kind", ["statevla", "mamba"])
def test_every_parameter_gets_a_gradient(kind, give):
    if kind == "statevla":
        backbone = make(give=(give,))
    else:
        torch.manual_seed(0)
        sizes = {"cameras": SCHEMA.cameras, "image_size": (PX, PX), "state_width": STATE, "give": frozenset({give})}
        backbone = MambaBackbone(MambaBackboneConfig(**TINY), **sizes)
    answer = getattr(backbone(seen()), give)
    (answer * torch.randn(answer.shape, generator=generator("g"))).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_mamba_backbone_reads_everything_in_order():
    torch.manual_seed(0)
    backbone = MambaBackbone(
        MambaBackboneConfig(**TINY),
        cameras=SCHEMA.cameras,
        image_size=(PX, PX),
        state_width=STATE,
        give=frozenset({"pooled", "tokens"}),
    ).eval()
    now, other = seen(), seen(purpose="other")
    before = backbone(now)
    after = backbone(replace(now, images={**now.images, "wrist": other.images["wrist"]}))
    cells = (PX // 4) ** 2
    assert before.tokens.shape == (3, 2 + 2 * cells + 1, 32) and before.pooled.shape == (3, 32)
    assert torch.equal(after.tokens[:, : 2 + cells], before.tokens[:, : 2 + cells])
    assert (after.pooled != before.pooled).any(dim=-1).all()
    with torch.device("meta"):
        large = MambaBackbone(
            MambaBackboneConfig(preset="published"),
            cameras=("head",),
            image_size=(224, 224),
            state_width=STATE,
            give=frozenset({"pooled"}),
        )
    assert count(large.mixer) == 5_256_448 and large.trunks[0].places.shape == (49, 256)


# -- frozen SigLIP ---------------------------------------------------------------------------------------------------


@pytest.fixture
def siglip(tmp_path):
    """Transformers' own, whole, saved its own way."""
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=small | {"vocab_size": 8}, vision_config=small | {"image_size": 32}))
    model.save_pretrained(tmp_path)
    return model.eval(), str(tmp_path)


def test_siglip_tokens_are_transformers(siglip):
    model, folder = siglip
    encoder = make(StateVLAConfig(**TINY, vision="siglip", pretrained=folder), pixels=32)
    encoder.load_pretrained()
    images = seen(pixels=32).images
    for tokens, pictures in zip(encoder.tower(list(images.values())), images.values(), strict=True):
        assert_close(tokens, model.vision_model(pixel_values=2 * pictures - 1).last_hidden_state, atol=1e-5, rtol=0)
    train_mode(encoder)
    assert encoder.training and not encoder.tower.training
    encoder(seen(pixels=48)).pooled.sum().backward()  # of another size: scaled
    trained = {name.split(".")[0] for name, p in encoder.named_parameters() if p.grad is not None}
    assert "tower" not in trained and "pictures" in trained


def test_siglip_refuses_other_weights(siglip, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    encoder = make(StateVLAConfig(**TINY, vision="siglip", pretrained=str(tmp_path)))
    with pytest.raises(BadInput, match=r"vision_model\.\S+ is missing; name the weights"):
        encoder.load_pretrained()
    encoder = make(StateVLAConfig(**TINY, vision="siglip", pretrained=str(tmp_path / "nowhere")))
    with pytest.raises(BadInput, match=r"nowhere/model\.safetensors: cannot be read"):
        encoder.load_pretrained()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vision": "siglip"}, "a frozen SigLIP needs weights"),
        ({"tasks": WORDS}, "leave tasks out, or set language clip"),
    ],
)
def test_refused_options_of_the_encoder(options, message):
    with pytest.raises(BadInput, match=message):
        StateVLAConfig(**TINY | options)


def test_places_begin_apart():
    """As strong as a patch, or its place is lost in it; learnt from there on."""
    camera = make().pictures[0]
    rows = PX // 8
    assert torch.equal(camera.places, grid_positions(rows, rows, 32)) and camera.places.requires_grad
    apart = torch.cdist(camera.places, camera.places) + 9 * torch.eye(rows * rows)
    assert apart.min() > 1


def test_pictures_that_do_not_divide_into_patches_are_refused():
    with pytest.raises(BadInput, match="20 x 20 are no multiple of its patches of 8"):
        make(pixels=20)


# -- the policy ------------------------------------------------------------------------------------------------------


def head_of(horizon: int = HORIZON, width: int = 16, **options) -> StateVLAHead:
    torch.manual_seed(0)
    options = StateVLAHeadConfig(**TINY | options)
    return StateVLAHead(options, Sizes(context=width, state=STATE, horizon=horizon, action=ACTION)).eval()


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_with_the_exact_field_returns_the_point(steps, monkeypatch):
    """The velocity of a point mass is (x_t - point) / σ under noise_at_1; Euler is exact for every N."""
    head = head_of(steps=steps)
    point, noise = (torch.randn(5, *head.noise_shape, generator=generator(p)) for p in ("point", "noise"))
    monkeypatch.setattr(head, "velocity", lambda x, t, context: (x - point) / t[:, None, None])
    assert head.convention is CONVENTIONS["noise_at_1"]
    assert_close(head.sample(Context(pooled=torch.zeros(5, 16)), noise), point, atol=1e-5, rtol=0)


def test_an_exact_velocity_costs_nothing_and_any_other_its_square(monkeypatch):
    head, action = head_of(draws=2), torch.zeros(3, HORIZON, ACTION)
    mask, context = torch.ones_like(action, dtype=torch.bool), Context(pooled=torch.zeros(3, 16))
    monkeypatch.setattr(head, "velocity", lambda x, t, context: x / t[:, None, None])
    assert head.loss(context, action, mask, generator("l"))[0].max() < 1e-8
    monkeypatch.setattr(head, "velocity", lambda x, t, context: x / t[:, None, None] + 2)
    assert_close(head.loss(context, action, mask, generator("l"))[0], torch.full((3,), 4.0))


def test_velocity_knows_sigma_z_and_earlier_actions_only():
    head, x = head_of(), torch.randn(2, HORIZON, ACTION, generator=generator("x"))
    context, t = Context(pooled=torch.randn(2, 16, generator=generator("z"))), torch.tensor([0.3, 0.8])
    v = head.velocity(x, t, context)
    later = x.clone()
    later[:, 2:] += 1
    assert torch.equal(head.velocity(later, t, context)[:, :2], v[:, :2])
    assert (head.velocity(later, t, context)[:, 2:] != v[:, 2:]).all()
    assert (head.velocity(x, t + 0.1, context) != v).all()
    assert (head.velocity(x, t, Context(pooled=context.pooled + 1)) != v).all()


def test_steady_signs_as_drawn():
    p = torch.tensor([[0.9, 0.8, 0.45, 0.55, 0.48, 0.1, 0.2], [0.49, 0.6, 0.71, 0.6, 0.4, 0.3, 0.29]])
    assert steady_signs(p, 0.0)[0].tolist() == [1, 1, -1, 1, -1, -1, -1]
    assert steady_signs(p, 0.2).tolist() == [[1, 1, 1, 1, 1, -1, -1], [-1, -1, 1, 1, 1, 1, -1]]


@pytest.mark.parametrize("normalization", ["mean_std_signs", "min_max"])
@pytest.mark.parametrize("reads_chunk", [False, True])
def test_the_gripper_is_exactly_minus_or_plus_one_in_units(normalization, reads_chunk):
    answered = policy(normalization, reads_chunk=reads_chunk).eval()
    chunk = answered.predict_action(batch(size=64).observation, generator("n"))
    assert set(chunk[..., GRIPPER].unique().tolist()) == {-1.0, 1.0}
    assert chunk.shape == (64, HORIZON, ACTION) and (chunk[..., 2].abs() < 20).all()


def test_a_gripper_that_is_not_its_own_sign_is_refused():
    for kind, data in (("mean_std", signed(batch())), ("mean_std_signs", batch())):
        with pytest.raises(BadInput, match=r"component 1 is not always -1 or \+1 inside the network"):
            policy(kind).loss(data, generator("l"))
    wide = replace(policy().spec.config, pad_action=8, head_options=TINY | {"gripper": -1})
    with pytest.raises(BadInput, match="component 7 is not"):  # padding
        Policy.build(spec(wide), statistics()).loss(signed(batch()), generator("l"))


def test_the_gripper_s_loss_is_cross_entropy_over_executed_steps():
    trained, data = policy(pos_weight=3.0), signed(batch())
    context = trained.context(data.observation)
    logits = trained.head.classifier(context.pooled)
    opens = (data.action[..., GRIPPER] + 1) / 2
    entropy = F.binary_cross_entropy(logits.sigmoid(), opens, reduction="none") * (1 + 2 * opens)
    counts = ~data.action_is_pad
    expected = (entropy * counts).sum(dim=1) / counts.sum(dim=1)
    loss, info = trained.loss(data, generator("l"))
    assert_close(info["gripper_loss"], expected.mean())
    assert_close(loss.mean(), info["gripper_loss"] + info["pos_rot_loss"])
    elsewhere = data.action.clone()
    elsewhere[data.action_is_pad] = 7.0
    assert torch.equal(trained.loss(replace(data, action=elsewhere), generator("l"))[0], loss)


def test_it_learns_when_to_close():
    trained, data = policy().train(), signed(batch())
    optimizer = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    for step in range(60):
        trained.loss(data, generator("step", step))[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    chunk = trained.eval().predict_action(data.observation, generator("n"))
    real = ~data.action_is_pad
    assert torch.equal(chunk[..., GRIPPER][real], data.action[..., GRIPPER][real])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gripper": 3}, "gripper 3 is none of 3 action components"),
        ({"margin": 0.5}, r"margin 0.5 must be in \[0, .5\)"),
        ({"steps": 0}, "steps 0 must be at least 1"),
    ],
)
def test_refused_options_of_the_head(options, message):
    with pytest.raises(BadInput, match=message):
        policy(**options)


# -- its normalisation -----------------------------------------------------------------------------------------------


def test_signs_pass_unchanged_and_only_they():
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (1000, 1))
    almost = signs.copy()
    almost[500] = 0.999
    rows = np.concatenate([rng.normal(3, 2, (1000, 1)), signs, almost, np.ones((1000, 1))], axis=1)
    whole = Normalizer(stats=fit(rows), mode="mean_std_signs")
    plain = Normalizer(stats=whole.stats, mode="mean_std")
    assert whole.center.tolist() == [plain.center[0], 0.0, plain.center[2], 0.0]
    assert whole.width.tolist() == [plain.width[0], 1.0, plain.width[2], 1.0]
    x = rows.astype(np.float32)
    assert np.array_equal(whole.apply(x)[:, 1], x[:, 1]) and np.array_equal(whole.invert(x)[:, 1], x[:, 1])
    parts = merge([fit(part) for part in np.split(rows, [10, 333])])
    assert Normalizer(stats=parts, mode="mean_std_signs").width[1] == 1.0
