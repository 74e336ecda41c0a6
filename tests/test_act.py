"""ACT: the same numbers as LeRobot's, and what theirs does not promise."""

from dataclasses import replace

import pytest
import torch
from tiny_policy import ACTION, HORIZON, STATE, batch, build, generator
from torch import nn
from torch.testing import assert_close

from data.errors import BadInput
from models.backbones.act import ActBackbone
from models.backbones.act import ActConfig as EyesConfig
from models.config import PolicyConfig
from models.heads.act import ActConfig, ActHead, gaussian_kl
from models.layers.detr import LayerSize, chain_places, picture_places
from models.layers.trunks import IMAGENET_MEAN, IMAGENET_STD
from models.published.act import renamed
from models.types import Context, Observation, Sizes

PX, CAMERAS, H = 64, ("head", "wrist"), 6
WIDE = LayerSize(dim=32, heads=4, feedforward=48)


def config(backbone: dict | None = None, **head) -> PolicyConfig:
    return PolicyConfig(
        backbone="act",
        backbone_options={"preset": "tiny"} | (backbone or {}),
        head="act",
        head_options={"preset": "tiny"} | head,
        shift=0,
    )


def draw(*shape: int, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(purpose))


def eyes(*, environment: int = 0, give: str = "tokens places", state: int = STATE, cameras=CAMERAS, **options):
    torch.manual_seed(0)
    return ActBackbone(
        EyesConfig(**{"preset": "tiny", **options, "environment": environment}),
        cameras=cameras,
        image_size=(PX, PX),
        state_width=state,
        give=frozenset(give.split()),
    )


# -- parity ----------------------------------------------------------------------------------------------------------


