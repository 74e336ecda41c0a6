"""The diffusion policy: the same numbers as LeRobot's and diffusers', and what theirs does not promise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_policy import ACTION, HORIZON, STATE, batch, build, generator
from torch.testing import assert_close

from data.errors import BadInput
from models import registry
from models.acting import ActingPolicy
from models.backbones.diffusion_rgb import DiffusionRgb, DiffusionRgbConfig
from models.checkpoint import load_policy, publish, save_policy
from models.config import PolicyConfig
from models.heads.diffusion import DiffusionConfig, DiffusionHead, _generator
from models.layers.augment import random_shift
from models.layers.trunks import IMAGENET_MEAN, IMAGENET_STD
from models.types import Context, Observation, Sizes

PX, CROP = 72, 64  # of the pictures of the reference
CAMERAS = ("head", "wrist")


def config(backbone: dict | None = None, **head) -> PolicyConfig:
    return PolicyConfig(
        backbone="diffusion_rgb",
        backbone_options={"preset": "tiny", "keypoints": 4} | (backbone or {}),
        head="diffusion",
        head_options={"preset": "tiny", "clip": 1.0} | head,
        normalization="min_max",
        shift=0,
    )


def make_head(horizon: int = HORIZON, width: int = 16, **options) -> DiffusionHead:
    torch.manual_seed(0)
    options = DiffusionConfig(**{"preset": "tiny", **options})
    return DiffusionHead(options, Sizes(context=width, state=STATE, horizon=horizon, action=ACTION)).eval()


def make_backbone(image_size: tuple[int, int] = (PX, PX), **options) -> DiffusionRgb:
    options = DiffusionRgbConfig(**options)
    return DiffusionRgb(options, cameras=CAMERAS, image_size=image_size, state_width=STATE, give=frozenset({"pooled"}))


def draw(*shape: int, purpose: str = "x") -> torch.Tensor:
    return torch.randn(*shape, generator=generator(purpose))


# -- parity ----------------------------------------------------------------------------------------------------------


def lerobot_model(*, horizon: int, shared: bool, **options):
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as LeRobotConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel

    picture = PolicyFeature(type=FeatureType.VISUAL, shape=(3, PX, PX))
    torch.manual_seed(1)
    whole = LeRobotConfig(
        device="cpu",
        n_obs_steps=1,
        horizon=horizon,
        n_action_steps=3,
        input_features={
            "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(STATE,)),
            **{f"observation.images.{name}": picture for name in CAMERAS},
        },
        output_features={"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))},
        crop_shape=(CROP, CROP),
        crop_is_random=False,
        pretrained_backbone_weights=None,
        use_group_norm=True,
        spatial_softmax_num_keypoints=4,
        use_separate_rgb_encoder_per_camera=not shared,
        down_dims=(32, 64),
        kernel_size=3,
        diffusion_step_embed_dim=32,
        do_mask_loss_for_padding=True,
        **options,
    )
    return DiffusionModel(whole)


def copy_of(reference, *, horizon: int, shared: bool, **options) -> tuple[DiffusionRgb, DiffusionHead]:
    """Ours with the reference's weights."""
    backbone = make_backbone(preset="resnet18", keypoints=4, crop=(CROP, CROP), shared=shared)
    (backbone.encoders[0] if shared else backbone.encoders).load_state_dict(reference.rgb_encoder.state_dict())
    head = make_head(horizon, backbone.width, clip=1.0, **options)
    head.unet.load_state_dict(reference.unet.state_dict())
    return backbone, head


def observed(b: int) -> tuple[Observation, dict[str, torch.Tensor]]:
    """The same for us and for LeRobot, whose processor scales pictures beforehand."""
    images = {name: torch.rand(b, 3, PX, PX, generator=generator(name)) for name in CAMERAS}
    state = draw(b, STATE, purpose="state")
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    stacked = torch.stack([(images[name] - mean) / std for name in CAMERAS], dim=1)
    theirs = {"observation.state": state[:, None], "observation.images": stacked[:, None]}
    return Observation(images=images, state=state, tasks=("",) * b), theirs