def lerobot_model(*, environment: int = 0, **options):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig as LeRobotConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    features = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, PX, PX)) for name in CAMERAS}
    features["observation.state"] = PolicyFeature(FeatureType.STATE, (STATE,))
    if environment:
        features["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (environment,))
    torch.manual_seed(1)
    made = ACTPolicy(
        LeRobotConfig(
            device="cpu",
            chunk_size=H,
            n_action_steps=H,
            input_features=features,
            output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
            pretrained_backbone_weights=None,
            dim_model=WIDE.dim,
            n_heads=WIDE.heads,
            dim_feedforward=WIDE.feedforward,
            n_encoder_layers=2,
            n_vae_encoder_layers=2,
            dropout=0.0,
            **options,
        )
    )
    with torch.no_grad():  # a new norm is the identity: then many mistakes look right
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if "norm" in name or "bn" in name or "downsample.1" in name:
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return made


def copy_of(reference, *, environment: int = 0, **options) -> tuple[ActBackbone, ActHead]:
    """Ours with the reference's weights."""
    backbone = eyes(
        environment=environment,
        state=STATE + environment,
        preset="published",
        dim=WIDE.dim,
        frozen_norm=True,
    )
    head = ActHead(
        ActConfig(
            preset="published",
            dim=WIDE.dim,
            heads=WIDE.heads,
            feedforward=WIDE.feedforward,
            encoder_layers=2,
            vae_layers=2,
            decoder_layers=reference.config.n_decoder_layers,
            dropout=0.0,
            environment=environment,
            **options,
        ),
        Sizes(context=backbone.width, state=STATE + environment, horizon=H, action=ACTION),
    )
    weights = renamed(reference.state_dict(), use_vae=head.config.size.use_vae)
    nn.ModuleDict({"backbone": backbone, "head": head}).load_state_dict(weights)
    return backbone, head


def observed(b: int, environment: int = 0) -> tuple[Observation, dict[str, torch.Tensor]]:
    """The same for us and for LeRobot, whose processor scales pictures beforehand."""
    images = {name: torch.rand(b, 3, PX, PX, generator=generator(name)) for name in CAMERAS}
    state, around = draw(b, STATE, purpose="state"), draw(b, environment, purpose="environment")
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    theirs = {f"observation.images.{name}": (image - mean) / std for name, image in images.items()}
    theirs |= {"observation.state": state} | ({"observation.environment_state": around} if environment else {})
    return Observation(images=images, state=torch.cat([state, around], dim=1), tasks=("",) * b), theirs


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"use_vae": True},
        {"use_vae": True, "pre_norm": True, "n_decoder_layers": 2, "environment": 3},
        {"use_vae": False},
    ],
    ids=["vae", "vae, pre-norm, two decoder layers, environment", "no vae"],
)
def test_loss_gradients_and_chunks_are_lerobot_s(options, monkeypatch):
    b, environment = 3, options.get("environment", 0)
    reference = lerobot_model(**options).train()
    ours = {name: options[name] for name in ("use_vae", "pre_norm") if name in options}
    backbone, head = copy_of(reference, environment=environment, **ours)
    seen, theirs = observed(b, environment)
    action_is_pad = torch.arange(H) >= torch.tensor([6, 4, 1])[:, None]
    action = draw(b, H, ACTION).where(~action_is_pad[..., None], 0.0)
    noise = torch.randn(b, 32, generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr(torch, "randn_like", lambda mean: noise.clone())  # it draws from the global generator

    expected, numbers = reference.forward(theirs | {"action": action, "action_is_pad": action_is_pad})
    expected.backward()
    mask = ~action_is_pad[..., None].expand(-1, -1, ACTION)
    context = replace(backbone(seen), state=seen.state)
    loss, info = head.loss(context, action, mask, torch.Generator().manual_seed(7))
    weights = mask.sum((1, 2)) / mask.sum()  # their L1 is a mean over the batch's entries, their KL one over samples
    kl = torch.zeros(b)
    if head.config.size.use_vae:
        kl = head.config.kl_weight * gaussian_kl(*head.style(seen.state, action, mask))
        assert info["kl"].item() == pytest.approx(numbers["kld_loss"], abs=1e-5)
    of_batch = ((loss - kl) * weights).sum() + kl.mean()
    of_batch.backward()
    assert_close(of_batch, expected, atol=1e-5, rtol=1e-5)

    whole = nn.ModuleDict({"backbone": backbone, "head": head})
    wanted = renamed(gradients(reference), use_vae=head.config.size.use_vae)
    found = gradients(whole)
    assert wanted.keys() == found.keys()
    for name, gradient in found.items():
        assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")

    with torch.no_grad():
        chunk = head.eval().sample(replace(backbone.eval()(seen), state=seen.state), torch.zeros(b, 0))
        assert_close(chunk, reference.predict_action_chunk(theirs), atol=1e-5, rtol=0)


def test_places_are_lerobot_s():
    from lerobot.policies.act.modeling_act import ACTSinusoidalPositionEmbedding2d, create_sinusoidal_pos_embedding

    there = ACTSinusoidalPositionEmbedding2d(8)(torch.zeros(1, 3, 5, 7))
    assert_close(picture_places(5, 7, 16), there.flatten(2)[0].T, atol=1e-6, rtol=0)
    assert_close(chain_places(9, 16), create_sinusoidal_pos_embedding(9, 16), atol=1e-6, rtol=0)


# -- promises --------------------------------------------------------------------------------------------------------


def test_cells_stay_where_they_are():
    """Never averaged: what is in a corner of the picture changes the tokens of that corner."""
    backbone, (seen, _) = eyes().eval(), observed(1)
    moved = {name: image.clone() for name, image in seen.images.items()}
    moved["wrist"][:, :, :4, -4:] = 1.0  # 4 pixels a cell, 16 cells a side
    before, after = (backbone(replace(seen, images=images)) for images in (seen.images, moved))
    assert before.tokens.shape == (1, 1 + 2 * 256, 32) and before.places.shape == (1 + 2 * 256, 32)
    changed = (before.tokens - after.tokens).abs().sum(dim=-1)[0, 1:].view(2, 16, 16)
    assert changed[1, 0, 15] == changed.max() > 2 * changed[0].max()


def test_places_are_apart_or_in_the_tokens():
    seen = observed(2)[0]
    apart, together = eyes(), eyes(give="tokens pooled", encoder_layers=1)
    assert len(apart.encoder.layers) == 0 and len(eyes(give="pooled").encoder.layers) == 1
    together.load_state_dict(apart.state_dict(), strict=False)
    bare = apart(seen)
    assert bare.pooled is None
    with_places = together(seen)
    assert with_places.places is None
    expected = together.encoder(bare.tokens + bare.places)
    assert torch.equal(with_places.tokens, expected) and torch.equal(with_places.pooled, expected[:, 0])


@pytest.mark.parametrize("option", ["use_vae", "pre_norm"])
@pytest.mark.parametrize("queries", ["tokens", "positions"])
def test_padded_tokens_and_steps_change_nothing(option, queries):
    sizes = Sizes(context=12, state=STATE, horizon=H, action=ACTION)
    torch.manual_seed(0)
    head = ActHead(ActConfig(preset="tiny", queries=queries, **{option: True}), sizes).eval()
    plain = Context(tokens=draw(2, 5, 12), places=draw(5, 12, purpose="p"), state=draw(2, STATE, purpose="s"))
    padded = Context(
        tokens=torch.cat([plain.tokens, torch.full((2, 3, 12), 9.0)], dim=1),
        places=torch.cat([plain.places, torch.ones(3, 12)]),
        token_is_pad=(torch.arange(8) >= 5).expand(2, -1),
        state=plain.state,
    )
    mask = (torch.arange(H) < torch.tensor([H, 2])[:, None])[..., None].expand(-1, -1, ACTION)
    action = draw(2, H, ACTION, purpose="a")
    for actions in (action.where(mask, 0.0), action.where(mask, 1e3)):
        losses = [head.loss(c, actions, mask, generator("l"))[0] for c in (plain, padded)]
        assert_close(*losses, atol=1e-5, rtol=0)
    wrong = replace(padded, token_is_pad=None)
    assert not torch.allclose(head.sample(wrong, torch.zeros(2, 0)), head.sample(plain, torch.zeros(2, 0)), atol=1e-3)


def test_the_style_of_zeros_acts_and_the_executed_one_teaches():
    """What the style says of the actions reaches the chunk; acting has none to go by."""
    policy, data = build(config(use_vae=True, latent=4)).eval(), batch()
    seen = []
    policy.head.of_style.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    policy.predict_action(data.observation, generator(0))
    assert seen[0].shape == (8, 4) and not seen[0].any()
    loss, info = policy.loss(data, generator(0))
    assert seen[1].any() and loss.shape == (8,)
    assert loss.mean().item() == pytest.approx((info["l1"] + 10 * info["kl"]).item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"use_vae": True}])
def test_every_parameter_learns(options):
    policy, data = build(config(**options)), batch()
    policy.loss(data, generator("l"))[0].mean().backward()
    assert [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_environment_has_a_token_of_its_own_and_cameras_may_be_missing():
    backbone = eyes(environment=2, cameras=(), state=STATE + 2)
    state = draw(3, STATE + 2)
    context = backbone(Observation(images={}, state=state, tasks=("",) * 3))
    other = backbone(Observation(images={}, state=state + torch.tensor([0.0] * STATE + [1.0] * 2), tasks=("",) * 3))
    changed = (context.tokens - other.tokens).abs().sum(dim=-1) > 0
    assert changed.tolist() == [[False, True]] * 3


def test_published_sizes_are_lerobot_s():
    """For ALOHA, with one camera of 480 x 640; facts: 512 wide, 4 + 1 layers, latent 32."""
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig as LeRobotConfig
    from lerobot.policies.act.modeling_act import ACT

    whole = LeRobotConfig(
        device="cpu",
        pretrained_backbone_weights=None,
        input_features={
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 480, 640)),
            "observation.state": PolicyFeature(FeatureType.STATE, (14,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (14,))},
    )
    with torch.device("meta"):
        backbone = ActBackbone(
            EyesConfig(preset="published", frozen_norm=True),
            cameras=("top",),
            image_size=(480, 640),
            state_width=14,
            give=frozenset({"tokens", "places"}),
        )
        head = ActHead(ActConfig(preset="published"), Sizes(context=512, state=14, horizon=100, action=14))
        reference = ACT(whole)
    assert len(backbone._places()) == 1 + 15 * 20
    ours = sum(p.numel() for part in (backbone, head) for p in part.parameters())
    assert ours == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: eyes(cameras=()), "neither a camera nor a state of the environment"),
        (lambda: eyes(environment=STATE + 1), f"environment {STATE + 1} of {STATE} components"),
        (lambda: eyes(give="pooled", encoder_layers=0), "has not read the others; give encoder_layers 1"),
        (lambda: EyesConfig(preset="tiny", dim=18), "dim 18 must be a multiple of 4"),
        (lambda: EyesConfig(preset="small", pretrained="w"), "no pretrained weights for preset small"),
        (lambda: EyesConfig(preset="published", freeze=True), "freeze without pretrained"),
        (lambda: eyes(picture_mean=((0.0, 0.0, 0.0),) * 3), "one for each of 2 cameras"),
        (lambda: ActConfig(dim=30), "dim 30 must be a multiple of 2 x heads"),
    ],
)
def test_refused_when_built(make, message):
    with pytest.raises(BadInput, match=message) as fault:
        make()
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_pretrained_weights_in_torchvision_s_names(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    weights = {n: w for n, w in resnet18(weights=None).state_dict().items() if "num_batches" not in n}
    save_file(weights, tmp_path / "resnet18.safetensors")
    options = {"trunk": "resnet18", "pretrained": str(tmp_path / "resnet18.safetensors"), "freeze": True}
    backbone = build(config(backbone=options)).backbone
    assert torch.equal(backbone.trunk.state_dict()["7.1.conv2.weight"], weights["layer4.1.conv2.weight"])
    assert torch.equal(backbone.trunk.state_dict()["7.1.bn2.running_var"], weights["layer4.1.bn2.running_var"])
    assert not any(p.requires_grad for p in backbone.trunk.parameters())


def test_chunks_are_as_long_as_the_horizon():
    policy = build(config())
    assert policy.predict_action(batch().observation, generator(0)).shape == (8, HORIZON, ACTION)