@pytest.mark.parametrize(("shared", "prediction"), [(False, "epsilon"), (True, "sample")])
def test_loss_and_gradients_are_lerobot_s(shared, prediction):
    b, horizon = 3, 8
    reference = lerobot_model(horizon=horizon, shared=shared, prediction_type=prediction).train()
    backbone, head = copy_of(reference, horizon=horizon, shared=shared, prediction=prediction)
    seen, theirs = observed(b)
    action_is_pad = torch.arange(horizon) >= torch.tensor([8, 5, 1])[:, None]
    action = draw(b, horizon, ACTION).clamp(-1, 1).where(~action_is_pad[..., None], 0.0)

    torch.manual_seed(7)  # it draws noise and times in our order, from the global generator
    expected = reference.compute_loss(theirs | {"action": action, "action_is_pad": action_is_pad})
    expected.backward()
    mask = ~action_is_pad[..., None].expand(-1, -1, ACTION)
    loss, _ = head.loss(backbone(seen), action, mask, torch.Generator().manual_seed(7))
    of_batch = (loss * mask.sum((1, 2))).sum() / mask.sum()  # theirs is a mean over the batch's entries
    of_batch.backward()

    assert_close(of_batch, expected, atol=1e-5, rtol=0)
    encoders = backbone.encoders[0] if shared else backbone.encoders
    for ours, other in ((encoders, reference.rgb_encoder), (head.unet, reference.unet)):
        wanted = dict(other.named_parameters())
        assert wanted.keys() == dict(ours.named_parameters()).keys()
        for name, p in ours.named_parameters():
            assert_close(p.grad, wanted[name].grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_chunks_are_lerobot_s_from_their_first_action(sampler):
    """The executed slice is the classic slip: with one observation it begins at 0."""
    b, horizon, steps = 1, 8, 7
    reference = lerobot_model(
        horizon=horizon, shared=False, noise_scheduler_type=sampler.upper(), num_inference_steps=steps
    ).eval()
    backbone, head = copy_of(reference, horizon=horizon, shared=False, sampler=sampler, steps=steps)
    seen, theirs = observed(b)
    noise = draw(b, horizon, ACTION, purpose="noise")
    with torch.no_grad():
        context = backbone(seen)
        condition = reference._prepare_global_conditioning(theirs)
        assert_close(context.pooled, condition, atol=1e-5, rtol=0)
        t = torch.tensor([31])
        wanted = reference.unet(noise, t, global_cond=condition)
        assert_close(head.predict(noise, t, context), wanted, atol=1e-5, rtol=0)
        chunk = head.sample(context, noise)
        whole = reference.conditional_sample(b, global_cond=condition, generator=_generator(noise[0]), noise=noise)
        assert_close(chunk, whole, atol=1e-5, rtol=0)
        if sampler == "ddim":
            assert_close(chunk[:, :3], reference.generate_actions(theirs, noise=noise), atol=1e-5, rtol=0)


# -- known numbers ---------------------------------------------------------------------------------------------------


def test_noise_levels_are_the_cosine_schedule_s():
    t = np.arange(101) / 100
    level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    for sampler in ("ddim", "ddpm"):
        scheduler = make_head(sampler=sampler).scheduler
        np.testing.assert_allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-3, atol=1e-7)
    assert make_head(steps=10).scheduler.timesteps.tolist() == [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_exact_answer_of_one_point_leads_to_the_point(sampler, prediction, monkeypatch):
    """Contract 5, for diffusion: in any number of steps."""
    point, noise = draw(2, HORIZON, ACTION, purpose="point"), draw(2, HORIZON, ACTION, purpose="noise")
    for steps in (1, 2, 3, 10, 100):
        head = make_head(sampler=sampler, prediction=prediction, steps=steps)
        levels = head.scheduler.alphas_cumprod

        def exact(x, t, context, levels=levels):
            level = levels[t.long()][:, None, None]
            return (x - level.sqrt() * point) / (1 - level).sqrt() if prediction == "epsilon" else point

        monkeypatch.setattr(head, "predict", exact)
        assert torch.allclose(head.sample(Context(pooled=torch.zeros(2, 16)), noise), point, atol=1e-5), steps


def test_k_keypoints_per_camera_are_2k_features():
    """InternManip's documentation says K."""
    backbone = make_backbone((16, 16), preset="tiny", keypoints=64)
    seen = Observation(
        images={name: torch.rand(8, 3, 16, 16) for name in CAMERAS}, state=torch.randn(8, STATE), tasks=("",) * 8
    )
    pooled = backbone(seen).pooled
    assert pooled.shape == (8, backbone.width) == (8, STATE + 2 * 128)
    assert torch.equal(pooled[:, :STATE], seen.state)


def test_crop_after_the_policy_s_shift_is_a_random_crop_of_each_picture():
    """All (8 - 4 + 1)² places, and nothing that is not in the picture."""
    backbone = make_backbone((8, 8), preset="tiny", crop=(4, 4), keypoints=2)
    picture = torch.arange(64, dtype=torch.uint8).view(1, 8, 8, 1).expand(400, -1, -1, 3)
    shifted = random_shift(picture, 2, generator(0)).permute(0, 3, 1, 2).float()
    cropped = (backbone._scaled(shifted, 0) * backbone.scale.std[0] + backbone.scale.mean[0])[:, 0].round().long()
    corners = cropped[:, 0, 0]
    windows = (torch.arange(4)[:, None] * 8 + torch.arange(4)) + corners[:, None, None]
    assert torch.equal(cropped, windows)
    assert sorted(set(corners.tolist())) == [row * 8 + column for row in range(5) for column in range(5)]


# -- promises --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_padded_steps_change_no_loss(prediction):
    policy, data = build(config(prediction=prediction, draws=2)).eval(), batch()
    other = data.action.clone()
    other[data.action_is_pad] = 1e6
    losses = [policy.loss(d, generator("loss"))[0] for d in (data, replace(data, action=other))]
    assert torch.equal(*losses) and losses[0].shape == (len(data),)


def test_padded_entries_get_no_gradient(monkeypatch):
    """Of steps after the episode's end, and of components that the schema does not have."""
    policy, data = build(replace(config(), pad_action=8)).eval(), batch()
    seen, predict = [], policy.head.predict

    def remember(*args):
        seen.append(predict(*args))
        seen[0].retain_grad()
        return seen[0]

    monkeypatch.setattr(policy.head, "predict", remember)
    loss, _ = policy.loss(data, generator("loss"))
    loss.sum().backward()
    assert torch.equal(seen[0].grad != 0, policy.mask(data.action_is_pad))
    with torch.no_grad():
        policy.head.unet.final_conv[-1].bias[ACTION:] += 1e6
    assert torch.equal(policy.loss(data, generator("loss"))[0], loss)
    assert policy.predict_action(data.observation, generator("n")).shape == (8, HORIZON, ACTION)


@pytest.mark.parametrize("horizon", [1, 5, 8])
def test_any_horizon_fits_and_zeros_fill_it_up(horizon):
    """Two halvings; LeRobot asks for multiples of 8 with three stages."""
    head = make_head(horizon, down_dims=(16, 16, 16))
    read = []
    head.unet.register_forward_pre_hook(lambda unet, args: read.append(args[0]))
    context, action = Context(pooled=draw(2, 16)), draw(2, horizon, ACTION)
    loss, _ = head.loss(context, action, torch.ones_like(action, dtype=torch.bool), generator("l"))
    assert loss.shape == (2,) and head.noise_shape == (horizon, ACTION)
    assert head.sample(context, action).shape == action.shape
    assert len(read) == 1 + head.config.steps  # training and acting alike
    for x in read:
        assert x.shape[1] % 4 == 0 and x.shape[1] - horizon < 4
        assert x[:, :horizon].all() and not x[:, horizon:].any()


def test_a_sample_s_loss_looks_at_that_sample_alone_and_every_parameter_learns():
    policy, data = build(config(draws=3)), batch()
    state = data.observation.state.requires_grad_()
    loss, info = policy.loss(data, generator("loss"))
    (gradient,) = torch.autograd.grad(loss[2], state, retain_graph=True)
    assert gradient.any(dim=1).tolist() == [i == 2 for i in range(len(data))]
    loss.mean().backward()
    assert [n for n, p in policy.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any(value.requires_grad for value in info.values())


def test_actions_beyond_the_clip_are_counted():
    head, action = make_head(clip=2.0), torch.zeros(2, HORIZON, ACTION)
    action[0, 0, 0], action[1, :, 0] = 2.5, 9.0
    mask = torch.ones_like(action, dtype=torch.bool)
    mask[1] = False
    _, info = head.loss(Context(pooled=draw(2, 16)), action, mask, generator("l"))
    assert info["beyond_clip"].item() == pytest.approx(1 / (2 * HORIZON * ACTION))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_acting_is_a_function_of_observation_seed_and_step(sampler):
    """Not of the company that a question is asked in: bit for bit, with the noise that DDPM adds too."""
    acting = ActingPolicy(build(config(sampler=sampler)), "digest")
    seen = batch(size=3).observation
    columns = {f"observation.images.{name}": i.numpy() for name, i in seen.images.items()}
    columns["observation.state"] = seen.state.numpy()
    together = acting.act(columns, ["t"] * 3, [1, 2, 3], [0, 0, 5])
    alone = acting.act({name: c[1:2] for name, c in columns.items()}, ["t"], [2], [0])
    assert together.shape == (3, HORIZON, ACTION) and (alone[0] == together[1]).all()
    other = acting.act({name: c[1:2] for name, c in columns.items()}, ["t"], [2], [5])
    assert not np.array_equal(other, alone)


def test_ddpm_adds_noise_of_each_sample_s_own():
    """A batch is what its samples are alone, up to rounding."""
    head = make_head(sampler="ddpm")
    pooled, noise = draw(3, 16), draw(3, HORIZON, ACTION, purpose="noise")
    together = head.sample(Context(pooled=pooled), noise)
    alone = [head.sample(Context(pooled=pooled[i : i + 1]), noise[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert torch.equal(together, head.sample(Context(pooled=pooled), noise))


@pytest.mark.parametrize("options", [{}, {"backbone": {"shared": True, "crop": [12, 12]}, "sampler": "ddpm"}])
def test_saved_is_loaded(options, tmp_path):
    policy = build(config(**options)).eval()
    publish(tmp_path / "step-1", lambda hidden: save_policy(policy, hidden), step=1)
    loaded, seen = load_policy(tmp_path / "step-1"), batch().observation
    assert loaded.spec == policy.spec
    assert torch.equal(policy.predict_action(seen, generator(0)), loaded.predict_action(seen, generator(0)))


def test_it_learns_eight_chunks():
    """Below a tenth of the error at the start, or of standing still in the middle if that is smaller."""
    policy, data = build(replace(config(prediction="sample", clip=5.0), normalization="mean_std")), batch()
    real = policy.mask(data.action_is_pad)

    def error(chunk: torch.Tensor) -> float:
        return (chunk - data.action).abs()[real].mean().item()

    still = policy.in_units(torch.zeros(8, HORIZON, ACTION))
    start = min(error(still), error(policy.eval().predict_action(data.observation, generator("n"))))
    optimizer = torch.optim.AdamW(policy.train().parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=201, pct_start=0.05)
    for step in range(200):
        policy.loss(data, generator("step", step))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert error(policy.eval().predict_action(data.observation, generator("n"))) < 0.1 * start


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_head_that_reads_tokens_is_refused_naming_those_that_fit():
    with pytest.raises(BadInput, match=r"head 'act' needs tokens.*heads that fit it: ") as fault:
        build(PolicyConfig(backbone="diffusion_rgb", head="act"))
    fitting = str(fault.value).split("heads that fit it: ")[1].split(", ")
    assert {"diffusion", "flow"} <= set(fitting) <= set(registry.HEADS) - {"act"}
    policy = build(replace(config(), head="flow", head_options={"dim": 16}))
    assert policy.predict_action(batch().observation, generator(0)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 101}, "steps is 101; give 1 to train_steps, which is 100"),
        ({"down_dims": (12, 24)}, r"down_dims \[12, 24\] must be multiples of 8"),
        ({"draws": 0}, "draws 0 must be at least 1"),
        ({"sampler": "dpm"}, "head diffusion: option sampler"),
        ({"backbone": {"crop": (17, 16)}}, r"crop \(17, 16\) does not fit into pictures of \(16, 16\)"),
        ({"backbone": {"freeze": True}}, "freeze without pretrained"),
        ({"backbone": {"pretrained": "w.safetensors"}}, "no pretrained weights for preset tiny"),
    ],
)
def test_refused_when_built(options, message):
    with pytest.raises(BadInput, match=message) as fault:
        build(config(**options))
    assert len(str(fault.value)) < 200 and "\n" not in str(fault.value)


def test_pretrained_weights_in_torchvision_s_names(tmp_path):
    from safetensors.torch import save_file
    from torchvision.models import resnet18

    torch.manual_seed(0)
    weights = {n: w for n, w in resnet18(weights=None).state_dict().items() if "num_batches" not in n}
    save_file(weights, tmp_path / "resnet18.safetensors")
    options = {"preset": "resnet18", "pretrained": str(tmp_path / "resnet18.safetensors")}
    policy = build(config(backbone={**options, "freeze": True}))
    for encoder in policy.backbone.encoders:
        assert torch.equal(encoder.backbone.state_dict()["7.1.conv2.weight"], weights["layer4.1.conv2.weight"])
        assert not any(p.requires_grad for p in encoder.backbone.parameters())
        assert all(p.requires_grad for p in encoder.out.parameters())
    save_file({"conv1.weight": weights["conv1.weight"]}, tmp_path / "resnet18.safetensors")
    with pytest.raises(BadInput, match=r"bn1.weight is missing"):
        build(config(backbone=options))
